"""The shape of the code: imports go one way, engines stay apart, files and functions stay short, nothing unsafe runs.

errors, types, folders, version <- recipe <- algorithms, data, evaluation, monitoring, scaling <- backends <- launch
    <- experiments <- frontends <- __init__
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator

import pytest

from tests.imports import Import, Module, modules

RANKS = {
    "errors": 0,
    "types": 0,
    "folders": 0,
    "version": 0,
    "recipe": 1,
    "algorithms": 2,
    "data": 2,
    "evaluation": 2,
    "monitoring": 2,
    "scaling": 2,
    "backends": 3,
    "launch": 4,
    "experiments": 5,
    "frontends": 6,
    "": 7,  # training_hub/__init__.py: the public names
    "__main__": 8,
    "apps": 8,
    "scripts": 8,
    "trainers": 8,
    "demo": 8,  # a user of the public names
}
ENGINES = {
    "torch_engine": ("torch", "torchao", "bitsandbytes", "peft", "lion_pytorch", "schedulefree", "galore_torch"),
    "jax_engine": ("jax", "jaxlib", "optax", "ml_dtypes", "flax"),
}
SHARED = "shared"  # backends/shared: what runs of every engine have in common
HEAVY = ("transformers", "tokenizers", "huggingface_hub", "pyarrow", "datasets", "pandas")
TRACKERS = ("tensorboard", "wandb", "mlflow")
LONGEST_FILE = 450


def part(name: str) -> str:
    """The first name below the package: `training_hub.data.masks` -> `data`."""
    return name.removeprefix("training_hub").lstrip(".").split(".")[0]


def engine(name: str) -> str | None:
    """The engine that a module is of; None for one of `backends` itself, or of what all engines share."""
    parts = name.split(".")
    is_of_one = parts[:2] == ["training_hub", "backends"] and len(parts) > 2 and parts[2] != SHARED
    return parts[2] if is_of_one else None


def own_imports(module: Module) -> Iterator[Import]:
    return (found for found in module.imports if found.module.split(".")[0] == "training_hub")


def outside_imports(module: Module) -> Iterator[tuple[str, Import]]:
    return ((found.module.split(".")[0], found) for found in module.imports)


def said(module: Module, found: Import) -> str:
    return f"{module.path.name}:{found.line} ({module.name}) imports {found.module}"


def test_every_part_of_the_package_has_its_place_in_the_order():
    unknown = sorted({part(name) for name in modules()} - set(RANKS))
    assert not unknown, f"give these a rank in RANKS and in docs/architecture.md: {unknown}"


def test_imports_go_only_leftwards():
    wrong = [
        said(module, found)
        for module in modules().values()
        for found in own_imports(module)
        if RANKS[part(found.module)] > RANKS[part(module.name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_parts_on_one_level_do_not_import_each_other():
    wrong = [
        said(module, found)
        for module in modules().values()
        for found in own_imports(module)
        if RANKS[part(found.module)] == RANKS[part(module.name)] == 2 and part(found.module) != part(module.name)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        name: {found.module for found in own_imports(module) if found.is_at_top} & set(modules()) - {name}
        for name, module in modules().items()
    }
    assert not (circle := find_circle(graph)), " -> ".join(circle)


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Names along one circle, or []: whatever is left once all modules that import nothing left are taken away."""
    left = {name: set(edges) for name, edges in graph.items()}
    while free := [name for name, edges in left.items() if not edges & set(left)]:
        for name in free:
            del left[name]
    if not left:
        return []
    path = [next(iter(left))]
    while path.count(path[-1]) == 1:
        path.append(min(left[path[-1]] & set(left)))
    return path[path.index(path[-1]) :]


def test_a_circle_is_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("home", ENGINES)
def test_the_libraries_of_an_engine_are_imported_only_by_it(home: str):
    wrong = [
        said(module, found)
        for module in modules().values()
        for library, found in outside_imports(module)
        if library in ENGINES[home] and engine(module.name) not in (home, "external")
    ]
    assert not wrong, "\n".join(wrong)


def test_engines_do_not_import_each_other():
    wrong = [
        said(module, found)
        for module in modules().values()
        for found in own_imports(module)
        if engine(module.name) and engine(found.module) not in (None, engine(module.name))
    ]
    assert not wrong, "\n".join(wrong)


def test_what_engines_share_knows_none_of_them():
    wrong = [
        said(module, found)
        for module in modules().values()
        if module.name.startswith(f"training_hub.backends.{SHARED}")
        for found in own_imports(module)
        if engine(found.module)
    ]
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_are_imported_where_they_are_used():
    wrong = [
        said(module, found)
        for module in modules().values()
        if engine(module.name) is None
        for library, found in outside_imports(module)
        if library in (*HEAVY, *TRACKERS) and found.is_at_top
    ]
    assert not wrong, "move into the function that needs it:\n" + "\n".join(wrong)


def test_files_stay_short():
    long = {
        module.path.name: lines for module in modules().values() if (lines := module.text.count("\n")) > LONGEST_FILE
    }
    assert not long, f"more than {LONGEST_FILE} lines: {long}"


def test_functions_stay_short():
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    )
    assert statistics.median(lengths) <= 12
    assert lengths[int(len(lengths) * 0.95)] < 60


UNSAFE_CALLS = {
    "torch.load": "safetensors and JSON hold everything that is saved",
    "torch.save": "safetensors and JSON hold everything that is saved",
    "yaml.load": "write yaml.safe_load",
    "yaml.full_load": "write yaml.safe_load",
    "yaml.unsafe_load": "write yaml.safe_load",
    "os.system": "write subprocess.run with a list",
    "os.popen": "write subprocess.run with a list",
    "eval": "parse it",
    "exec": "parse it",
}
UNSAFE_ARGUMENTS = ("shell", "allow_pickle")
UNSAFE_MODULES = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines that would run what a file says: unpickling, shells, YAML with tags."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in UNSAFE_CALLS:
                yield node.lineno, f"{called}: {UNSAFE_CALLS[called]}"
            for argument in node.keywords:
                if argument.arg in UNSAFE_ARGUMENTS and ast.unparse(argument.value) != "False":
                    yield node.lineno, f"{called}({argument.arg}=...)"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, f"import {name}") for name in names if name.split(".")[0] in UNSAFE_MODULES)


def test_nothing_that_is_read_can_run_code():
    wrong = [f"{module.path.name}:{line} {what}" for module in modules().values() for line, what in unsafe(module.tree)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run('ls', shell=True)",
        "yaml.load(text)",
    ],
)
def test_unsafe_lines_are_found(line: str):
    assert list(unsafe(ast.parse(line)))
    assert not list(unsafe(ast.parse("np.load(path, allow_pickle=False); yaml.safe_load(text)")))
