"""SFTConfig: the fields of EasyDeL's and of TRL's, in one class."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from training_hub.errors import RecipeError
from training_hub.frontends.trainer.fields import FIELDS, KNOWN
from training_hub.frontends.trainer.refused import REFUSED
from training_hub.recipe.names import nearest, nearest_setting

MEANING_NONE = ("max_length", "save_total_limit", "save_interval_minutes")
"""Fields that None says something of; elsewhere it means "not given"."""

ELSEWHERE = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "total_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "evaluation_strategy": "eval_strategy",
    "overwrite_output_dir": "resume_if_possible",
    "dataset_size": "dataset_batch_size",
    "wandb_project": "report_to",
    "group_by_length": "train_sampling_strategy",
}
"""Names that EasyDeL, TRL or transformers had at some time, or that other front ends have, for fields."""

OF_THE_DEVICE = ("use_cpu", "bf16", "fp16")
"""Fields of transformers without which its configuration cannot be made on some devices."""


class SFTConfig:
    """What a supervised fine-tuning run does, in the names of EasyDeL, of TRL, or of both.

    A field that is not given has the default of whom SFTTrainer is called as: `arguments=` that of EasyDeL's page,
    `args=` that of TRL. docs/guides/trainer.md lists all fields and what each becomes in the recipe. Raises RecipeError
    (a ValueError) listing every name that is not known, the nearest one to it, and every value that cannot be had.
    """

    _given: dict[str, Any]

    def __init__(self, output_dir: Any = None, **fields: Any):
        given = {**({} if output_dir is None else {"output_dir": output_dir}), **fields}
        problems = [line for name, value in given.items() for line in problems_of(name, value)]
        if problems:
            raise RecipeError(list(dict.fromkeys(problems)))
        object.__setattr__(self, "_given", dict(given))

    @property
    def given(self) -> dict[str, Any]:
        """The fields that say something, with their values."""
        said = {name: value for name, value in self._given.items() if name in KNOWN}
        return {name: value for name, value in said.items() if value is not None or name in MEANING_NONE}

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, those that were not given with their default; members of enumerations as their values."""
        values = {**{field.name: field.default for field in FIELDS}, **self._given}
        return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}

    def replace(self, **fields: Any) -> SFTConfig:
        """Another one with these fields changed."""
        return type(self)(**{**self._given, **fields})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying asks before __init__
            raise AttributeError(name)
        if name in self._given:
            return self._given[name]
        if name in KNOWN:
            return KNOWN[name].default
        if name in REFUSED:
            return REFUSED[name].off[0]
        raise AttributeError(f"SFTConfig has no field {name!r}.{_hint(name)}")

    def __setattr__(self, name: str, value: Any) -> None:
        problems = list(problems_of(name, value))
        if problems:
            raise RecipeError(problems)
        self._given[name] = value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *KNOWN})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SFTConfig) and self._given == other._given

    __hash__ = None  # type: ignore[assignment]  # its fields can be changed

    def __repr__(self) -> str:
        return f"SFTConfig({', '.join(f'{name}={value!r}' for name, value in self._given.items())})"


def problems_of(name: str, value: Any) -> Iterator[str]:
    """What is wrong with one field, as far as it can be told from it alone."""
    if name in REFUSED:
        try:
            REFUSED[name].settings(value)
        except RecipeError as error:
            yield from error.problems
    elif name not in KNOWN:
        yield f"{name}: not a field of SFTConfig.{_hint(name)}"
    elif value is not None and name != "overrides":
        try:
            KNOWN[name].assignments(value)
        except RecipeError as error:
            yield from error.problems


def config_from(arguments: Any) -> SFTConfig:
    """The SFTConfig that `arguments` are: one of ours, TRL's or EasyDeL's, a TrainingArguments, or a dictionary.

    Of a configuration of another library the fields that differ from the class's own defaults are taken. Raises
    RecipeError for anything else.
    """
    if isinstance(arguments, SFTConfig):
        return arguments
    if isinstance(arguments, Mapping):
        return SFTConfig(**arguments)
    fields = getattr(type(arguments), "__dataclass_fields__", None)
    if fields is None or "learning_rate" not in fields:
        raise RecipeError(
            f"arguments: found a {type(arguments).__name__}; allowed: SFTConfig(...), that of TRL or EasyDeL, or "
            "TrainingArguments of transformers."
        )
    copied = {name: getattr(arguments, name) for name in OF_THE_DEVICE if name in fields}
    plain = type(arguments)(**({"output_dir": "."} if "output_dir" in fields else {}), **copied)
    usual = {name: fields[name].default if name in copied else getattr(plain, name) for name in fields}
    changed = {
        name: getattr(arguments, name)
        for name, field in fields.items()
        if field.init and name in (*KNOWN, *REFUSED) and getattr(arguments, name) != usual[name]
    }
    return SFTConfig(**{name: _plain(value) for name, value in changed.items()})


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _hint(name: str) -> str:
    near = nearest(name, [*KNOWN, *ELSEWHERE, *REFUSED])
    if near:
        return f" Did you mean {ELSEWHERE.get(near, near)}?"
    setting = nearest_setting(name)
    return f" For the setting {setting} write overrides={{'{setting}': ...}}." if setting else ""


def _signature() -> inspect.Signature:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature([inspect.Parameter(field.name, kind, default=field.default) for field in FIELDS])


SFTConfig.__signature__ = _signature()  # type: ignore[attr-defined]  # for help() and editors
