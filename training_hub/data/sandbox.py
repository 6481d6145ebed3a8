"""The Jinja environment that chat templates run in: transformers' own, closed to Python, with limits.

Templates are code from elsewhere. Nothing they see has methods that lead out, nothing they do is free (budget.py).
The library's ways in are used: intercepted operators and calls, filters, `finalize`, `concat`, and the node tree before
code is generated from it, in which loops, comparisons, `~` and slices become calls of filters that charge.
"""

from __future__ import annotations

import functools
import json
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import BuiltinMethodType
from typing import TYPE_CHECKING, Any

from training_hub.data import budget as cost
from training_hub.data.budget import Budget
from training_hub.data.charges import COMPARE, CUT, JOIN, LOOP, MADE, STEP, with_charges

if TYPE_CHECKING:
    import jinja2

# Filters that only look, pass on or go item by item. All others have a price ahead; `slow` unless listed below.
_FREE = frozenset({"attr", "count", "d", "default", "first", "items", "last", "length", "safe"})
_LAZY = frozenset({"map", "reject", "rejectattr", "select", "selectattr"})
# Filters that make no more than a few times what they are given, and so are charged for the result only.
_MODEST = frozenset({"capitalize", "lower", "string", "trim", "upper"})
_FILTERS: dict[str, cost.Estimate] = {
    **dict.fromkeys(("batch", "list", "reverse", "slice"), cost.pieces),
    **dict.fromkeys(("center", "truncate", "round"), cost.added),
    **dict.fromkeys(("indent", "join", "e", "escape", "forceescape"), cost.multiplied),
    "replace": cost.replaced,
    "format": cost.percent,
    "sum": cost.summed,
    "tojson": cost.indented,
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
_OPERATORS: dict[str, Callable[[Budget, Any, Any], int]] = {
    "*": cost.product, "**": cost.power, "%": lambda budget, text, values: cost.percent(budget, text, (values,)),
}  # fmt: skip
_COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le, "gt": operator.gt,
    "gteq": operator.ge, "in": lambda a, b: a in b, "notin": lambda a, b: a not in b,
}  # fmt: skip
_TESTS = "in == eq equalto != ne > gt greaterthan ge >= < lt lessthan <= le".split()
# Texts up to this length are compared and searched in no time worth charging.
_SHORT = 4096


def compile_template(source: str) -> jinja2.Template:
    """The template, ready to render in this thread once `compiled.environment.budget.begin(...)` was called.

    Raises what Jinja raises, and Overrun for a source that is too long.
    """
    return _compile(source, threading.get_ident())


@functools.lru_cache(maxsize=32)
def _compile(source: str, thread: int) -> jinja2.Template:
    if len(source) > cost.LONGEST_SOURCE:
        raise cost.Overrun(f"stopped: its source is longer than the limit of {cost.LONGEST_SOURCE:,} characters")
    environment = _environment(thread)
    environment.budget.begin(None)
    return environment.from_string(source)


@functools.lru_cache(maxsize=1)
def refusal() -> type[Exception]:
    import jinja2

    class Refusal(jinja2.exceptions.TemplateError):
        """What `raise_exception` raises."""

    return Refusal


@functools.lru_cache(maxsize=8)
def _environment(thread: int) -> Any:
    """As transformers sets it up for chat templates (`_cached_compile_jinja_template`, version 5.23), and limited.

    One for each thread, so that counting needs no lock. Left out are the filter `random` and the function `lipsum`:
    their text differs from one rendering to the next, so no mask could be made of it.
    """
    from jinja2.ext import loopcontrols

    budget = Budget()
    environment = _limited()(
        budget,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_generation(), loopcontrols],
        finalize=_written(budget),
        # Folding constants would run bombs while compiling, where no line of the template can be named.
        optimized=False,
    )
    environment.filters["tojson"] = _to_json
    del environment.filters["random"], environment.globals["lipsum"]
    for name, function in list(environment.filters.items()):
        if name not in _FREE:
            environment.filters[name] = _charged(name, function, budget)
    for name in _TESTS:
        environment.tests[name] = _compare_by(environment.tests[name], budget, name == "in")
    for name, compare in _COMPARED.items():
        environment.filters[COMPARE + name] = _compare_by(compare, budget, name in ("in", "notin"))
    environment.filters |= {
        LOOP: budget.counted,
        STEP: budget.work,
        JOIN: _joined(budget),
        MADE: budget.made,
        CUT: budget.cut,
    }
    environment.globals["raise_exception"] = _refuse
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    environment.globals["namespace"] = _namespace()
    return environment


@functools.lru_cache(maxsize=1)
def _limited() -> type[Any]:
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

    class Formatter(SandboxedFormatter):
        """Charges for every field of `text.format(...)`."""

        def format_field(self, value: Any, format_spec: str) -> Any:
            budget: Budget = self._env.budget  # type: ignore[attr-defined]
            budget.make(budget.weigh(value) + cost.widths(format_spec))
            return super().format_field(value, format_spec)

    class Limited(ImmutableSandboxedEnvironment):
        """Charges for what templates do."""

        intercepted_binops = frozenset(_OPERATORS)

        def __init__(self, budget: Budget, **settings: Any):
            super().__init__(**settings)
            self.budget = budget

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            self.budget.make(_OPERATORS[operator](self.budget, left, right))
            return self.binop_table[operator](left, right)

        def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            budget = __self.budget
            if type(__obj) is BuiltinMethodType:
                # A method of a text, list or number: what the library checks before a call cannot be wrong with it.
                # Inside a loop the compiler hands these to every call; the library takes them out again, too.
                kwargs.pop("_loop_vars", None)
                kwargs.pop("_block_vars", None)
                if __obj.__name__ in _METHODS:
                    args = _ahead(budget, __obj, args, kwargs)
                result = __obj(*args, **kwargs)
                kind = type(result)
                if kind is str:
                    budget.make(len(result))
                elif kind is list:
                    budget.make(cost.ITEM * len(result))
                return result
            for each in args:
                if type(each) is tuple:  # nested without end as `varargs`
                    budget.make(budget.weigh(each))
            return budget.made(super().call(__context, __obj, *args, **kwargs))

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            if super().wrap_str_format(value) is None:
                return None
            text, by_name = str(value.__self__), value.__name__ == "format_map"

            def write(*args: Any, **kwargs: Any) -> str:
                return Formatter(self).vformat(text, () if by_name else args, args[0] if by_name else kwargs)

            return write

        def concat(self, parts: Iterable[str]) -> str:
            """The text of the whole template, of a macro or of a block."""
            parts = list(parts)
            self.budget.make(sum(map(len, parts)))
            return "".join(parts)

        def _generate(self, source: Any, *args: Any, **kwargs: Any) -> str:
            return super()._generate(with_charges(source), *args, **kwargs)

    return Limited


def _ahead(budget: Budget, method: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """Charge for what a method of a text, number or list may make, and its arguments."""
    if method.__name__ == "join" and arguments and hasattr(arguments[0], "__next__"):
        arguments = (list(arguments[0]), *arguments[1:])
    values = (*arguments, *named.values())
    budget.make(_METHODS[method.__name__](budget, method.__self__, values))
    return arguments


def _charged(name: str, function: Callable[..., Any], budget: Budget) -> Callable[..., Any]:
    """The filter, paying for what it may make and for what it made."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0
    estimate = None if name in _LAZY else _FILTERS.get(name, cost.slow)

    @functools.wraps(function)
    def afterwards(*args: Any, **named: Any) -> Any:
        result = function(*args, **named)
        budget.make(len(result))
        return result

    @functools.wraps(function)
    def charged(*args: Any, **named: Any) -> Any:
        if estimate is not None:
            value = args[at]
            if isinstance(value, Iterator):
                value = list(value)
                args = (*args[:at], value, *args[at + 1 :])
            budget.make(estimate(budget, value, (*args[at + 1 :], *named.values())))
        return budget.made(function(*args, **named))

    return afterwards if name in _MODEST else charged


def _written(budget: Budget) -> Callable[[Any], Any]:
    def written(value: Any) -> Any:
        """What is put out, charged before it is written down."""
        if type(value) is str:
            budget.characters -= len(value)
            if budget.characters < 0:
                budget.draw()
        else:
            budget.make(budget.weigh(value))
        return value

    return written


def _joined(budget: Budget) -> Callable[[Sequence[Any]], str]:
    def joined(parts: Sequence[Any]) -> str:
        """What `~` makes."""
        budget.make(sum(len(part) if type(part) is str else budget.weigh(part) for part in parts))
        return "".join(map(str, parts))

    return joined


def _compare_by(compare: Callable[[Any, Any], Any], budget: Budget, inside: bool) -> Callable[[Any, Any], Any]:
    """`compare`, paying for long operands; the smaller one decides, but for looking `inside` the second."""

    def compared(value: Any, other: Any) -> Any:
        kind = type(other)
        if (kind is str and len(other) < _SHORT) or (kind is dict and inside) or (kind is int and not inside):
            return compare(value, other)
        for each in (value, other):
            budget.work(budget.weigh(each) // 256)
        return compare(value, other)

    return compared


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
