"""The merged model of a run that is divided over processes: each writes whole files, and none holds more than a module.

Nothing is gathered: base and adapter are read from their files. What is compared is each layer, by itself, with what it
said beside its adapter; of logits nobody could hold the model.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from training_hub.backends.shared.disk import disk_errors_explained
from training_hub.backends.shared.model_folder import is_folder, stored_dtype
from training_hub.backends.torch_engine.loading.model import choose_device
from training_hub.backends.torch_engine.loading.quiet import library_bars
from training_hub.backends.torch_engine.merged_weights import MergedWeights
from training_hub.backends.torch_engine.merging import FAR, REPORT, merge, put_tokenizer_beside
from training_hub.backends.torch_engine.parallel import Group
from training_hub.backends.torch_engine.saving.base_weights import OpenBase, Written
from training_hub.backends.torch_engine.saving.file_plan import Kept, parted, writers_of
from training_hub.backends.torch_engine.saving.own_files import OwnFiles, complete, opened_by_all, refuse_problems
from training_hub.errors import TrainingError
from training_hub.folders import write_json
from training_hub.recipe.adapter_folder import origin_of
from training_hub.recipe.sections import Model
from training_hub.types import Console

WHAT = "the merged model"


def merge_together(
    group: Group,
    adapter: Path,
    output: Path,
    console: Console,
    *,
    save_dtype: str,
    trust_remote_code: bool,
    max_shard_size: str,
) -> None:
    """Write the model of `adapter` and the base that it names into the new folder `output`, as `merge` does, byte for
    byte but for the deviation in merge.json, which is told of layers; atomic.

    All processes must call it. Raises TrainingError where a layer says something else once it is merged.
    """
    origin = origin_of(adapter)
    path = str(origin["path"])
    name = save_dtype
    if save_dtype == "auto":
        name = (stored_dtype(Path(path).expanduser()) if is_folder(path) else None) or "float32"
    dtype = getattr(torch, name)
    chosen = Model(path=path, revision=origin["revision"], trust_remote_code=trust_remote_code)
    weights = _weights(chosen, adapter, origin["quantization"], dtype)
    if isinstance(weights, str):
        console.say(f"merge: process 0 merges the whole model, since {weights}")
        how: dict[str, Any] = {"trust_remote_code": trust_remote_code, "max_shard_size": max_shard_size}
        group.on_main(WHAT, lambda: asdict(merge(adapter, output, console, save_dtype=save_dtype, **how)))
        return
    console.say(f"merge: {adapter} into {path}, by {group.world_size} processes")
    written = Written(dtype, is_asked=save_dtype != "auto")
    facts = {"adapter": str(adapter), "base": path, "quantization": origin["quantization"], "dtype": str(dtype)}
    _write(group, weights, written, adapter, output, console, facts, max_shard_size)


def _weights(chosen: Model, adapter: Path, quantization: str, dtype: torch.dtype) -> MergedWeights | str:
    """The merged weights one by one; or why the model must be merged as a whole."""
    if not is_folder(chosen.path):
        return "the base is a name on the hub"
    weights = MergedWeights(chosen, adapter, quantization, dtype, choose_device())
    return weights.reason() or weights


def _write(
    group: Group,
    weights: MergedWeights,
    written: Written,
    adapter: Path,
    output: Path,
    console: Console,
    facts: dict[str, Any],
    max_shard_size: str,
) -> None:
    from transformers.core_model_loading import dot_natural_key

    total = sum(one.numel() for one in weights.model.parameters())
    tensors = {
        name: Kept(tuple(weights.tensors[name].shape), weights.tensors[name].dtype, 0)
        for name in sorted(weights.tensors, key=dot_natural_key)
    }
    formats = {name: written.dtype if one.dtype.is_floating_point else one.dtype for name, one in tensors.items()}
    with (
        disk_errors_explained(WHAT, output, total * written.dtype.itemsize),
        library_bars(),
        weights.base.opened() as came,
        opened_by_all(group, WHAT, output) as (aside, known, give_name),
    ):
        kept = _kept_formats(group, weights, tensors, came, written)
        files = parted(weights.model, tensors, formats | kept, max_shard_size)
        writers = writers_of(tensors, files, [0] * group.world_size)
        mine = {file: parts for file, parts in files.items() if writers[file] == group.rank}

        def make() -> dict[str, Any]:
            own = OwnFiles(weights.model, aside, written, group.rank)
            count = sum(len(parts) for parts in mine.values())
            with console.progress(WHAT, count, "tensors") as advance:
                for file, parts in mine.items():
                    own.begin(file, parts)
                    for name in parts:
                        own.put(name, weights.made(name, came), came)
                        advance(1)
                    own.end()
            return {**own.told(), "deviations": weights.deviations}

        told = group.each(WHAT, make)
        refuse_problems(told, lambda wrong: [f"merge: {name} is not what was written" for name in wrong])
        found = _deviation([one["deviations"] for one in told])
        versions = {name: version(name) for name in ("torch", "transformers", "peft")}

        def finish() -> None:
            complete(weights.model, written.dtype, aside, known, told, total)
            put_tokenizer_beside(adapter, aside)
            write_json(aside / REPORT, {**facts, "deviation": found, "versions": versions})
            give_name()

        group.on_main(WHAT, finish)
    console.say(
        f"merge: written to {output} as {str(written.dtype).removeprefix('torch.')}; of {found['layers']} layers, each "
        f"asked by itself, none deviates by more than {found['relative']:.1e} of its norm ({found['layer']})"
    )


def _kept_formats(
    group: Group, weights: MergedWeights, tensors: dict[str, Kept], came: OpenBase, written: Written
) -> dict[str, torch.dtype]:
    """The formats of weights to which nothing was added and that came in another than is written; each process looks at
    some of them."""
    asked = [name for name, one in tensors.items() if came.may_stay(name, one.shape, written)]

    def look() -> dict[str, str]:
        found = {}
        for name in asked[group.rank :: group.world_size]:
            same = came.unmoved([name], weights.made(name, came), written)
            if same is not None:
                found[name] = str(same.dtype).removeprefix("torch.")
        return found

    return {name: getattr(torch, kind) for some in group.each(WHAT, look) for name, kind in some.items()}


def _deviation(each: list[dict[str, float]]) -> dict[str, Any]:
    """How many layers were asked, and the one that deviates most. Raises TrainingError where that is far."""
    found = {path: deviation for one in each for path, deviation in one.items()}
    layer, relative = max(found.items(), key=lambda one: one[1], default=("", 0.0))
    if not relative <= FAR:
        raise TrainingError(
            f"merge: {layer} deviates by {relative:.1e} of its norm once it is merged: that is another model. It is "
            "not written."
        )
    return {"layers": len(found), "relative": relative, "layer": layer}
