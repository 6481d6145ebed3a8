"""The final model of one that is divided over processes: each writes whole files, and none holds more than such a file.

The weights are gathered one after the other, by all; those of a file stay in the process that writes it, which does so
while the next ones are gathered. Then each process reads its own pieces again and compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training_hub.backends.shared.disk import disk_errors_explained
from training_hub.backends.torch_engine.base_weights import BaseWeights, Written
from training_hub.backends.torch_engine.blank import loading_report, wanted_shapes, weight_files
from training_hub.backends.torch_engine.expert_files import ExpertFiles
from training_hub.backends.torch_engine.export import WholeModel, is_rounding, refuse_nonfinite
from training_hub.backends.torch_engine.layouts.pieces import cut_of, local_of, whole_of
from training_hub.backends.torch_engine.tensor_files import opened
from training_hub.backends.torch_engine.writing import Writer
from training_hub.errors import DiskError, TrainingError
from training_hub.folders import FileFacts, facts_of_file, write_json, write_whole

if TYPE_CHECKING:
    from training_hub.backends.torch_engine.loop import Run

INDEX = "model.safetensors.index.json"
PATTERN = "model{suffix}.safetensors"
ONE_FILE = "1000000TB"


@dataclass
class Made:
    """What a process wrote: facts of its files, the file of each of its tensors, weights that nothing had moved."""

    files: dict[str, FileFacts] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    unmoved: list[str] = field(default_factory=list)
    bytes: int = 0


def export_together(
    run: Run,
    base: BaseWeights,
    written: Written,
    folder: Path,
    beside: Callable[[Path], None],
    max_shard_size: str,
) -> int:
    """Write the model of `run` as `written` into `folder`, atomic, as `export` does; how many files of weights it has.

    All processes must call it. base: what the weights are that nothing has moved. beside: writes what else lies in the
    folder, in process 0. Raises TrainingError where numbers are not finite or the files do not hold the model.
    """
    group, moved, dtype = run.group, run.updater.masters.weights, written.dtype
    exact = {parameter: moved.get(name, local_of(parameter)) for name, parameter in run.model.named_parameters()}
    pieces = {name: exact[one].detach() for name, one in _sources(run.model).items() if one in exact}
    _agree(run, lambda: refuse_nonfinite(pieces))
    shards = planned(run.model, dtype, max_shard_size)
    size = sum(parameter.numel() for parameter in run.model.parameters()) * dtype.itemsize
    tensors = 2 * len(_sources(run.model))
    with (
        disk_errors_explained("the final model", folder, size),
        _opened(run, folder, dtype) as (aside, known, give_name),
        run.console.progress("the final model", total=tensors, unit="tensors") as advance,
    ):
        told = group.gather(_made(run, pieces, shards, base, written, aside, advance))
        if problems := [one["problem"] for one in told if one["problem"]]:
            raise OSError("; ".join(problems))

        def complete() -> None:
            places = {tensor: file for one in told for tensor, file in one["places"].items()}
            known.update({name: FileFacts(**facts) for one in told for name, facts in one["files"].items()})
            if len(shards) > 1:
                total = {"total_parameters": run.model.num_parameters(), "total_size": sum(o["bytes"] for o in told)}
                write_json(aside / INDEX, {"metadata": total, "weight_map": dict(sorted(places.items()))})
            beside(aside)

        group.on_main("the final model", complete)
        unmoved = frozenset(name for one in told for name in one["unmoved"])
        _agree(run, lambda: _refuse_others(run.model, pieces, dtype, unmoved, aside, advance))
        group.on_main("the final model", give_name)
    return len(shards)


def planned(model: Any, dtype: torch.dtype, max_shard_size: str) -> dict[str, list[str]]:
    """The files, and the parameters and buffers that each holds: parted as transformers parts them."""
    from huggingface_hub import split_torch_state_dict_into_shards

    shapes = {
        name: torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device="meta")
        for name, tensor in _sources(model).items()
    }
    found = split_torch_state_dict_into_shards(shapes, filename_pattern=PATTERN, max_shard_size=max_shard_size)
    return {file: list(names) for file, names in found.filename_to_tensors.items()}


def _sources(model: Any) -> dict[str, Tensor]:
    """Parameters, tied ones under the name that transformers saves, and the buffers that are saved."""
    saved = model.state_dict().keys() - set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: tensor for name, tensor in _named(model).items() if name in saved - tied}


def _named(model: Any) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


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
    pieces: Mapping[str, Tensor],
    shards: Mapping[str, list[str]],
    base: BaseWeights,
    written: Written,
    aside: Path,
    advance: Callable[[float], None],
) -> dict[str, Any]:
    """Gather all weights and write this process's files; what came of it, or the problem it met, as plain JSON."""
    rank, size = run.group.rank, run.group.world_size
    sources, writer, done, problem = _sources(run.model), Writer(), Made(), ""
    with base.opened() as came:
        for number, (file, names) in enumerate(shards.items()):
            is_mine = number % size == rank
            if is_mine:
                problem = problem or _problem_of(writer, rank)
            held: dict[str, Tensor] = {}
            for name in names:
                whole = whole_of(pieces[name], sources[name]) if name in pieces else sources[name]
                if is_mine:
                    same = came.unmoved([name], whole, written)
                    cast = whole.to(written.dtype if whole.is_floating_point() else whole.dtype)
                    held[name] = cast.cpu() if same is None else same
                    done.unmoved += [] if same is None else [name]
                advance(1)
            if is_mine and not problem:
                work = partial(_write, run.model, file, held, written.dtype, aside, done, is_first=number == 0)
                writer.start(work)
    problem = problem or _problem_of(writer, rank)
    files = {name: asdict(facts) for name, facts in done.files.items()}
    return {"problem": problem, "files": files, "places": done.places, "unmoved": done.unmoved, "bytes": done.bytes}


def _problem_of(writer: Writer, rank: int) -> str:
    try:
        writer.wait()
    except (OSError, SafetensorError) as error:
        return f"rank {rank}: {error}"
    return ""


def _write(
    model: Any, file: str, held: dict[str, Tensor], dtype: torch.dtype, aside: Path, done: Made, *, is_first: bool
) -> None:
    """Write one file of weights as transformers names and lays them out; beside the first of all what is no weight."""
    if is_first:  # by process 0, in which alone transformers writes a folder; it clears that of others' files first
        own = aside / "first"
        WholeModel(max_shard_size=ONE_FILE).save(model, held, dtype, own)
        (own / "model.safetensors").rename(own / file)
        for path in own.iterdir():
            path.rename(aside / path.name)
        own.rmdir()
    else:
        from transformers.core_model_loading import revert_weight_conversion

        tensors = {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, held).items()}
        save_file(tensors, aside / file, {"format": "pt"})
    with safe_open(aside / file, framework="pt") as made:
        done.places |= dict.fromkeys(made.keys(), file)
    done.files[file] = facts_of_file(aside / file)
    done.bytes += sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def _agree(run: Run, work: Callable[[], None]) -> None:
    """Do `work` in every process; raise TrainingError in all where it raised one in any."""
    problems: list[str] = []
    try:
        work()
    except TrainingError as error:
        problems = error.problems
    if found := [line for some in run.group.gather(problems) for line in some]:
        raise TrainingError(list(dict.fromkeys(found)))


def _refuse_others(
    model: Any,
    pieces: Mapping[str, Tensor],
    dtype: torch.dtype,
    unmoved: Collection[str],
    folder: Path,
    advance: Callable[[float], None],
) -> None:
    """Raise TrainingError where the files hold other names, shapes or numbers than this process has.

    unmoved: what is written as it came, which may be finer than what this process has of it.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with opened(weight_files(folder)) as tensors:
        files = ExpertFiles(tensors, wanted_shapes(model))
        report = loading_report(model, files)
        problems = [f"{kind}: {', '.join(map(str, lines))}" for kind, lines in report.items() if lines]
        for name, piece in pieces.items():
            there = files.read(name, cut_of(parameters[name])) if name in files.shapes else None
            is_same = is_rounding if name in unmoved else torch.equal
            mine = piece if name in unmoved else piece.to(dtype).cpu()
            if there is not None and not is_same(mine, there):
                problems.append(f"{name} is not what was written")
            advance(1)
    if problems:
        raise TrainingError([f"the final model does not load as it was trained: {line}" for line in problems])
