"""What the tests of the layout read: every module of the package, parsed, with its imports."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "training_hub"


@dataclass(frozen=True)
class Import:
    """One import: the module it names (`torch.nn`), where, and whether it happens as soon as the file is read."""

    module: str
    line: int
    is_at_top: bool


@dataclass(frozen=True)
class Module:
    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        return tuple(_imports(self))


@cache
def modules() -> dict[str, Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path)
    return found


@cache
def _names() -> frozenset[str]:
    return frozenset(modules())


def _imports(module: Module) -> list[Import]:
    found: list[Import] = []
    _walk(module.tree, module, True, found)
    return found


def _walk(node: ast.AST, module: Module, is_at_top: bool, found: list[Import]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found.extend(Import(alias.name, child.lineno, is_at_top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            origin = _absolute(child, module)
            for alias in child.names:
                full = f"{origin}.{alias.name}"
                found.append(Import(full if full in _names() else origin, child.lineno, is_at_top))
        else:
            happens_later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            only_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            _walk(child, module, is_at_top and not happens_later and not only_for_types, found)


def _absolute(node: ast.ImportFrom, module: Module) -> str:
    if not node.level:
        return node.module or ""
    inside = module.name.split(".") if module.is_package else module.name.split(".")[:-1]
    kept = inside[: len(inside) - node.level + 1]
    return ".".join([*kept, *([node.module] if node.module else [])])
