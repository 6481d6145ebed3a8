"""AutoTrain's YAML file: task, base_model, project_name, data, params, hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from training_hub.errors import RecipeError
from training_hub.frontends.autotrain.params import TOKENS, LLMTrainingParams, unknown_parameter
from training_hub.recipe.load import read_text
from training_hub.recipe.names import nearest
from training_hub.recipe.translate import shown
from training_hub.recipe.yaml_text import read_yaml

VARIABLE = re.compile(r"\$\{\w+\}")
TOP = ("task", "base_model", "project_name", "log", "backend", "data", "params", "hub")
TASKS = ("llm-sft", "llm")
DATA = {
    "path": "data_path",
    "train_split": "train_split",
    "valid_split": "valid_split",
    "chat_template": "chat_template",
}
COLUMNS = ("text_column", "prompt_text_column")
HUB = ("username", "push_to_hub", "repo_id", "hub_private")


def params_of_file(path: str) -> dict[str, Any]:
    """The parameters that an AutoTrain file gives. Raises RecipeError that lists everything that is wrong with it."""
    tree = read_yaml(read_text(path), path)
    if not isinstance(tree, Mapping):
        raise RecipeError(f"{path}: found {shown(tree)}; a mapping with {', '.join(TOP)} is wanted.")
    values: dict[str, Any] = {}
    problems = [f"{path}: {line}" for line in _read(tree, values)]
    if problems:
        raise RecipeError(problems)
    return values


def _read(tree: Mapping[str, Any], values: dict[str, Any]) -> Iterator[str]:
    """Fill `values`; yields what is wrong."""
    yield from _unknown(tree, TOP, "")
    for name in ("data", "params", "hub"):
        if not isinstance(tree.get(name), (Mapping, type(None))):
            yield f"{name}: found {shown(tree[name])}; a mapping is wanted."
    task = tree.get("task", "llm-sft")
    if task not in TASKS:
        yield f"task: found {shown(task)}; allowed: llm-sft. Write task: llm-sft"
    if tree.get("backend", "local") != "local":
        yield f"backend: found {shown(tree['backend'])}; runs are on this machine. Write backend: local"
    for theirs, ours in (("base_model", "model"), ("project_name", "project_name"), ("log", "log")):
        if tree.get(theirs) is not None:
            yield from _put(values, ours, tree[theirs], theirs)
    yield from _data(_section(tree, "data"), values)
    for name, value in _section(tree, "params").items():
        if name in LLMTrainingParams.model_fields:
            yield from _put(values, name, value, f"params.{name}")
        else:
            yield f"params.{unknown_parameter(str(name))}"
    yield from _hub(_section(tree, "hub"), values)


def _data(data: Mapping[str, Any], values: dict[str, Any]) -> Iterator[str]:
    yield from _unknown(data, (*DATA, "column_mapping"), "data.")
    for theirs, ours in DATA.items():
        if data.get(theirs) is not None:
            yield from _put(values, ours, data[theirs], f"data.{theirs}")
    columns = _section(data, "column_mapping")
    if data.get("column_mapping") is not None and not columns:
        yield f"data.column_mapping: found {shown(data['column_mapping'])}; a mapping is wanted: {{text_column: text}}."
    yield from _unknown(columns, COLUMNS, "data.column_mapping.")
    for name in COLUMNS:
        if columns.get(name) is not None:
            yield from _put(values, name, columns[name], f"data.column_mapping.{name}")


def _hub(hub: Mapping[str, Any], values: dict[str, Any]) -> Iterator[str]:
    yield from _unknown(hub, (*HUB, "token"), "hub.")
    token = hub.get("token")
    if token is not None and VARIABLE.fullmatch(str(token)) is None:
        yield f"hub.token: a secret, which no file is to hold. Give it in the environment variable {TOKENS['token']}."
    elif token is not None and token != "${HF_TOKEN}":
        yield f"hub.token: found {token}; the token is read from {TOKENS['token']}. Write token: ${{HF_TOKEN}}"
    if not hub.get("push_to_hub"):
        return  # AutoTrain's files name a user also where nothing is sent
    for name in HUB:
        if hub.get(name) is not None:
            yield from _put(values, name, _expanded(hub[name]), f"hub.{name}")


def _put(values: dict[str, Any], name: str, value: Any, place: str) -> Iterator[str]:
    if name in values and values[name] != value:
        yield f"{place}: {shown(value)}, but another place of the file says {shown(values[name])}. Keep one."
    values[name] = value


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = tree.get(name)
    return found if isinstance(found, Mapping) else {}


def _unknown(tree: Mapping[str, Any], known: tuple[str, ...], prefix: str) -> Iterator[str]:
    for name in tree:
        if name not in known:
            near = nearest(str(name), known)
            yield f"{prefix}{name}: not a key; known: {', '.join(known)}.{f' Did you mean {near}?' if near else ''}"


def _expanded(value: Any) -> Any:
    """The value, with ${NAME} replaced by what the environment holds."""
    return os.path.expandvars(value) if isinstance(value, str) else value
