"""The final model of one that is divided over processes: each writes whole files, and none holds more than a weight.

The weights are gathered one after the other, by those that have pieces of them, and each is written at once by the
process whose file it is in. A stage of layers writes the files that are mostly its own, and gets what else is in them
from the others. What OSFT makes of factors, one process makes of each weight. Then each process reads its own pieces
again and compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training_hub.backends.shared.disk import disk_errors_explained
from training_hub.backends.torch_engine.layouts.pieces import cut_of
from training_hub.backends.torch_engine.loading.blank import loading_report, wanted_shapes, weight_files
from training_hub.backends.torch_engine.saving.base_weights import BaseWeights, OpenBase, Written
from training_hub.backends.torch_engine.saving.exact_pieces import Exact
from training_hub.backends.torch_engine.saving.expert_files import ExpertFiles
from training_hub.backends.torch_engine.saving.export import WholeModel, is_rounding
from training_hub.backends.torch_engine.saving.file_plan import FilePlan, planned
from training_hub.backends.torch_engine.saving.final_file import FinalFile, bytes_of
from training_hub.backends.torch_engine.saving.tensor_files import opened
from training_hub.backends.torch_engine.saving.writing import Writer
from training_hub.backends.torch_engine.tensors import nonfinite_tensors
from training_hub.errors import DiskError, TrainingError
from training_hub.folders import FileFacts, facts_of_file, write_json, write_whole

if TYPE_CHECKING:
    from training_hub.backends.torch_engine.run import Run

INDEX = "model.safetensors.index.json"
ONE_FILE = "1000000TB"


@dataclass
class Made:
    """What a process wrote: facts of its files, the file of each of its tensors, weights that nothing had moved, those
    that came out otherwise; bytes: of all its tensors, and the most that it held of them at a time."""

    files: dict[str, FileFacts] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    unmoved: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    bytes: int = 0
    most_held: int = 0


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

    All processes must call it. base: what the weights are that nothing has moved. beside: writes what else lies in the
    folder, in process 0. total: how many numbers the model has. Raises TrainingError where numbers are not finite or
    the files do not hold the model.
    """
    group, exact = run.group, Exact(run)
    _agree(run, lambda: _refuse_nonfinite(exact))
    with base.opened() as came:
        plan = planned(run, exact, came, written, max_shard_size)
    weights = sum(len(parts) for parts in plan.files.values()) + len(exact.tensors)
    with (
        disk_errors_explained("the final model", folder, total * written.dtype.itemsize),
        _opened(run, folder, written.dtype) as (aside, known, give_name),
        run.console.progress("the final model", weights, "tensors") as advance,
    ):
        told: list[dict[str, Any]] = group.gather(_made(run, exact, plan, base, written, aside, advance))
        if problems := [one["problem"] for one in told if one["problem"]]:
            raise OSError("; ".join(problems))
        if wrong := [name for one in told for name in one["wrong"]]:
            raise TrainingError(_unlike(wrong))

        def complete() -> None:
            places = {tensor: file for one in told for tensor, file in one["places"].items()}
            known.update({name: FileFacts(**facts) for one in told for name, facts in one["files"].items()})
            if len(plan.files) > 1:
                about = {"total_parameters": total, "total_size": sum(one["bytes"] for one in told)}
                write_json(aside / INDEX, {"metadata": about, "weight_map": dict(sorted(places.items()))})
            _write_beside(run.model, written.dtype, aside)
            beside(aside)

        group.on_main("the final model", complete)
        unmoved = frozenset(name for one in told for name in one["unmoved"])
        shapes = wanted_shapes(run.model) if run.layout.pipeline is None else dict(base.shapes)
        _agree(run, lambda: _refuse_others(exact, shapes, written.dtype, unmoved, aside, advance))
        group.on_main("the final model", give_name)
    return told


@contextmanager
def _opened(
    run: Run, folder: Path, dtype: torch.dtype
) -> Iterator[tuple[Path, dict[str, FileFacts], Callable[[], None]]]:
    """A folder aside that all write into, what its manifest will say of their files, and what gives it its name."""
    known: dict[str, FileFacts] = {}
    with ExitStack() as stack:

        def begin() -> str:
            if not folder.parent.is_dir():
                raise DiskError(f"{folder.parent} is gone; it was there when the run began. The model is not written.")
            return str(stack.enter_context(write_whole(folder, {"dtype": str(dtype)}, replace=True, known=known)))

        yield Path(run.group.on_main("a folder for the final model", begin)), known, stack.close


def _made(
    run: Run,
    exact: Exact,
    plan: FilePlan,
    base: BaseWeights,
    written: Written,
    aside: Path,
    advance: Callable[[float], None],
) -> dict[str, Any]:
    """Gather all weights and write this process's files; what came of it, or the problem it met, as plain JSON."""
    rank, writer, done, problem = run.group.rank, Writer(), Made(), ""
    with base.opened() as came:
        for file, parts in plan.files.items():
            made: FinalFile | None = None
            if plan.writers[file] == rank:
                with _noted(rank) as met:
                    made = FinalFile(run.model, aside / file, parts)
                problem = problem or met.problem
            for name in parts:
                whole = _brought(run, exact, plan, name, file)
                if whole is not None and made is not None and not problem:
                    with _noted(rank) as met:
                        _put(made, name, whole, came, written, done)
                    problem = met.problem
                advance(1)
            if made is not None:
                problem = problem or _problem_of(writer, rank)
                if not problem:
                    writer.start(partial(_finish, made, done))
    problem = problem or _problem_of(writer, rank)
    return {"problem": problem, **asdict(done)}


def _put(made: FinalFile, name: str, whole: Tensor, came: OpenBase, written: Written, done: Made) -> None:
    same = came.unmoved([name], whole, written)
    tensor = whole.to(written.dtype if whole.is_floating_point() else whole.dtype) if same is None else same
    done.unmoved += [] if same is None else [name]
    done.most_held = max(done.most_held, made.held + bytes_of(whole) + (0 if tensor is whole else bytes_of(tensor)))
    done.bytes += made.put(name, tensor)


@dataclass
class _Noted:
    """The problem that was met; "": none."""

    problem: str = ""


@contextmanager
def _noted(rank: int) -> Iterator[_Noted]:
    """Within, an error of the disk is noted, since other processes count on this one to go on gathering."""
    found = _Noted()
    try:
        yield found
    except (OSError, SafetensorError) as error:
        found.problem = f"rank {rank}: {error}"


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


def _problem_of(writer: Writer, rank: int) -> str:
    with _noted(rank) as met:
        writer.wait()
    return met.problem


def _finish(made: FinalFile, done: Made) -> None:
    """Look what the file holds, and what the manifest is to say of it."""
    done.wrong += made.finish()
    with safe_open(made.path, framework="pt") as file:
        done.places |= dict.fromkeys(file.keys(), made.path.name)
    done.files[made.path.name] = facts_of_file(made.path)


def _write_beside(model: Any, dtype: torch.dtype, aside: Path) -> None:
    """What transformers writes of a model beside its weights."""
    own = aside / "beside"
    WholeModel(max_shard_size=ONE_FILE).save(model, {"nothing": torch.zeros(1)}, dtype, own)
    (own / "model.safetensors").unlink()
    for path in own.iterdir():
        path.rename(aside / path.name)
    own.rmdir()


def _agree(run: Run, work: Callable[[], None]) -> None:
    """Do `work` in every process; raise TrainingError in all where it raised one in any."""
    problems: list[str] = []
    try:
        work()
    except TrainingError as error:
        problems = error.problems
    if found := [line for some in run.group.gather(problems) for line in some]:
        raise TrainingError(list(dict.fromkeys(found)))


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
