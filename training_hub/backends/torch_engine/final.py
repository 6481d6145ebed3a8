"""The final model: which step it is of, and how it is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from training_hub.backends.shared.outcome import card_of, final_step
from training_hub.backends.torch_engine.export import export
from training_hub.backends.torch_engine.loop import Run
from training_hub.backends.torch_engine.materials import Materials, rows_kept_back, stop_ids
from training_hub.backends.torch_engine.model import LoadedModel
from training_hub.recipe.folder import RunFolder
from training_hub.types import Console


def finish(run: Run, loaded: LoadedModel, materials: Materials, folder: RunFolder, console: Console) -> str | None:
    """Write the final model: the best one where the recipe keeps it, the last within the limit where the watch stopped
    the run; None where it stopped it before there was one."""
    if run.watch is not None and run.watch.reason:
        if run.watch.kept is None:
            return None
        go_back(run, run.watch.kept)
    elif run.recipe.checkpoint.keep_best and run.best.step not in (None, run.step):
        console.say(
            f"final: taking step {run.best.step}, with the best {run.best.settings.best_metric} {run.best.value}"
        )
        go_back(run, final_step(run))
    if run.exam is not None:
        run.exam.show(final_step(run))
    dtype = saved_dtype(run, loaded)
    name, weights = str(dtype).removeprefix("torch."), list(run.model.parameters())
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    card = card_of(run, folder, name, sum(weight.numel() for weight in weights), trained)
    difference = write_model(run, loaded, materials, folder.final, card)
    console.say(
        f"final: {folder.final} ({name}), loaded again and equal; logits differ from "
        f"training by at most {difference:.1e}"
    )
    run.adaptation.further(folder.final, rows_kept_back(materials), console)
    return str(folder.final)


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
) -> float:
    """Write the model as it stands into `folder`; the largest difference of logits once it is loaded again."""
    dtype = saved_dtype(run, loaded)
    with run.updater.averaged():
        return export(
            run.model,
            run.adaptation.export(run.updater.masters.all_exact(), dtype),
            dtype,
            folder,
            materials.tokenizer.hf,
            materials.template.source if materials.template else None,
            stop_ids(materials),
            trust_remote_code=run.recipe.model.trust_remote_code,
            beside=run.adaptation.beside(),
            files=run.adaptation.files,
            documents=documents,
        )


def go_back(run: Run, step: int) -> None:
    """Take the weights of checkpoint `step`, and what the optimizer needs to average them."""
    state = run.checkpoints.load(step)
    run.updater.masters.load(state.weights)
    run.updater.load_state(state.optimizer)
