"""Checkpoints of a run: what goes into one, who writes it, and how the run goes on from it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from training_hub.backends.shared.disk import disk_errors_explained
from training_hub.backends.shared.errors import broken
from training_hub.backends.torch_engine.checkpoints import State
from training_hub.backends.torch_engine.layouts.pieces import Cut, cut_of, local_of, whole_cut
from training_hub.backends.torch_engine.tensor_files import Pieces
from training_hub.backends.torch_engine.tensors import nonfinite_tensors
from training_hub.recipe.load import dump

if TYPE_CHECKING:
    from training_hub.backends.torch_engine.loop import Run


def save(run: Run) -> None:
    """Write a checkpoint of the step the run has reached, once."""
    if run.saved_step == run.step and run.step > 0:
        return
    if run.layout.is_divided:
        _write_together(run)
    else:
        run.group.on_main(f"saving step {run.step}", lambda: _write_alone(run))
    run.saved_at, run.saved_step = time.monotonic(), run.step


def _write_alone(run: Run) -> None:
    """Write the checkpoint; all processes hold the same, so one does."""
    state = _state(run)
    problems = nonfinite_tensors({**state.weights, **state.optimizer})
    if problems:
        raise broken(problems, run.step, run.recipe, run.checkpoints.steps())
    size = _bytes(state.weights.values()) + _bytes(state.optimizer.values())
    with disk_errors_explained(f"checkpoint step-{run.step}", run.checkpoints.folder(run.step), size):
        run.checkpoints.save(state, dump(run.recipe), _protected(run))


def _write_together(run: Run) -> None:
    """Write the checkpoint; each process holds pieces, and writes those that no process before it holds."""
    state, group = _state(run), run.group
    problems = nonfinite_tensors({**state.weights, **state.optimizer})
    problems = [line for some in group.gather(problems) for line in some]
    if problems:
        raise broken(problems, run.step, run.recipe, run.checkpoints.steps())
    own = {"model": _pieces(run, state.weights), "optimizer": _pieces(run, state.optimizer)}
    size = sum(_bytes(pieces.tensors.values()) for pieces in own.values())
    with disk_errors_explained(f"checkpoint step-{run.step}", run.checkpoints.folder(run.step), size):
        run.checkpoints.save_together(state, own, dump(run.recipe), group, _protected(run))


def _state(run: Run) -> State:
    facts = {
        **run.facts,
        "best": run.best.state(),
        "exam": run.exam.state() if run.exam is not None else None,
        "validation_before": run.validation_before,
        "seed": run.recipe.seed,
        "skipped_in_row": run.skipped_in_row,
        "watch": run.watch.state() if run.watch is not None else None,
    }
    weights = {name: local_of(weight) for name, weight in run.updater.masters.saved().items()}
    return State(run.step, weights, run.updater.state(), facts)


def _protected(run: Run) -> list[int]:
    best = run.best.step if run.recipe.checkpoint.keep_best else None
    kept = run.watch.kept if run.watch is not None else None
    return [step for step in (best, kept) if step is not None]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _pieces(run: Run, tensors: dict[str, Tensor]) -> Pieces:
    """Those of `tensors` that this process writes: weights by name, or what the optimizer keeps by `name/state`."""
    divided, mine, cuts = _divided(run), {}, {}
    for key, tensor in tensors.items():
        name = _weight_of(key, divided)
        weight, is_owned = divided.get(name), key != name and name in run.updater.owners.names
        cut = whole_cut(tensor.shape) if weight is None or is_owned else cut_of(weight)
        is_mine = run.group.is_main if weight is None else not (run.layout.is_copy(weight) or cut.is_empty)
        if is_mine:
            mine[key] = tensor
            # Of a divided weight the optimizer also keeps numbers that each process has, such as how many steps.
            cuts[key] = cut if tuple(tensor.shape) == cut.sizes else whole_cut(tensor.shape)
    return Pieces(mine, cuts)


def _divided(run: Run) -> dict[str, DTensor]:
    return {name: weight for name, weight in run.model.named_parameters() if isinstance(weight, DTensor)}


def _weight_of(key: str, names: Any) -> str:
    """The weight that a tensor of a checkpoint is, or belongs to."""
    return key if key in names else key.rpartition("/")[0]


def take_over(run: Run, step: int) -> State:
    """Give weights and optimizer the numbers of checkpoint `step`, as many of them as this process holds; the state."""
    divided, owners = _divided(run), run.updater.owners

    def wanted(key: str, shape: tuple[int, ...]) -> Cut:
        name = _weight_of(key, divided)
        weight = divided.get(name)
        if key != name and name in owners.names:
            return whole_cut(shape) if name in owners.whole else Cut(shape, (0,) * len(shape), (0,) * len(shape))
        return whole_cut(shape) if weight is None or tuple(weight.shape) != shape else cut_of(weight)

    state = run.checkpoints.load(step, wanted)
    run.updater.masters.load(state.weights)
    run.updater.load_state(state.optimizer)
    return state


def resume(run: Run, step: int) -> None:
    """Put the run where checkpoint `step` was taken; that it is this run's has been seen before."""
    state = take_over(run, step)
    run.step = run.saved_step = state.step
    run.best.load(state.facts.get("best") or {})
    if run.exam is not None:
        run.exam.load(state.facts.get("exam") or {})
    run.validation_before = state.facts.get("validation_before")
    run.skipped_in_row = state.facts.get("skipped_in_row", 0)
    if run.watch is not None:
        run.watch.load(state.facts.get("watch") or {})
