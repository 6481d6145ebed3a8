"""A template's node tree with a charge at everything that Jinja offers no other way to see.

Loops, `~`, sums, containers, slices and comparisons become filters that the sandbox has under names no template can
write. What is bounded without that is left alone, for speed: a comparison with a constant, a short sum put out at once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

# Filters that no template can name.
LOOP, STEP, JOIN, COMPARE, MADE, CUT = "each of", "a step", "side by side", "compared ", "made", "cut"
# So many texts of unknown length in one sum put out at once; each is no longer than the limit.
_FEW = 3
# Nodes of a loop's body that take no more than a few microseconds together.
_SMALL = 100


def with_charges(tree: Any) -> Any:
    """The template's node tree with a charge at everything that Jinja offers no other way to see."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def filtered(node: Any, name: str, *arguments: Any) -> Any:
        return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)

    def numbers(*values: int) -> list[Any]:
        return [nodes.Const(value) for value in values]

    def is_fixed(node: Any) -> bool:
        return isinstance(node, nodes.Const) or (
            isinstance(node, nodes.List | nodes.Tuple) and all(isinstance(item, nodes.Const) for item in node.items)
        )

    def stepping(node: Any, size: int) -> Any:
        node.body.insert(0, nodes.ExprStmt(filtered(*numbers(size), STEP), lineno=node.lineno))
        return node

    class Charges(NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            size, outputs = _count(node, nodes.Node), _count(node, nodes.Output)
            self.generic_visit(node)
            # A small body is charged for all rounds at once, a large one each round: the clock has to be looked at.
            step_by_step = node.recursive or size > _SMALL
            node.iter = filtered(node.iter, LOOP, *numbers(0 if step_by_step else size, outputs))
            return stepping(node, size) if step_by_step else node

        def visit_Macro(self, node: Any) -> Any:
            size = _count(node, nodes.Node)
            return stepping(self.generic_visit(node), size)

        visit_CallBlock = visit_Macro

        def visit_Output(self, node: Any) -> Any:
            # A sum that is put out at once is charged there: it cannot grow by being added to itself.
            node.nodes = [self.sum_of_few(part) or self.visit(part) for part in node.nodes]
            return node

        def sum_of_few(self, node: Any) -> Any:
            parts = _addends(node)
            if len(parts) < 2 or sum(not isinstance(part, nodes.Const) for part in parts) > _FEW:
                return None
            return _rebuilt(node, iter([self.visit(part) for part in parts]))

        def visit_Add(self, node: Any) -> Any:
            self.generic_visit(node)
            fixed = (side.value for side in (node.left, node.right) if isinstance(side, nodes.Const))
            return node if any(isinstance(value, int) for value in fixed) else filtered(node, MADE)

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return filtered(nodes.Tuple(node.nodes, "load", lineno=node.lineno), JOIN)

        def visit_List(self, node: Any) -> Any:
            self.generic_visit(node)
            return node if is_fixed(node) else filtered(node, MADE)

        visit_Dict = visit_List

        def visit_Tuple(self, node: Any) -> Any:
            return self.generic_visit(node) if node.ctx != "load" else self.visit_List(node)

        def visit_Getitem(self, node: Any) -> Any:
            self.generic_visit(node)
            return filtered(node, CUT) if isinstance(node.arg, nodes.Slice) else node

        def visit_Compare(self, node: Any) -> Any:
            self.generic_visit(node)
            first, last = node.expr, node.ops[-1]
            if is_fixed(last.expr) or (is_fixed(first) and last.op in ("eq", "ne")):
                return node
            if len(node.ops) == 1:
                return filtered(first, COMPARE + last.op, last.expr)
            pairs = [(first, node.ops[0]), *((before.expr, each) for before, each in pairwise(node.ops))]
            compared = [filtered(value, COMPARE + each.op, each.expr) for value, each in pairs]
            return functools.reduce(lambda left, right: nodes.And(left, right, lineno=node.lineno), compared)

    return Charges().visit(tree)


def _count(node: Any, kind: type[Any]) -> int:
    return 2 + sum(1 for _ in node.find_all(kind))


def _addends(node: Any) -> list[Any]:
    """The parts of a sum from left to right."""
    from jinja2 import nodes

    return [*_addends(node.left), *_addends(node.right)] if isinstance(node, nodes.Add) else [node]


def _rebuilt(node: Any, parts: Iterator[Any]) -> Any:
    """The sum with other parts."""
    from jinja2 import nodes

    if not isinstance(node, nodes.Add):
        return next(parts)
    node.left, node.right = _rebuilt(node.left, parts), _rebuilt(node.right, parts)
    return node
