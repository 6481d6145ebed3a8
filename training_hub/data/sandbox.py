"""The Jinja environment that chat templates run in: transformers' own, closed to Python, with limits.

Templates are code from elsewhere. Nothing they see has methods that lead out, nothing they do is free (budget.py).
The library's ways in are used: intercepted operators and calls, filters, `finalize`, `concat`, and the node tree before
code is generated from it, in which loops, comparisons, `~` and slices become calls of filters that charge.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Iterable, Sequence
from types import BuiltinMethodType
from typing import TYPE_CHECKING, Any

from training_hub.data import budget as cost
from training_hub.data.budget import Budget

if TYPE_CHECKING:
    import jinja2

# Filters that only look, pass on or go item by item, which is charged at each item. All others have a price ahead.
_FREE = {
    "attr", "count", "d", "default", "first", "items", "last", "length", "map", "reject", "rejectattr", "safe",
    "select", "selectattr",
}  # fmt: skip
_FILTERS: dict[str, cost.Estimate] = {
    **dict.fromkeys(("batch", "list", "reverse", "slice"), cost.pieces),
    **dict.fromkeys(("center", "truncate", "trim", "lower", "upper", "capitalize", "string", "round"), cost.added),
    **dict.fromkeys(("format", "indent", "join", "tojson", "e", "escape", "forceescape"), cost.multiplied),
    "replace": cost.replaced,
    "sum": cost.summed,
}
_METHODS: dict[str, cost.Estimate] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes", "encode"), cost.added),
    **dict.fromkeys(("expandtabs", "translate"), cost.multiplied),
    **dict.fromkeys(("split", "rsplit", "splitlines"), cost.split),
    **dict.fromkeys(("count", "index"), cost.searched),
    "fromkeys": lambda budget, value, arguments: 100 * budget.weigh(arguments[:1]),
    "join": cost.joined,
    "replace": cost.replaced,
}
_OPERATORS = {"*": cost.product, "**": cost.power, "%": cost.percent}
_COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le, "gt": operator.gt,
    "gteq": operator.ge, "in": lambda a, b: a in b, "notin": lambda a, b: a not in b,
}  # fmt: skip
# Names no template can write.
_LOOP, _STEP, _JOIN, _COMPARE, _MADE = "each of", "a step", "side by side", "compared", "made"


@functools.lru_cache(maxsize=32)
def compile_template(source: str) -> jinja2.Template:
    """The template, ready to render. Raises what Jinja raises, and Overrun for one that is too long."""
    if len(source) > cost.LONGEST_SOURCE:
        raise cost.Overrun(f"stopped: its source is longer than the limit of {cost.LONGEST_SOURCE:,} characters")
    budget().begin(None)
    return _environment().from_string(source)


@functools.lru_cache(maxsize=1)
def budget() -> Budget:
    """What the template that a thread renders has left."""
    return Budget()


@functools.lru_cache(maxsize=1)
def refusal() -> type[Exception]:
    import jinja2

    class Refusal(jinja2.exceptions.TemplateError):
        """What `raise_exception` raises."""

    return Refusal


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """As transformers sets it up for chat templates (`_cached_compile_jinja_template`, version 5.23), and limited.

    Left out are the filter `random` and the function `lipsum`: their text differs from one rendering to the next, so no
    mask could be made of it.
    """
    from jinja2.ext import loopcontrols

    environment = _limited()(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation(), loopcontrols],
        finalize=_written,
        # Folding constants would run bombs while compiling, where no line of the template can be named.
        optimized=False,
    )
    environment.filters["tojson"] = _to_json
    del environment.filters["random"], environment.globals["lipsum"]
    for name, function in list(environment.filters.items()):
        environment.filters[name] = _charged(name, function)
    for name in ("in", "==", "eq", "equalto", "!=", "ne", *"> gt greaterthan ge >= < lt lessthan <= le".split()):
        environment.tests[name] = functools.partial(_compare_by, environment.tests[name])
    spend = budget()
    environment.filters |= {
        _LOOP: spend.counted, _STEP: spend.work, _JOIN: _joined, _COMPARE: _compared, _MADE: spend.made,
    }  # fmt: skip
    environment.globals["raise_exception"] = _refuse
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    environment.globals["namespace"] = _namespace()
    return environment


def _limited() -> type[jinja2.Environment]:
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

    spend = budget()

    class Formatter(SandboxedFormatter):
        """Charges for every field of `text.format(...)`."""

        def format_field(self, value: Any, format_spec: str) -> Any:
            spend.make(spend.weigh(value) + cost.widths(format_spec))
            return super().format_field(value, format_spec)

    class Limited(ImmutableSandboxedEnvironment):
        """Charges for what templates do."""

        intercepted_binops = frozenset({"+", *_OPERATORS})

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            if operator == "+":
                return spend.made(left + right)
            spend.make(_OPERATORS[operator](spend, left, right))
            return self.binop_table[operator](left, right)

        def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
            if type(__obj) is BuiltinMethodType:
                args = _ahead(__obj, args, kwargs)
            elif args and any(type(each) is tuple for each in args):
                spend.make(spend.weigh(args))
            return spend.made(super().call(__context, __obj, *args, **kwargs))

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            wrapped = super().wrap_str_format(value)
            if wrapped is None:
                return None
            text, by_name = str(value.__self__), value.__name__ == "format_map"

            def write(*args: Any, **kwargs: Any) -> str:
                return Formatter(self).vformat(text, () if by_name else args, args[0] if by_name else kwargs)

            return write

        @staticmethod
        def concat(parts: Iterable[str]) -> str:
            """The text of the whole template, a macro or a block."""
            parts = list(parts)
            spend.make(sum(map(len, parts)))
            return "".join(parts)

        def _generate(self, source: Any, *args: Any, **kwargs: Any) -> str:
            return super()._generate(_with_charges(source), *args, **kwargs)

    return Limited


def _ahead(method: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """Charge for what a method of a text, number or list may make, and its arguments."""
    estimate = _METHODS.get(method.__name__)
    if estimate is not None:
        if method.__name__ == "join" and arguments and hasattr(arguments[0], "__next__"):
            arguments = (list(arguments[0]), *arguments[1:])
        budget().make(estimate(budget(), method.__self__, (*arguments, *named.values())))
    return arguments


def _charged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, paying for what it may make and for what it made."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0
    estimate = None if name in _FREE else _FILTERS.get(name, cost.slow)
    spend = budget()

    @functools.wraps(function)
    def charged(*args: Any, **named: Any) -> Any:
        if estimate is not None:
            value = args[at]
            if hasattr(value, "__next__"):
                value = list(value)
                args = (*args[:at], value, *args[at + 1 :])
            spend.make(estimate(spend, value, (*args[at + 1 :], *named.values())))
        return spend.made(function(*args, **named))

    return charged


def _written(value: Any) -> Any:
    """What is put out, charged where writing it may make much."""
    if type(value) is not str:
        budget().make(budget().weigh(value))
    return value


def _joined(parts: Sequence[Any]) -> str:
    spend = budget()
    spend.make(sum(len(part) if type(part) is str else spend.weigh(part) for part in parts))
    return "".join(map(str, parts))


def _compared(value: Any, *rest: Any) -> bool:
    """`value op other op other ...` with `rest` as (op, other, op, other, ...)."""
    result = True
    for name, other in zip(rest[::2], rest[1::2], strict=True):
        result = _compare_by(_COMPARED[name], value, other)
        if not result:
            break
        value = other
    return result


def _compare_by(compare: Callable[[Any, Any], Any], value: Any, other: Any) -> Any:
    spend = budget()
    for each in (value, other):
        kind = type(each)
        if kind is str:
            spend.work(1 + len(each) // 256)
        elif kind is not dict or compare is not _COMPARED["in"]:
            spend.work(1 + spend.weigh(each) // 16)
    return compare(value, other)


def _with_charges(tree: Any) -> Any:
    """The template's node tree with a charge at everything that Jinja offers no other way to see."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def filtered(node: Any, name: str, *arguments: Any) -> Any:
        return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)

    def constant(value: Any, line: int) -> Any:
        return nodes.Const(value, lineno=line)

    def cheap(node: Any) -> bool:
        return isinstance(node, nodes.Const) or (
            isinstance(node, nodes.List | nodes.Tuple) and all(isinstance(item, nodes.Const) for item in node.items)
        )

    class Charges(NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            steps = _size(node)
            self.generic_visit(node)
            if node.recursive:
                return _stepping(node, steps)
            node.iter = filtered(node.iter, _LOOP, constant(steps, node.lineno))
            return node

        def visit_Macro(self, node: Any) -> Any:
            return _stepping(self.generic_visit(node), _size(node))

        visit_CallBlock = visit_Macro

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            parts = nodes.Tuple(node.nodes, "load", lineno=node.lineno)
            return filtered(parts, _JOIN)

        def visit_Tuple(self, node: Any) -> Any:
            self.generic_visit(node)
            return node if node.ctx != "load" or cheap(node) else filtered(node, _MADE)

        def visit_Getitem(self, node: Any) -> Any:
            self.generic_visit(node)
            return filtered(node, _MADE) if isinstance(node.arg, nodes.Slice) else node

        def visit_Compare(self, node: Any) -> Any:
            self.generic_visit(node)
            if len(node.ops) == 1 and (cheap(node.ops[0].expr) or (cheap(node.expr) and node.ops[0].op in ("eq", "ne"))):
                return node
            rest = [part for each in node.ops for part in (constant(each.op, node.lineno), each.expr)]
            return filtered(node.expr, _COMPARE, *rest)

    def _stepping(node: Any, steps: int) -> Any:
        charge = filtered(constant(steps, node.lineno), _STEP)
        node.body.insert(0, nodes.ExprStmt(charge, lineno=node.lineno))
        return node

    def _size(node: Any) -> int:
        return 2 + sum(1 for _ in node.find_all(nodes.Node))

    return Charges().visit(tree)


def _generation() -> type[Any]:
    import jinja2
    from jinja2.ext import Extension

    class Generation(Extension):
        """Accepts {% generation %} ... {% endgeneration %} and renders what is inside: masks here need no marks."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A call block, as in transformers: what is set inside stays inside there, and must here.
            return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Callable[[], str]) -> str:
            return caller()

    return Generation


def _namespace() -> type[Any]:
    import jinja2

    class Namespace(jinja2.utils.Namespace):
        """Without underscore names, through which a template could reach Python's internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, rest = args[0], args[1:]
            attributes = dict(*rest, **kwargs)
            for key in attributes:
                _refuse_hidden(key)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_hidden(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        def __repr__(self) -> str:
            return "<namespace>"

    return Namespace


def _refuse_hidden(name: Any) -> None:
    import jinja2

    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")


def _refuse(message: str) -> None:
    raise refusal()(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
