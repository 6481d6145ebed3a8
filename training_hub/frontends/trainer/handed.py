"""What a trainer was handed over, as a layer of settings and the live objects that stand for some of them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_hub.errors import HubError, RecipeError
from training_hub.frontends.autotrain.run import TrainedModel
from training_hub.frontends.dialects import recipe_from
from training_hub.frontends.trainer.adapters import settings_of
from training_hub.frontends.trainer.callbacks import problems_of as callback_problems
from training_hub.frontends.trainer.config import SFTConfig
from training_hub.frontends.trainer.loading import ModelHandle, bits_of
from training_hub.frontends.trainer.meaning import asked
from training_hub.recipe import Recipe
from training_hub.recipe.evaluation import LIVE
from training_hub.recipe.load import Layer, merge
from training_hub.recipe.translate import shown

if TYPE_CHECKING:
    from training_hub.frontends.trainer.rows import RowSettings

IN_MEMORY = "(in memory)"


@dataclass(frozen=True)
class Things:
    """The arguments of SFTTrainer. style: whose defaults hold, EasyDeL's or TRL's."""

    style: str
    config: SFTConfig
    model: Any = None
    train_dataset: Any = None
    eval_dataset: Any = None
    processing_class: Any = None
    formatting_func: Callable[[Any], Any] | None = None
    data_collator: Callable[[Any], Any] | None = None
    compute_metrics: Callable[..., Any] | None = None
    callbacks: tuple[Any, ...] = ()
    peft_config: Any = None
    quantization_config: Any = None


@dataclass(frozen=True)
class Handed:
    """Settings, live objects by their names in `backends.Given`, lines to say at the start, and how rows are read."""

    layer: Layer
    live: dict[str, Any]
    notes: tuple[str, ...]
    rows: RowSettings

    def recipe(self) -> Recipe:
        """The recipe. Raises RecipeError that lists everything that is wrong."""
        stands_for = {"rows": "data.path", "validation_rows": "data.validation"}
        live = [path for name, path in stands_for.items() if name in self.live]
        return recipe_from(self.layer, algorithm="sft", backend="torch", live=live)


def handed(things: Things, problems: list[str]) -> Handed:
    """What `things` ask for. What is wrong with them is, after `problems`, among the problems of the layer."""
    from training_hub.frontends.trainer.rows import RowSettings  # which loads numpy

    given = things.config.given
    rows = RowSettings(
        given.get("dataset_text_field"),
        given.get("ids_to_pop_from_dataset", ()),
        things.formatting_func,
        things.data_collator,
        given.get("dataset_batch_size", RowSettings.at_once),
    )
    wanted = asked(things.config, things.style)
    live: dict[str, Any] = {}
    of_model = _model(things, live)
    layers = (of_model, _rows(things, rows, live), _metrics(things.compute_metrics))
    twice = [path for path in of_model.values if path in wanted.layer.spelled and path in wanted.layer.values]
    found = [
        *problems,
        *(_twice(path, of_model, wanted.layer) for path in twice),
        *callback_problems(things.callbacks),
        *_without_rows(things),
    ]
    return Handed(merge(*layers, wanted.whole, Layer(problems=tuple(found))), live, wanted.notes, rows)


def own_folder(model: Any) -> str:
    """The folder of a run that names none: after its model, as TRL has it."""
    name = getattr(model, "path", None) or getattr(getattr(model, "config", None), "_name_or_path", "") or model
    return f"{Path(str(name)).name}-SFT" if isinstance(name, str | os.PathLike) else "model-SFT"


def _model(things: Things, live: dict[str, Any]) -> Layer:
    """What the model, its tokenizer and its adapter say; a model and a tokenizer in memory go to `live`."""
    model, spelled = things.model, {"model.path": "model"}
    values: dict[str, Any] = {}
    problems: list[str] = []
    if isinstance(model, TrainedModel):
        values["model.path"] = str(model.result.model_path)
    elif isinstance(model, ModelHandle):
        values, spelled = {"model.path": model.path, **model.settings}, {**spelled, **model.spelled}
    elif isinstance(model, str | os.PathLike):
        values["model.path"] = os.fspath(model)
    elif model is not None:
        values["model.path"], live["model"] = IN_MEMORY, model
        if hasattr(model, "peft_config"):
            problems.append("model: it has an adapter already. Hand over its base, and peft_config for a new adapter.")
    problems += _tokenizer(things.processing_class, values, live)
    for name, config, read in (
        ("peft_config", things.peft_config, settings_of),
        ("quantization_config", things.quantization_config, lambda one: {"model.quantization": bits_of(one)}),
    ):
        try:
            found = {} if config is None else read(config)
        except RecipeError as error:
            problems += error.problems
            continue
        values |= found
        spelled |= dict.fromkeys(found, name)
    return Layer(values, spelled, tuple(problems))


def _tokenizer(given: Any, values: dict[str, Any], live: dict[str, Any]) -> Iterator[str]:
    if isinstance(given, str | os.PathLike):
        values["model.tokenizer"] = os.fspath(given)
    elif given is not None:
        live["tokenizer"] = given
    elif "model" in live:
        home = getattr(getattr(live["model"], "config", None), "_name_or_path", "")
        if home:
            values["model.tokenizer"] = home
        else:
            yield "processing_class: not given; a model in memory needs its tokenizer. Write processing_class=TOKENIZER"


def _rows(things: Things, asked_of_rows: RowSettings, live: dict[str, Any]) -> Layer:
    """What the rows say of themselves; those in memory go to `live`."""
    from training_hub.frontends.trainer.rows import rows_of

    values: dict[str, Any] = {}
    problems: list[str] = []
    try:
        if things.train_dataset is not None:
            found = rows_of(things.train_dataset, asked_of_rows)
            values |= found.settings
            problems += _mask_problems(things.config, found.is_conversation)
            if found.live is not None:
                live["rows"] = found.live
    except HubError as error:
        problems += error.problems
        values["data.path"] = "?"  # that it is not given is not what is wrong
    try:
        values |= _validation(things.eval_dataset, asked_of_rows, live)
    except HubError as error:
        problems += error.problems
    return Layer(values, {}, tuple(problems))


def _validation(given: Any, asked_of_rows: RowSettings, live: dict[str, Any]) -> dict[str, Any]:
    from training_hub.frontends.trainer.rows import rows_of

    if given is None:
        return {}
    if isinstance(given, Mapping):
        sets = {str(name): rows_of(one, asked_of_rows, f"eval_dataset[{name!r}]") for name, one in given.items()}
        named = [name for name, one in sets.items() if one.live is None]
        if named or not sets:
            raise RecipeError(
                f"eval_dataset: found {', '.join(named) or 'an empty dictionary'}; of several sets each is rows in "
                "memory. Write load_dataset(...)."
            )
        live["validation_rows"] = {name: one.live for name, one in sets.items()}
        return {}
    found = rows_of(given, asked_of_rows, "eval_dataset", "data.validation")
    if found.live is None:
        return {"data.validation": found.settings["data.validation"]}
    live["validation_rows"] = found.live
    return {}


def _metrics(function: Any) -> Layer:
    """The settings that compute_metrics stands for: here it is asked about two texts."""
    if function is None:
        return Layer()
    try:
        inspect.signature(function).bind("answer", "reference")
    except (TypeError, ValueError):  # no function, or one of other arguments
        line = (
            f"compute_metrics: found {shown(function)}; the logits of a whole set, which TRL hands to it, never exist "
            "here. Give a function of two texts, (answer, reference), that gives a number: answers to eval_dataset are "
            "generated and compared."
        )
        return Layer(problems=(line,))
    name = getattr(function, "__name__", type(function).__name__)
    return Layer({"evaluation.generate": True, "evaluation.metrics": [f"{LIVE}{name}"]})


def _mask_problems(config: SFTConfig, is_conversation: bool | None) -> Iterator[str]:
    if config.given.get("assistant_only_loss") and is_conversation is False:
        yield (
            "assistant_only_loss: True, but the rows of train_dataset are text, in which nobody is the assistant. "
            "Leave it out, or hand over messages."
        )


def _without_rows(things: Things) -> Iterator[str]:
    if things.eval_dataset is None and things.config.given.get("do_eval"):
        yield "do_eval: True, but eval_dataset is not given. Hand it over, or leave do_eval out."


def _twice(path: str, of_model: Layer, of_arguments: Layer) -> str:
    first, second = of_model.spelled.get(path, path), of_arguments.spelled.get(path, path)
    return f"{path}: given twice, as {first} of the model and as {second}. Keep one."
