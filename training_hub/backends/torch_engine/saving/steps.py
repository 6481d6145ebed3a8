"""Checkpoints of a run: what goes into one, who writes it, and how the run goes on from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from training_hub.backends.shared.disk import disk_errors_explained
from training_hub.backends.shared.errors import broken
from training_hub.backends.torch_engine.layouts.pieces import Cut, cut_of, local_of, whole_cut
from training_hub.backends.torch_engine.parallel import Group
from training_hub.backends.torch_engine.saving.checkpoints import OpenStep, State
from training_hub.backends.torch_engine.saving.tensor_files import Pieces
from training_hub.backends.torch_engine.tensors import nonfinite_tensors
from training_hub.errors import LaunchError
from training_hub.recipe.load import dump

if TYPE_CHECKING:
    from training_hub.backends.torch_engine.run import Run

LOOK_SECONDS = 0.05


def save(run: Run) -> None:
    """Write a checkpoint of the step the run has reached, once; with checkpoint.async_mode, begin to."""
    if run.saved_step == run.step and run.step > 0:
        return
    settle(run)
    if run.layout.is_divided:
        _save_together(run)
    else:
        run.group.on_main(f"saving step {run.step}", lambda: _save_alone(run))
    run.saved_at, run.saved_step = time.monotonic(), run.step


def settle(run: Run) -> None:
    """Wait until what `save` began is written; raise, in every process, what kept it from that."""
    if run.staging is not None:
        run.group.on_main(f"writing step {run.saved_step}", run.writer.wait)
        run.writer.wait()


@contextmanager
def settled(run: Run) -> Iterator[None]:
    """However the block ends, what `save` began is written, or the reason told why not; only a further Ctrl-C does not
    wait for it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LaunchError):  # others are lost, and with them what they have not written
            run.writer.gives_up.set()
        try:
            run.writer.wait()
        except Exception as other:
            run.console.say(f"checkpoint step-{run.saved_step} was not written either: {other}")
        raise


def _save_alone(run: Run) -> None:
    """Write the checkpoint; all processes hold the same, so one does."""
    state, recipe_yaml, protected, staging = _state(run), dump(run.recipe), _protected(run), run.staging
    problems = nonfinite_tensors({**state.weights, **state.optimizer})
    if problems:
        raise broken(problems, run.step, run.recipe, run.checkpoints.steps())

    def write(state: State) -> None:
        size = _bytes(state.weights.values()) + _bytes(state.optimizer.values())
        with disk_errors_explained(f"checkpoint step-{state.step}", run.checkpoints.folder(state.step), size):
            run.checkpoints.save(state, recipe_yaml, protected)

    if staging is None:
        write(state)
        return
    weights, optimizer = staging.copy("model", state.weights), staging.copy("optimizer", state.optimizer)
    copied = replace(state, weights=weights, optimizer=optimizer)

    def write_copies() -> None:
        staging.wait()
        write(copied)

    run.writer.start(write_copies)


def _save_together(run: Run) -> None:
    """Write the checkpoint; each process holds pieces, and writes those that no process before it holds."""
    state, group, staging = _state(run), run.group, run.staging
    problems = nonfinite_tensors({**state.weights, **state.optimizer})
    problems = [line for some in group.gather(problems) for line in some]
    if problems:
        raise broken(problems, run.step, run.recipe, run.checkpoints.steps())
    own = {"model": _pieces(run, state.weights), "optimizer": _pieces(run, state.optimizer)}
    size = sum(_bytes(pieces.tensors.values()) for pieces in own.values())
    explained = partial(disk_errors_explained, f"checkpoint step-{run.step}", run.checkpoints.folder(run.step), size)
    if staging is None:
        with explained():
            run.checkpoints.save_together(state, own, dump(run.recipe), group, _protected(run))
        return
    with explained(), ExitStack() as opened:
        step = opened.enter_context(run.checkpoints.opened_together(state, dump(run.recipe), group, _protected(run)))
        copies = {name: Pieces(staging.copy(name, pieces.tensors), pieces.cuts) for name, pieces in own.items()}
        kept_open = opened.pop_all()

    def write_copies() -> None:
        with explained(), kept_open:
            staging.wait()
            _write_beside(group, step, copies, f"written/{state.step}", run.writer.gives_up)

    run.writer.start(write_copies)


def _write_beside(group: Group, step: OpenStep, own: Mapping[str, Pieces], key: str, gives_up: threading.Event) -> None:
    """Write this process's pieces; in process 0 also wait for those of the others, and give the step its name.

    No collective: the main threads make theirs meanwhile, in an order of their own.
    """
    told: dict[str, Any] = {"problem": f"rank {group.rank} could not write its pieces", "files": {}}
    try:
        told = step.write(own)
    finally:
        group.leave(key, told)
    if group.is_main:
        step.take(_all_told(group, key, step.folder, gives_up))
        step.give_name()


def _all_told(group: Group, key: str, folder: Path, gives_up: threading.Event) -> list[dict[str, Any]]:
    """What each process told of its pieces. Raises LaunchError where nothing more comes: no file has grown for
    comm.timeout_seconds, or the run has lost a process."""
    size, since = -1, time.monotonic()
    while True:
        is_last = gives_up.is_set()
        told = group.left(key)
        if told is not None:
            return told
        now = _bytes_in(folder)
        if now != size:
            size, since = now, time.monotonic()
        if is_last or time.monotonic() - since > group.timeout_seconds:
            raise LaunchError(f"{folder}: not all processes have written their pieces, and no more come.")
        gives_up.wait(LOOK_SECONDS)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


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
    return State(run.step, weights, run.updater.state(), deepcopy(facts))  # it may be written while the run goes on


def _protected(run: Run) -> list[int]:
    best = run.best.step if run.recipe.checkpoint.keep_best else None
    kept = run.watch.kept if run.watch is not None else None
    return [step for step in (best, kept) if step is not None]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _pieces(run: Run, tensors: dict[str, Tensor]) -> Pieces:
    """Those of `tensors` that this process writes: weights by name, or what the optimizer keeps by `name/state`."""
    own, mine, cuts = _spoken_for(run), {}, {}
    for key, tensor in tensors.items():
        name = _weight_of(key, own)
        weight, is_owned = own.get(name), key != name and name in run.updater.owners.names
        cut = whole_cut(tensor.shape) if weight is None or is_owned else cut_of(weight)
        if weight is None:
            is_mine = run.adaptation.is_spoken_for(key)
            if is_mine is None:
                is_mine = run.group.is_main or (run.layout.is_first and run.adaptation.is_here(key))
        else:
            is_mine = not (run.layout.is_copy(name, weight) or cut.is_empty)
        if is_mine:
            mine[key] = tensor
            # Of a divided weight the optimizer also keeps numbers that each process has, such as how many steps.
            cuts[key] = cut if tuple(tensor.shape) == cut.sizes else whole_cut(tensor.shape)
    return Pieces(mine, cuts)


def _spoken_for(run: Run) -> dict[str, Tensor]:
    """The weights of which each piece has a process that writes it; all else process 0 writes."""
    weights = dict(run.model.named_parameters())
    if run.layout.pipeline is not None:
        return weights
    return {name: weight for name, weight in weights.items() if isinstance(weight, DTensor)}


def _weight_of(key: str, names: Any) -> str:
    """The weight that a tensor of a checkpoint is, or belongs to."""
    return key if key in names else key.rpartition("/")[0]


def take_over(run: Run, step: int) -> State:
    """Give weights and optimizer the numbers of checkpoint `step`, as many of them as this process holds; the state."""
    own, owners = _spoken_for(run), run.updater.owners

    def wanted(key: str, shape: tuple[int, ...]) -> Cut | None:
        name = _weight_of(key, own)
        weight = own.get(name)
        is_elsewhere = run.layout.pipeline is not None or run.adaptation.is_spoken_for(key) is not None
        if weight is None and is_elsewhere and not key.startswith("@"):
            return whole_cut(shape) if run.adaptation.is_here(key) else None
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
