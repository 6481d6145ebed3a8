"""Which weights torchforge's keys begin with, and what they save: model, checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training_hub.frontends.forge.reading import Reading
from training_hub.recipe.names import nearest
from training_hub.recipe.translate import shown
from training_hub.scaling.models import KEPT

ANY_SIZE = "debugmodel"
STEP = re.compile(r"step[-_](\d+)")


def weights(reading: Reading) -> Iterator[str]:
    """model.path and model.tokenizer, and whether the model there is the one that is named."""
    assets, begin = reading.value("model.hf_assets_path"), reading.value("checkpoint.initial_load_path")
    if isinstance(begin, str) and (step := STEP.fullmatch(Path(begin).name)):
        yield from _own_checkpoint(reading, Path(begin), int(step[1]))
        begin = None
    elif begin is not None and not reading.value("checkpoint.initial_load_in_hf"):
        yield (
            f"checkpoint.initial_load_path: {begin} is read in Hugging Face format; torchtitan's own is not. Write "
            "checkpoint.initial_load_in_hf: true"
        )
    if "model.path" in reading.own:
        given = [key for key in ("model.hf_assets_path", "checkpoint.initial_load_path") if reading.is_given(key)]
        yield from (f"model.path: given twice, as {key} and as model.path. Keep one." for key in given)
        return
    path, problem = _of_family(reading) if assets is None and begin is None else (begin or assets, "")
    if problem:
        yield problem
        path = "?"  # that it is not given is not what is wrong
    if path is None or path == "?":
        reading.settings |= {"model.path": path} if path else {}
        return
    key = "checkpoint.initial_load_path" if begin else "model.hf_assets_path"
    reading.give("model.path", path, key)
    if begin and assets and Path(assets).expanduser() != Path(begin).expanduser():
        reading.give("model.tokenizer", assets, "model.hf_assets_path")
    yield from _other_model(reading, Path(path).expanduser())


def _of_family(reading: Reading) -> tuple[str | None, str]:
    """The hub name of model.name and model.flavor, and what is wrong with them."""
    reading.spelled["model.path"] = "model.hf_assets_path"
    shape = KEPT.get(_kept_name(reading))
    if shape is not None:
        return shape.source.removeprefix("huggingface.co/"), ""
    if reading.is_given("model.flavor") or reading.is_given("model.name"):
        problem = _not_kept(reading)
        if problem:
            return None, problem
    return None, ""  # the recipe says that it is not given


def _kept_name(reading: Reading) -> str:
    return f"{reading.value('model.name')}_{reading.value('model.flavor')}".lower().replace("-", "_")


def _not_kept(reading: Reading) -> str:
    """The line for a family or size that nothing is known of; "" where there is none."""
    name, flavor = reading.value("model.name"), reading.value("model.flavor")
    if flavor == ANY_SIZE or _kept_name(reading) in KEPT:
        return ""
    sizes: dict[str, list[str]] = {}
    for kept in KEPT:
        family, _, size = kept.partition("_")
        sizes.setdefault(family, []).append(size.upper().replace("_", "-"))
    if name not in sizes:
        return (
            f"model.name: found {shown(name)}; known: {', '.join(sizes)}. Any other is named by its folder alone: "
            "leave model.name and model.flavor out."
        )
    near = nearest(str(flavor).upper(), sizes[name])
    return f"model.flavor: found {shown(flavor)}; of {name} these are known: {', '.join(sizes[name])}, {ANY_SIZE}." + (
        f" Did you mean {near}?" if near else ""
    )


def _other_model(reading: Reading, folder: Path) -> Iterator[str]:
    """What is wrong where model.name and model.flavor were given and the folder holds another model."""
    if not (reading.is_given("model.name") or reading.is_given("model.flavor")):
        return
    problem = _not_kept(reading)
    if problem:
        yield problem
        return
    config = _config(folder)
    shape = KEPT.get(_kept_name(reading))
    if not config:
        if shape is not None and not folder.exists():
            reading.notes.append(f"model.flavor: {folder} is not here yet, so it is not compared with {shape.name}")
        return
    family = {"llama3": "llama", "qwen3": "qwen3"}.get(reading.value("model.name"), "")
    there = str(config.get("model_type"))
    if not there.startswith(family):
        near = next((name for name, kind in (("llama3", "llama"), ("qwen3", "qwen3")) if there.startswith(kind)), None)
        remedy = f"Write model.name: {near}" if near else "Leave model.name and model.flavor out"
        yield f"model.name: {reading.value('model.name')}, but {folder} holds a model of type {there!r}. {remedy}."
    elif shape is not None and (config.get("num_hidden_layers"), config.get("hidden_size")) != (
        shape.layers,
        shape.width,
    ):
        yield (
            f"model.flavor: {reading.value('model.flavor')} has {shape.layers} layers of width {shape.width}, but "
            f"{folder} holds {config.get('num_hidden_layers')} of width {config.get('hidden_size')}. Write "
            f"model.flavor: {ANY_SIZE}, which is any size."
        )


def _config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; {} where there is none that can be read, which the engine will tell."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _own_checkpoint(reading: Reading, asked_for: Path, step: int) -> Iterator[str]:
    """A checkpoint of this very run is gone on from by itself, if it is the newest; others are refused."""
    folder = Path(reading.value("checkpoint.folder"))
    # The page writes FOLDER/step_500; it is FOLDER/checkpoints/step-500, and FOLDER may be called checkpoints, too.
    is_inside = asked_for.parent.name == "checkpoints" and asked_for.parent.resolve() != folder.resolve()
    run = asked_for.parent.parent if is_inside else asked_for.parent
    key = "checkpoint.initial_load_path"
    if run.resolve() != folder.resolve():
        yield (
            f"{key}: {asked_for} is a checkpoint of the run in {run}. To go on with that run write checkpoint.folder: "
            f"{run}; to begin another with its weights write {key}: {run / 'final'} and initial_load_in_hf: true"
        )
        return
    steps = sorted(
        int(found[1]) for path in (run / "checkpoints").glob("step-*") if (found := STEP.fullmatch(path.name))
    )
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        yield f"{key}: there is no checkpoint of step {step} in {run}; there are {there}."
    elif step != steps[-1]:
        yield (
            f"{key}: step {step} is not the newest checkpoint of {run}, and a run goes on from that, step {steps[-1]}. "
            "Leave it out, or move the newer ones aside."
        )


def saving(reading: Reading) -> Iterator[str]:
    """checkpoint.*: what is saved, and how much of it stays."""
    is_on = reading.value("checkpoint.enable")
    # torchtitan saves by steps alone.
    reading.settings["checkpoint.minutes"] = None
    reading.give(
        "checkpoint.final", bool(is_on and reading.value("checkpoint.last_save_in_hf")), "checkpoint.last_save_in_hf"
    )
    if not is_on:
        reading.give("checkpoint.interval", None, "checkpoint.enable")
        reading.settings["checkpoint.at_epoch"] = False
        asked_for = [key for key in ("interval", "last_save_in_hf") if reading.is_given(f"checkpoint.{key}")]
        if asked_for and reading.is_given("checkpoint.enable"):
            reading.notes.append("checkpoint.enable: false, so nothing of this run is saved but its metrics")
        return
    reading.give("checkpoint.interval", reading.value("checkpoint.interval"), "checkpoint.interval")
    reading.give(
        "checkpoint.at_epoch", not reading.value("checkpoint.last_save_model_only"), "checkpoint.last_save_model_only"
    )
    kept = reading.value("checkpoint.keep_latest_k")
    if kept < 0:
        yield f"checkpoint.keep_latest_k: found {kept}; allowed: at least 0, which keeps all. Write 10"
    else:
        reading.give("checkpoint.keep_last", kept or None, "checkpoint.keep_latest_k")
    if not reading.value("checkpoint.last_save_in_hf") and reading.is_given("checkpoint.export_dtype"):
        yield (
            "checkpoint.export_dtype: would change nothing without checkpoint.last_save_in_hf: true. Write that, or "
            "leave this out."
        )
