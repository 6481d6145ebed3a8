"""From an SFTConfig, a model and rows to the settings of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from training_hub.frontends.dialects import SHARED, layer_from
from training_hub.frontends.trainer.config import SFTConfig
from training_hub.frontends.trainer.fields import EASYDEL, KNOWN, TRL
from training_hub.frontends.trainer.together import PARTS, Reading, defaults_of
from training_hub.recipe.check import RIVALS
from training_hub.recipe.load import Layer, layer_of, merge

OF_ROWS = ("dataset_text_field", "ids_to_pop_from_dataset")
"""Fields that say how rows are read."""

REQUIRED: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        EASYDEL: {"model.path": "model", "data.path": "train_dataset", "output": "save_directory"},
        TRL: {"model.path": "model", "data.path": "train_dataset", "output": "output_dir"},
    }
)
"""What errors ask for, in the caller's words."""


@dataclass(frozen=True)
class Asked:
    """The settings that a configuration stands for, over the defaults of its style. notes: to be said at the start."""

    layer: Layer
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def whole(self) -> Layer:
        """Settings over defaults, but for a default that a setting excludes."""
        given = self.layer.values
        excluded = {
            other
            for pair in RIVALS
            for mine, other in (pair, reversed(pair))
            if given.get(mine) is not None and other not in given
        }
        kept = {path: value for path, value in self.defaults.items() if path not in excluded}
        return merge(Layer(kept), self.layer)


def asked(config: SFTConfig, style: str) -> Asked:
    """What `config` asks for, in the style of EasyDeL or TRL. What is wrong is in the layer's problems."""
    given = config.given
    extra = layer_of(given.pop("overrides", None), "overrides")
    for name in OF_ROWS:
        given.pop(name, None)
    reading = Reading(style, given, frozenset(given), defaults=defaults_of(style, given))
    problems = [line for part in PARTS for line in part(reading)]
    layer = layer_from([KNOWN[name] for name in reading.given], reading.given)
    both = [path for path in layer.values if path in reading.settings and path not in SHARED]
    problems += [
        f"{path}: given twice, as {reading.spelled[path]} and as {layer.spelled.get(path, path)}. Keep one."
        for path in both
        if layer.values[path] != reading.settings[path]
    ]
    twice = [path for path in extra.values if path in layer.values or path in reading.spelled]
    spelled = {**reading.spelled, **layer.spelled}
    problems += [f"{path}: given twice, as {spelled[path]} and in overrides. Keep one." for path in twice]
    own = Layer({**reading.settings, **layer.values}, {**REQUIRED[style], **spelled}, (*problems, *layer.problems))
    return Asked(merge(own, extra), reading.defaults, tuple(reading.notes))
