"""Which rows torchforge's keys mean: training.dataset and datasets, validation, eval."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training_hub.frontends.forge.c4 import NAMED, stand_in
from training_hub.frontends.forge.machines import world_size
from training_hub.frontends.forge.reading import Reading
from training_hub.recipe.names import nearest
from training_hub.recipe.translate import shown

TEXT = {"data.pretraining": True, "data.streaming": True, "data.format": "text"}
"""Text is joined and cut into blocks of training.seq_len tokens, and read as far as training.steps needs."""

ENTRY = ("path", "name", "split", "data_files", "weight")


def rows(reading: Reading) -> Iterator[str]:
    """data.path and what goes with it."""
    listed, path, name = (reading.value(f"training.{key}") for key in ("datasets", "dataset_path", "dataset"))
    if "data.path" in reading.own:
        given = [
            f"training.{key}" for key in ("dataset", "dataset_path", "datasets") if reading.is_given(f"training.{key}")
        ]
        yield from (f"data.path: given twice, as {key} and as data.path. Keep one." for key in given)
        reading.settings["data.overlong"] = "drop"
        return
    if listed is not None:
        if reading.is_given("training.dataset") or path is not None:
            yield "training.datasets: given beside training.dataset or dataset_path. Keep one."
        yield from _listed(reading, listed)
        return
    found = _named(name, path, reading)
    if found is None:
        yield _unknown("training.dataset", name)
        return
    reading.give("data.path", found, "training.dataset")
    if name in NAMED:
        _text(reading)
        if path is None and NAMED[name].split != "train":
            reading.give("data.split", NAMED[name].split, "training.dataset")
    else:
        reading.settings["data.overlong"] = "drop"  # as torchforge's packing does, but counted and told


def validation(reading: Reading) -> Iterator[str]:
    """data.validation and when it is measured: torchtitan's section `validation`, torchforge's `eval`."""
    listed, is_on = reading.value("eval.datasets"), reading.value("validation.enable")
    idle = [key for key in reading.given if key.startswith("validation.") and key != "validation.enable"]
    if listed is not None and is_on:
        yield "eval.datasets: given beside validation.enable; both name validation rows. Keep one."
    elif listed is not None:
        yield from _evaluation(reading, listed)
    elif is_on:
        yield from _validation(reading)
    elif idle and not is_on:
        yield f"{', '.join(idle)}: would change nothing without validation.enable: true. Write it, or leave them out."
    for key in ("eval.eval_every_n_steps", "eval.max_eval_steps"):
        if reading.is_given(key) and listed is None:
            yield f"{key}: would change nothing without eval.datasets. Write eval.datasets: [{{path: FILE.jsonl}}]"


def _validation(reading: Reading) -> Iterator[str]:
    name, path = reading.value("validation.dataset"), reading.value("validation.dataset_path")
    found = _named(name, path, reading)
    if found is None:
        yield _unknown("validation.dataset", name)
        return
    reading.give("data.validation", found, "validation.dataset")
    reading.give("evaluation.interval", reading.value("validation.freq"), "validation.freq")
    length = reading.value("validation.seq_len")
    if length not in (None, reading.value("training.seq_len")):
        yield (
            f"validation.seq_len: found {length}; validation samples have the length of training.seq_len, which is "
            f"{reading.value('training.seq_len')}. Leave it out."
        )
    steps = reading.value("validation.steps")
    if steps != -1:
        _limit(reading, steps * reading.value("validation.local_batch_size"), "validation.steps")


def _evaluation(reading: Reading, listed: list[Any]) -> Iterator[str]:
    if len(listed) != 1:
        yield (
            f"eval.datasets: found {len(listed)} sets; one is measured. Put the files into one folder, or "
            "watch a second set with evaluation.watch: FILE.jsonl"
        )
        return
    entry, problem = _entry(listed[0], "eval.datasets", 1)
    if problem:
        yield problem
        return
    split = entry.get("split")
    reading.give("data.validation", f"{entry['path']}[{split}]" if split else entry["path"], "eval.datasets")
    every = reading.value("eval.eval_every_n_steps")
    if every is not None:
        reading.give("evaluation.interval", every, "eval.eval_every_n_steps")
    most = reading.value("eval.max_eval_steps")
    if most is not None:
        _limit(reading, most * reading.value("training.local_batch_size"), "eval.max_eval_steps")


def _limit(reading: Reading, samples_of_each: int, key: str) -> None:
    reading.give("data.validation_samples", samples_of_each * world_size(reading)[0], key)


def _named(name: str, path: str | None, reading: Reading) -> str | None:
    """What data.path is for a data set by name; None where nothing can be meant by it."""
    if path is not None:
        return path
    if name in NAMED:
        if NAMED[name].hub:
            return NAMED[name].hub if NAMED[name].split == "train" else f"{NAMED[name].hub}[{NAMED[name].split}]"
        from training_hub.data.cache import cache_folder  # which loads numpy

        file = stand_in(cache_folder(reading.own.get("data.cache_dir")))
        reading.notes.append(f"training.dataset: c4_test is text made by this package, not a part of C4: {file}")
        return str(file)
    is_path = any(sign in name for sign in "/*.") or Path(name).exists()
    return name if is_path else None


def _text(reading: Reading) -> None:
    for path, value in TEXT.items():
        if path not in reading.own:
            reading.give(path, value, "training.dataset")


def _listed(reading: Reading, listed: list[Any]) -> Iterator[str]:
    sources = []
    for number, one in enumerate(listed, start=1):
        entry, problem = _entry(one, "training.datasets", number)
        if problem:
            yield problem
        sources.append(entry)
    if not listed:
        yield "training.datasets: found an empty list. Write [{path: FILE.jsonl}]"
    reading.give("data.path", sources, "training.datasets")
    reading.settings["data.overlong"] = "drop"


def _entry(one: Any, key: str, number: int) -> tuple[dict[str, Any], str]:
    """A source as the recipe has it, of keywords of datasets.load_dataset; and what is wrong with them."""
    if not isinstance(one, Mapping) or not isinstance(one.get("path"), str):
        return {"path": "?"}, f"{key}, entry {number}: found {shown(one)}; allowed: {{path: FILE or hub name, ...}}."
    odd = [name for name in one if name not in ENTRY]
    if odd:
        near = nearest(str(odd[0]), ENTRY)
        hint = f" Did you mean {near}?" if near else ""
        return {"path": "?"}, f"{key}, entry {number}: {odd[0]} is not known; known: {', '.join(ENTRY)}.{hint}"
    path = one["path"]
    if one.get("data_files"):
        path = one["data_files"]  # `path: json, data_files: FILE`, as load_dataset takes local files
        if not isinstance(path, str):
            return {"path": "?"}, f"{key}, entry {number}: data_files: found {shown(path)}; allowed: a file or a glob."
    if one.get("name"):
        path = f"{path}:{one['name']}"
    kept = {name: one[name] for name in ("split", "weight") if one.get(name) is not None}
    return {"path": path, **kept}, ""


def _unknown(key: str, name: str) -> str:
    near = nearest(name, NAMED)
    hint = f" Did you mean {near}?" if near else ""
    return (
        f"{key}: found {name!r}; known: {', '.join(NAMED)}, or a file, folder, glob or hub name (owner/name) of your "
        f"own.{hint}"
    )
