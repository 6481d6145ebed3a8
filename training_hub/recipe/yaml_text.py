"""YAML as recipes use it: read without surprises, written so that reading gives back the same values.

Beyond PyYAML's safe loader: `1e-5` is a number, `2024-01-01` and `12:30` are text, a key given twice is an error with
its line, and a text cannot be made to grow (aliases, nesting, size are bounded).
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from training_hub.errors import RecipeError

MAX_CHARACTERS = 65_536
MAX_DEPTH = 32
MAX_VALUES = 20_000

# PyYAML follows YAML 1.1, where `1e-5` is text, `12:30` is 750 and `010` is 8. These are the rules of YAML 1.2, but
# for the words: `no` and `off` stay booleans, since a text field then refuses them where 1.2 would hand on "no".
_RULES = (
    (
        "bool",
        re.compile(r"^(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$"),
        "yYnNtTfFoO",
    ),
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), "-+0123456789"),
    (
        "float",
        re.compile(
            r"^[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
            r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
        ),
        "-+0123456789.",
    ),
    ("merge", re.compile(r"^<<$"), "<"),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader under the rules above; built in `_with_rules`."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        # `!!set [a]` comes here with a list, which the library refuses in its own words.
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = (key_node.tag, key_node.value) if isinstance(key_node, yaml.ScalarNode) else None
            line = key_node.start_mark.line + 1
            if key in seen and key is not None:
                first = f"first in line {seen[key]}"
                raise yaml.MarkedYAMLError(
                    problem=f"key '{key_node.value}' is given twice ({first})", problem_mark=key_node.start_mark
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper under the same rules, so that text which looks like a number is quoted."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        # Unquoted, these count as line ends and come back as something else.
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


class _BlockDumper(_Dumper):
    """The same, with text of several lines as a block."""

    def represent_text(self, data: str) -> yaml.ScalarNode:
        node = super().represent_text(data)
        node.style = node.style or ("|" if "\n" in data else None)
        return node


for _tag, _pattern, _first in _RULES:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
for _class in (_Dumper, _BlockDumper):
    _class.add_representer(str, _class.represent_text)


def read_yaml(text: str, name: str = "the recipe") -> Any:
    """The values that a YAML text holds; None for an empty one. Raises RecipeError naming `name` and the line."""
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{name}: {len(text):,} characters; at most {MAX_CHARACTERS:,} are read.")
    loader = None
    try:
        loader = _Loader(text)  # refuses characters that YAML does not allow
        node = loader.get_single_node()
        if node is None:
            return None
        _bound_size(node, {}, set())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(f"{name}{_line(error)}: {_reason(error)}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{name}: not YAML: {' '.join(str(error).split())}.") from error
    finally:
        if loader is not None:
            loader.dispose()


def write_yaml(values: Any, has_blocks: bool = False) -> str:
    """YAML that `read_yaml` turns into equal values again. `values`: dictionaries, lists, text, numbers, None.

    has_blocks: text of several lines stands as such below its key, where YAML can write it so.
    """
    dumper = _BlockDumper if has_blocks else _Dumper
    return yaml.dump(values, Dumper=dumper, sort_keys=False, allow_unicode=True, width=120)


def _bound_size(node: yaml.Node, sizes: dict[int, int], open_nodes: set[int]) -> int:
    """Number of values that `node` stands for with every alias written out; each node is visited once."""
    if id(node) in open_nodes:
        raise yaml.MarkedYAMLError(problem="an alias holds itself", problem_mark=node.start_mark)
    if id(node) in sizes:
        return sizes[id(node)]
    open_nodes.add(id(node))
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    size = 1 + sum(_bound_size(child, sizes, open_nodes) for child in children)
    if size > MAX_VALUES:
        raise yaml.MarkedYAMLError(problem=f"more than {MAX_VALUES:,} values", problem_mark=node.start_mark)
    open_nodes.remove(id(node))
    sizes[id(node)] = size
    return size


def _line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f" line {mark.line + 1}" if mark else ""


def _reason(error: yaml.MarkedYAMLError) -> str:
    if error.problem and error.problem.startswith("could not determine a constructor for the tag"):
        tag = error.problem.split("'")[1].replace("tag:yaml.org,2002:", "!!")
        return f"the tag '{tag}' is not read; write plain text, numbers, lists and mappings"
    return " ".join(part for part in (error.context, error.problem) if part)
