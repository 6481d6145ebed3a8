"""The final model of one that is divided over processes: each writes whole files, and none holds more than a weight.

The weights are gathered one after the other, by those that have pieces of them, and each is written at once by the
process whose file it is in. A stage of layers writes the files that are mostly its own, and gets what else is in them
from the others. What OSFT makes of factors, one process makes of each weight. Then each process reads its own pieces
again and compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from training_hub.backends.shared.disk import disk_errors_explained
from training_hub.backends.shared.model_folder import weight_files
from training_hub.backends.torch_engine.layouts.pieces import cut_of
from training_hub.backends.torch_engine.loading.blank import loading_report, wanted_shapes
from training_hub.backends.torch_engine.saving.base_weights import BaseWeights, Written
from training_hub.backends.torch_engine.saving.beside_together import write_beside_together
from training_hub.backends.torch_engine.saving.exact_pieces import Exact
from training_hub.backends.torch_engine.saving.expert_files import ExpertFiles
from training_hub.backends.torch_engine.saving.export import is_rounding
from training_hub.backends.torch_engine.saving.file_plan import FilePlan, planned
from training_hub.backends.torch_engine.saving.own_files import (
    OwnFiles,
    agree,
    complete,
    opened_by_all,
    refuse_problems,
)
from training_hub.backends.torch_engine.saving.tensor_files import opened
from training_hub.backends.torch_engine.tensors import nonfinite_tensors
from training_hub.errors import TrainingError

if TYPE_CHECKING:
    from training_hub.backends.torch_engine.run import Run


def export_together(
    run: Run,
    base: BaseWeights,
    written: Written,
    folder: Path,
    beside: Callable[[Path], None],
    max_shard_size: str,
    total: int,
) -> list[dict[str, Any]]:
    """Write the model of `run` as `written` into `folder`, atomic, as `export` does; what each process made of it.

    All processes must call it. base: what the weights are that nothing has moved. beside: writes texts into the folder,
    in process 0. total: how many numbers the model has. Raises TrainingError where numbers are not finite or
    the files do not hold the model.
    """
    group, exact = run.group, Exact(run)
    agree(group, lambda: _refuse_nonfinite(exact))
    with base.opened() as came:
        plan = planned(run, exact, came, written, max_shard_size)
    weights = sum(len(parts) for parts in plan.files.values()) + len(exact.tensors)
    with (
        disk_errors_explained("the final model", folder, total * written.dtype.itemsize),
        opened_by_all(group, "the final model", folder, {"dtype": str(written.dtype)}) as (aside, known, give_name),
        run.console.progress("the final model", weights, "tensors") as advance,
    ):
        told: list[dict[str, Any]] = group.gather(_made(run, exact, plan, base, written, aside, advance))
        refuse_problems(told, _unlike)

        def finish() -> None:
            complete(run.model, written.dtype, aside, known, told, total)
            beside(aside)

        write_beside_together(group, run.adaptation.beside(), aside)
        group.on_main("the final model", finish)
        unmoved = frozenset(name for one in told for name in one["unmoved"])
        shapes = wanted_shapes(run.model) if run.layout.pipeline is None else dict(base.shapes)
        agree(group, lambda: _refuse_others(exact, shapes, written.dtype, unmoved, aside, advance))
        group.on_main("the final model", give_name)
    return told


def _made(
    run: Run,
    exact: Exact,
    plan: FilePlan,
    base: BaseWeights,
    written: Written,
    aside: Path,
    advance: Callable[[float], None],
) -> dict[str, Any]:
    """Gather all weights and write this process's files; what came of it, as plain JSON."""
    own = OwnFiles(run.model, aside, written, run.group.rank)
    with base.opened() as came:
        for file, parts in plan.files.items():
            is_mine = plan.writers[file] == run.group.rank
            if is_mine:
                own.begin(file, parts)
            for name in parts:
                whole = _brought(run, exact, plan, name, file)
                if whole is not None:
                    own.put(name, whole, came)
                advance(1)
            if is_mine:
                own.end()
    return own.told()


def _brought(run: Run, exact: Exact, plan: FilePlan, name: str, file: str) -> Tensor | None:
    """The tensor, in the process that writes `file`; None in the others, of which all come here."""
    rank, kept, writer = run.group.rank, plan.tensors[name], plan.writers[file]
    sender = plan.sender(name, file)
    if plan.places[rank] == kept.place:
        whole = exact.whole(name)
        if rank != sender:
            return None
        whole = exact.completed(name, whole)
        if rank == writer:
            return whole
        with run.group.explained("a tensor of another stage"):
            dist.send(whole.cpu().contiguous(), writer)
    if rank != writer:
        return None
    whole = torch.empty(kept.shape, dtype=kept.dtype)
    with run.group.explained("a tensor of another stage"):
        dist.recv(whole, sender)
    return whole


def _refuse_nonfinite(exact: Exact) -> None:
    """Raise TrainingError naming each tensor with NaN or infinite numbers, one of which is made at a time."""
    problems = [line for name in exact.tensors for line in nonfinite_tensors({name: exact.present(name)})]
    if problems:
        raise TrainingError([*problems, "Such a model is not written."])


def _refuse_others(
    exact: Exact,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    unmoved: Collection[str],
    folder: Path,
    advance: Callable[[float], None],
) -> None:
    """Raise TrainingError where the files hold other names or shapes than the whole model, or other numbers than this
    process has.

    unmoved: what is written as it came, which may be finer than what this process has of it.
    """
    wrong = []
    with opened(weight_files(folder)) as tensors:
        files = ExpertFiles(tensors, shapes)
        report = loading_report(exact.model, files, shapes)
        problems = [f"{kind}: {', '.join(map(str, lines))}" for kind, lines in report.items() if lines]
        for name, one in exact.tensors.items():
            if name in files.shapes:
                there = files.read(name, cut_of(one))
                mine, is_rounded = exact.present(name), name in unmoved or name in exact.begun
                is_same = is_rounding(mine, there) if is_rounded else _is_equal(mine, there, dtype)
                wrong += [] if is_same else [name]
            advance(1)
    if problems or wrong:
        raise TrainingError([*(f"{FAULTY}: {line}" for line in problems), *_unlike(wrong)])


FAULTY = "the final model does not load as it was trained"


def _unlike(names: Collection[str]) -> list[str]:
    return [f"{FAULTY}: {name} is not what was written" for name in dict.fromkeys(names)]


def _is_equal(mine: Tensor, there: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(mine.to(dtype if mine.is_floating_point() else mine.dtype).cpu(), there)
