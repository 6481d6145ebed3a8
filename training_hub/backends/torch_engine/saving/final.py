"""The final model: which step it is of, and how it is written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from training_hub.backends.shared.outcome import card_of, final_step
from training_hub.backends.torch_engine.layouts.pieces import local_of, whole_of
from training_hub.backends.torch_engine.loading.model import LoadedModel
from training_hub.backends.torch_engine.loading.quiet import library_bars
from training_hub.backends.torch_engine.loading.rounding import RoundingModel
from training_hub.backends.torch_engine.materials import Materials, rows_kept_back, stop_ids
from training_hub.backends.torch_engine.parallel import ALONE
from training_hub.backends.torch_engine.run import Run
from training_hub.backends.torch_engine.saving.base_weights import BaseWeights, Written
from training_hub.backends.torch_engine.saving.export import (
    WholeModel,
    export,
    probed_logits,
    put_beside,
    refuse_nonfinite_logits,
)
from training_hub.backends.torch_engine.saving.export_together import export_together
from training_hub.backends.torch_engine.saving.model_files import ModelFiles
from training_hub.backends.torch_engine.saving.steps import take_over
from training_hub.recipe.folder import RunFolder
from training_hub.types import Console


def finish(run: Run, loaded: LoadedModel, materials: Materials, folder: RunFolder, console: Console) -> str | None:
    """Write the final model, whose folder it gives: the best one where the recipe keeps it, the last within the limit
    where the watch stopped the run; None where it stopped it before there was one. Of a model that is divided all
    processes write it, of any other, and of an adapter, process 0 does."""

    def write(held: Held | None = None) -> str:
        return _write(run, loaded, materials, folder, console, held)

    what = "the final model"
    if not run.layout.is_divided:
        return run.group.on_main(what, lambda: write() if take_chosen_step(run, console) else None)
    if not take_chosen_step(run, console):
        return None
    if run.adaptation.files is None:
        return _write_together(run, loaded, materials, folder, console)
    held = gather_adapter(run)
    path: str = run.group.on_main(what, lambda: write(held))
    run.adaptation.further(Path(path), rows_kept_back(materials), console, run.group)
    return path


def take_chosen_step(run: Run, console: Console) -> bool:
    """Go back to the step that the final model is of; False where there is none."""
    if run.watch is not None and run.watch.reason:
        if run.watch.kept is None:
            return False
        go_back(run, run.watch.kept)
    elif run.recipe.checkpoint.keep_best and run.best.step not in (None, run.step):
        console.say(
            f"final: taking step {run.best.step}, with the best {run.best.settings.best_metric} {run.best.value}"
        )
        go_back(run, final_step(run))
    return True


def _write(
    run: Run, loaded: LoadedModel, materials: Materials, folder: RunFolder, console: Console, held: Held | None
) -> str:
    _show_answers(run)
    dtype = saved_dtype(run, loaded)
    numbers = held.numbers if held is not None else numbers_of(run)
    difference = write_model(run, loaded, materials, folder.final, _card(run, folder, dtype, numbers), held)
    same = f"; logits differ from training by at most {difference:.1e}" if held is None else ""
    console.say(f"final: {folder.final} ({_named(dtype)}), loaded again and equal{same}")
    if held is None:
        run.adaptation.further(folder.final, rows_kept_back(materials), console, ALONE)
    return str(folder.final)


def _write_together(run: Run, loaded: LoadedModel, materials: Materials, folder: RunFolder, console: Console) -> str:
    """The same by all processes of a divided model, none of which ever holds more of it than a weight."""
    dtype, numbers = saved_dtype(run, loaded), numbers_of(run)
    template = materials.template.source if materials.template else None

    def beside(aside: Path) -> None:
        _show_answers(run)
        documents = _card(run, folder, dtype, numbers)
        put_beside(aside, materials.tokenizer.hf, template, stop_ids(materials), {}, documents)

    with run.updater.averaged(), library_bars():
        refuse_nonfinite_logits(float(probed_logits(run.model, run.device).abs().max()))
        run.layout.let_go(run.model)
        base, written = _readable(loaded.base, console), _written(run, loaded)
        size = run.recipe.checkpoint.max_shard_size
        made = export_together(run, base, written, folder.final, beside, size, numbers[0])
    count = sum(len(one["files"]) for one in made)
    files = "1 file" if count == 1 else f"{count} files"
    most = max(one["most_held"] for one in made)
    console.say(
        f"final: {folder.final} ({_named(dtype)}), in {files} of weights, of which no process held more than {most:,} "
        "bytes at a time; each read its own again: equal"
    )
    return str(folder.final)


def _show_answers(run: Run) -> None:
    if run.exam is not None:
        run.exam.show(final_step(run))


def _card(run: Run, folder: RunFolder, dtype: torch.dtype, numbers: tuple[int, int]) -> dict[str, bytes]:
    return card_of(run, folder, _named(dtype), *numbers)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def saved_dtype(run: Run, loaded: LoadedModel) -> torch.dtype:
    """The number format of the final model."""
    wanted, files = run.recipe.model.save_dtype, run.adaptation.files
    if wanted != "auto":
        return getattr(torch, wanted)
    return (files.dtype if files is not None else None) or loaded.original_dtype


def write_model(
    run: Run,
    loaded: LoadedModel,
    materials: Materials,
    folder: Path,
    documents: Mapping[str, bytes] | None = None,
    held: Held | None = None,
) -> float:
    """Write the model as it stands into `folder`; the largest difference of logits once it is loaded again.

    held: its weights and what it says, where it is divided and this process cannot ask it.
    """
    written = _written(run, loaded)
    with nullcontext() if held is not None else run.updater.averaged():
        if held is None:
            with _readable(loaded.base, run.console).opened() as came:
                tensors = run.adaptation.export(run.updater.masters.all_exact(), written, came)
        else:
            tensors = run.adaptation.export(held.weights, written)
        return export(
            run.model,
            tensors,
            written.dtype,
            folder,
            materials.tokenizer.hf,
            materials.template.source if materials.template else None,
            stop_ids(materials),
            beside=run.adaptation.beside(),
            files=_files(run),
            documents=documents,
            said=held.logits if held is not None else None,
        )


def _written(run: Run, loaded: LoadedModel) -> Written:
    return Written(saved_dtype(run, loaded), is_asked=run.recipe.model.save_dtype != "auto")


def _readable(base: BaseWeights, console: Console) -> BaseWeights:
    """The weights as they came, as far as they can still be read: a run may outlive the files that it began from."""
    try:
        with base.opened():
            return base
    except (OSError, SafetensorError) as error:
        console.say(
            f"final: the files of the model that the run began from cannot be read any more ({error}), so weights that "
            "nothing has moved are written as they are in memory, in the format of training"
        )
        return replace(base, files=())


def _files(run: Run) -> ModelFiles:
    """How the model is written and read again. An adapter is read beside the base in memory, which rounds already."""
    whole = WholeModel(run.recipe.model.trust_remote_code, run.recipe.checkpoint.max_shard_size)
    if run.recipe.qat.weight_dtype is not None:
        return run.adaptation.files or RoundingModel(whole, run.recipe.qat)
    return run.adaptation.files or whole


@dataclass(frozen=True)
class Held:
    """What is gathered of an adapter beside a divided model to be written: weights by parameter name, logits of a few
    tokens, and how many numbers there are, in all and of what trains."""

    weights: dict[str, Tensor]
    logits: Tensor
    numbers: tuple[int, int]


def numbers_of(run: Run) -> tuple[int, int]:
    """How many numbers the weights have in all, and how many of them train. Of stages all must ask."""
    own = [weight for name, weight in run.model.named_parameters() if not run.layout.is_second(name)]
    sizes = [weight.numel() for weight in own], [weight.numel() for weight in own if weight.requires_grad]
    total, trained = run.layout.sum_over_stages(torch.tensor([sum(some) for some in sizes])).tolist()
    return total, trained


@torch.no_grad()
def gather_adapter(run: Run) -> Held:
    """What trains of a divided model, whole in the memory of process 0; the others keep none. All must call it."""
    masters, weights = run.updater.masters, {}
    with run.updater.averaged():
        for name, parameter in run.model.named_parameters():
            if not parameter.requires_grad or run.layout.is_second(name):
                continue
            piece = masters.exact(name) if name in masters.weights else parameter
            whole = whole_of(local_of(piece), parameter)
            if run.layout.is_first:
                weights[name] = whole.cpu()
        logits = probed_logits(run.model, run.device)
        run.layout.let_go(run.model)
    return Held(run.layout.collected(weights, set())[0], logits, numbers_of(run))


def go_back(run: Run, step: int) -> None:
    """Take the weights of checkpoint `step`, and what the optimizer needs to average them."""
    take_over(run, step)
