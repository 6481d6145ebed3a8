"""What pydantic finds wrong with settings, said in the words of our errors: where, found, allowed, what to write."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from training_hub.recipe.findings import Names
from training_hub.recipe.names import REQUIRED, Setting, all_settings, nearest, owner_of
from training_hub.recipe.sections import DataSource

EXAMPLES = {
    "model.path": "MODEL_FOLDER",
    "output": "OUTPUT_FOLDER",
    "data.path": "FILE.jsonl",
    "training.global_batch_size": 16,
    "training.max_tokens_per_gpu": 8192,
    "training.max_seq_len": 4096,
    "optimizer.lr": 1e-5,
}


def problems_of(error: ValidationError, names: Names) -> tuple[list[str], set[str]]:
    """One line for each wrong setting, in the order of the recipe, and the paths of these settings."""
    by_path: dict[str, list[Any]] = {}
    for finding in error.errors(include_url=False):
        setting = owner_of(".".join(str(part) for part in finding["loc"]))
        path = setting.path if setting else _missing_path(finding["loc"])
        by_path.setdefault(path, []).append(finding)
    lines = [line for path, findings in by_path.items() for line in _lines(all_settings()[path], findings, names)]
    return lines, set(by_path)


def missing(path: str, names: Names) -> str:
    """The line for a setting that cannot be left out."""
    return f"{names(path)}: not given. Write {names.write(path, EXAMPLES.get(path, '...'))}"


def unknown(name: str, near: str | None, kind: str = "a setting of the recipe") -> str:
    """The line for a name that nothing knows."""
    hint = f" Did you mean {near}?" if near else " `training-hub sft --help` lists them all."
    return f"{name}: not {kind}.{hint}"


def shown(value: Any) -> str:
    """A value as an error shows it: short, and null, true, false as YAML has them."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _missing_path(location: tuple[Any, ...]) -> str:
    # A section without its required setting is reported at the section: `model` where model.path is missing.
    prefix = ".".join(str(part) for part in location)
    return next(path for path, one in all_settings().items() if path.startswith(prefix) and one.default is REQUIRED)


def _lines(setting: Setting, findings: list[Any], names: Names) -> Iterable[str]:
    if any(finding["type"] == "missing" and "DataSource" not in finding["loc"] for finding in findings):
        return [missing(setting.path, names)]
    inner = [line for finding in findings for line in _source_line(setting, finding)]
    if inner:
        return inner
    whole = next((one for one in findings if len(one["loc"]) == setting.path.count(".") + 1), findings[0])
    inside = ".".join(str(part) for part in whole["loc"][setting.path.count(".") + 1 :] if isinstance(part, str))
    place = names(setting.path) + (f" {inside}" if inside and setting.takes_mapping else "")
    found = whole["input"]
    advice = _advice(setting, found, names)
    return [f"{place}: found {shown(found)}; allowed: {setting.allowed}.{advice}"]


def _source_line(setting: Setting, finding: Any) -> Iterable[str]:
    """What is wrong inside one of the sources of data.path: the index and the key."""
    location = finding["loc"]
    if "DataSource" not in location:
        return
    index = next(part for part in location if isinstance(part, int))
    keys = [str(part) for part in location[location.index("DataSource") + 1 :]]
    place = f"{setting.path}[{index}]"
    known = list(DataSource.model_fields)
    if finding["type"] == "extra_forbidden":
        near = nearest(keys[0], known)
        yield f"{place}.{keys[0]}: not a key of a source; known: {', '.join(known)}." + (
            f" Did you mean {near}?" if near else ""
        )
    elif keys:
        found = "nothing" if finding["type"] == "missing" else shown(finding["input"])
        yield f"{place}.{keys[0]}: found {found}; {finding['msg'].replace('Input should be', 'allowed:')}."
    elif not isinstance(finding["input"], (str, dict)):
        yield f"{place}: found {shown(finding['input'])}; allowed: text, or {{{', '.join(known)}}}."


def _advice(setting: Setting, found: Any, names: Names) -> str:
    value = _suggestion(setting, found)
    return "" if value is None else f" Write {names.write(setting.path, value)}"


def _suggestion(setting: Setting, found: Any) -> Any:
    """A value that would be right: what was probably meant, else the default, else 1."""
    if setting.choices and isinstance(found, str):
        lowered = {str(choice).lower(): choice for choice in setting.choices}
        near = nearest(found.lower(), lowered)
        if near:
            return lowered[near]
    if setting.takes_text and isinstance(found, (int, float)):
        return shown(found)
    if isinstance(found, str) and setting.takes_number and not setting.choices:
        number = _as_number(found)
        if number is not None:
            return number
    if setting.default is not REQUIRED and setting.default not in (None, {}):
        return setting.default
    return 1 if setting.takes_number else None


def _as_number(text: str) -> float | int | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None
