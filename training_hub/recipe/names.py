"""The names of a recipe's settings: their paths, what they take, and the other spellings that mean the same.

A path is how YAML nests and how a flag is written: `training.global_batch_size`. Everything that lists settings
(errors, command-line help, the reference pages, the JSON schema) reads them from here.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from training_hub.recipe.recipe import Recipe
from training_hub.recipe.sections import Section

REQUIRED = object()

# Other spelling -> path. Only spellings that mean exactly the same; where from stands at the end of each line.
SPELLINGS: Mapping[str, str] = MappingProxyType(
    {
        "output_dir": "output",  # Hugging Face
        "ckpt_output_dir": "output",  # training_hub
        "random_seed": "seed",  # instructlab-training
        "training.seed": "seed",  # torchtitan
        "checkpoint.folder": "output",  # torchtitan, torchforge
        "model.hf_assets_path": "model.path",  # torchtitan, torchforge
        "model.name_or_path": "model.path",  # Hugging Face
        "model.model_name_or_path": "model.path",  # Hugging Face
        "data.dataset": "data.path",  # torchtitan
        "training.dataset": "data.path",  # torchforge
        "data.validation_path": "data.validation",  # mini-trainer
        "data.unmask_messages": "data.unmask",  # training_hub
        "data.is_pretraining": "data.pretraining",  # training_hub
        "training.num_epochs": "training.epochs",  # training_hub
        "training.max_steps": "training.steps",  # Hugging Face
        "training.effective_batch_size": "training.global_batch_size",  # training_hub
        "training.batch_size": "training.global_batch_size",  # mini-trainer
        "training.seq_len": "training.max_seq_len",  # torchtitan, torchforge
        "training.max_batch_len": "training.max_tokens_per_gpu",  # instructlab-training
        "training.max_grad_norm": "training.max_norm",  # Hugging Face
        "optimizer.learning_rate": "optimizer.lr",  # training_hub
        "lr_scheduler.num_warmup_steps": "lr_scheduler.warmup_steps",  # mini-trainer
        "osft.target_patterns": "osft.targets",  # training_hub
        "monitoring.tensorboard_log_dir": "monitoring.tensorboard",  # training_hub
        "processes.nproc_per_node": "processes.procs",  # torchrun
        "processes.nnodes": "processes.nodes",  # torchrun
    }
)


@dataclass(frozen=True)
class Setting:
    """One setting of the recipe. `limits`: what bounds its value. `default` is REQUIRED where there is none."""

    path: str
    annotation: Any
    limits: tuple[Any, ...]
    default: Any
    doc: str

    @property
    def allowed(self) -> str:
        """What it takes, in words: "a whole number of at least 1, or null"."""
        return describe(self.annotation, self.limits)

    @property
    def spellings(self) -> tuple[str, ...]:
        return tuple(other for other, path in SPELLINGS.items() if path == self.path)

    @property
    def is_boolean(self) -> bool:
        return self.annotation is bool

    @property
    def takes_boolean(self) -> bool:
        return bool in _alternatives(self.annotation)

    @property
    def takes_text(self) -> bool:
        """Whether any text is a value (a choice of words is not)."""
        return str in _alternatives(self.annotation)

    @property
    def takes_null(self) -> bool:
        return type(None) in _alternatives(self.annotation)

    @property
    def takes_number(self) -> bool:
        return bool({int, float} & set(_alternatives(self.annotation)))

    @property
    def takes_mapping(self) -> bool:
        return get_origin(self.annotation) is dict

    @property
    def takes_list(self) -> bool:
        return any(get_origin(part) is list for part in _alternatives(self.annotation))

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a choice, () where any value of a type is taken."""
        parts = _alternatives(self.annotation)
        return tuple(value for part in parts if get_origin(part) is Literal for value in get_args(part))


@cache
def all_settings() -> Mapping[str, Setting]:
    """Every setting by path, in the order of the recipe."""
    return MappingProxyType({setting.path: setting for setting in _walk(Recipe, "")})


@cache
def sections() -> Mapping[str, type[Section]]:
    """The sections by name, in the order of the recipe."""
    found = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return MappingProxyType({name: kind for name, kind in found.items() if _is_section(kind)})


def resolve(name: str) -> str | None:
    """The path that `name` means, None if it means none.

    A key inside a mapping counts: `data.roles.bot` stays as it is, since `data.roles` is a mapping.
    """
    name = SPELLINGS.get(name, name)
    if name in all_settings():
        return name
    owner = owner_of(name)
    return name if owner is not None and owner.takes_mapping else None


def owner_of(path: str) -> Setting | None:
    """The setting at `path`, or the one that `path` leads into (`data.roles.bot`, `data.path.0`)."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        setting = all_settings().get(".".join(parts[:length]))
        if setting is not None:
            return setting
    return None


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be: same last word, else alike as a whole or in that word."""
    known = list(known)
    by_last_word: dict[str, str] = {}
    for candidate in known:
        by_last_word.setdefault(_last_word(candidate), candidate)
    if _last_word(name) in by_last_word:
        return by_last_word[_last_word(name)]
    whole = difflib.get_close_matches(name, known, n=1)
    if whole:
        return whole[0]
    last = difflib.get_close_matches(_last_word(name), by_last_word, n=1, cutoff=0.7)
    return by_last_word[last[0]] if last else None


def nearest_setting(name: str) -> str | None:
    """The setting or section that an unknown `name` was probably meant to be."""
    near = nearest(name, [*all_settings(), *sections(), *SPELLINGS])
    return SPELLINGS.get(near, near) if near else None


def describe(annotation: Any, limits: Iterable[Any] = ()) -> str:
    """What a type takes, in words a user can act on."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        return describe(inner, extra)
    if origin in (Union, types.UnionType):
        return _listed([describe(part) for part in get_args(annotation)])
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(annotation))
    if origin is list:
        return f"a list of ({describe(get_args(annotation)[0])})"
    if origin is dict:
        return "a mapping of names to " + ("text" if get_args(annotation)[1] is str else "values")
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "{" + ", ".join(annotation.model_fields) + "}"
    if annotation in (int, float):
        return _number(annotation, limits)
    return {str: "text", bool: "true or false", type(None): "null", Any: "any value"}[annotation]


def plain_type(setting: Setting) -> type:
    """The Python type that best says what a setting takes: the first of its alternatives."""
    first = next(part for part in _alternatives(setting.annotation) if part is not type(None))
    if get_origin(first) is Literal:
        return type(get_args(first)[0])
    return get_origin(first) or first


def _walk(section: type[Section], prefix: str) -> Iterable[Setting]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if _is_section(kind):
            yield from _walk(kind, f"{prefix}{name}.")
        else:
            limits = tuple(field.metadata)
            yield Setting(f"{prefix}{name}", kind, limits, _default(field), _one_line(field.description))


def _default(field: FieldInfo) -> Any:
    return REQUIRED if field.is_required() else field.get_default(call_default_factory=True)


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _last_word(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that a union is made of, without their limits."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(inner for part in get_args(annotation) for inner in _alternatives(part))
    return (annotation,)


def _number(kind: type, limits: Iterable[Any]) -> str:
    noun = "a whole number" if kind is int else "a number"
    bounds: dict[str, Any] = {}
    for limit in limits:
        for one in limit.metadata if isinstance(limit, FieldInfo) else [limit]:
            bounds |= {key: getattr(one, key) for key in ("gt", "ge", "lt", "le") if hasattr(one, key)}
    low = f"greater than {bounds['gt']}" if "gt" in bounds else f"of at least {bounds['ge']}" if "ge" in bounds else ""
    high = f"less than {bounds['lt']}" if "lt" in bounds else f"at most {bounds['le']}" if "le" in bounds else ""
    return " ".join([noun, " and ".join(part for part in (low, high) if part)]).strip()


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + ", or " + parts[-1]
