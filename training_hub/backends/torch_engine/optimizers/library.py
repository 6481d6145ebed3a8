"""Optimizers that other packages bring, and torch's Muon with AdamW beside it: what builds each and what it keeps.

Each moves the same float32 masters as torch's own optimizers do; none is imported before a run asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from training_hub.backends.torch_engine.optimizers.both import Both
from training_hub.recipe.sections import Optimizer as OptimizerSettings

Groups = list[dict[str, Any]]
Shape = tuple[int, ...]

LEAST_8BIT, BLOCK_8BIT, CODE_BYTES = 4096, 256, 1024
"""bitsandbytes 0.50: smaller weights keep float32 moments; numbers that share a scale; bytes of one table of codes."""


@dataclass(frozen=True)
class Kind:
    """One optimizer. package: what must be installed, by its name to import; "" for torch.

    build: groups, settings -> optimizer. A group says of its weights, as `is_matrix`, whether they are matrices inside
    the model's blocks; only where `tells_matrices`. kept: bytes that stay for a weight of a shape, given the settings,
    the bytes of a number, and whether it is such a matrix.
    """

    package: str
    build: Callable[[Groups, OptimizerSettings], torch.optim.Optimizer]
    kept: Callable[[Shape, OptimizerSettings, int, bool], int]
    tells_matrices: bool = False


def problems(settings: OptimizerSettings) -> list[str]:
    """Why `settings.name` cannot be had on this machine."""
    kind = KINDS.get(settings.name)
    if kind is None:
        return []
    lacking = [name for name in _packages(kind) if find_spec(name) is None]
    return [
        f"optimizer.name: {settings.name} needs {name}, which is not installed: pip install "
        "'training-hub[optimizers]', or write optimizer.name: AdamW."
        for name in lacking
    ]


def _packages(kind: Kind) -> list[str]:
    # galore_torch imports bitsandbytes whichever of its optimizers is wanted.
    needed = [kind.package, *(["bitsandbytes"] if kind.package == "galore_torch" else [])]
    return [name for name in needed if name]


def table_names(model: nn.Module) -> frozenset[str]:
    """Names of the matrices with one row for each token or position: embeddings and the head. Their rows are apart."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    ids = {id(table) for table in (*tables, getattr(head, "weight", None))}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in ids)


def kept_bytes(weights: Iterable[Tensor], settings: OptimizerSettings, width: int, tables: Collection[int] = ()) -> int:
    """Bytes that stay from step to step. tables: `id` of the weights that are no matrices inside the blocks."""
    kept = KINDS[settings.name].kept
    return sum(kept(tuple(w.shape), settings, width, w.dim() == 2 and id(w) not in tables) for w in weights)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Any:
    """Within, the weights of a schedule-free optimizer are the averaged ones; after it they are as before, bit for
    bit."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    before = [weight.detach().clone() for weight in weights]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, own in zip(weights, before, strict=True):
                weight.copy_(own)
        for group in optimizer.param_groups:  # `train()` would compute them back, and round
            group["train_mode"] = True


def is_averaging(optimizer: torch.optim.Optimizer) -> bool:
    """Whether what it gives out is the average of its steps: whether it is schedule-free."""
    return all("train_mode" in group for group in optimizer.param_groups)


def _betas(settings: OptimizerSettings) -> dict[str, Any]:
    return {"lr": settings.lr, "betas": (settings.beta1, settings.beta2)}


def _adam(settings: OptimizerSettings) -> dict[str, Any]:
    return {**_betas(settings), "eps": settings.eps}


def _lion(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    from lion_pytorch import Lion

    return Lion(groups, **_betas(settings))


def _schedule_free(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    made = AdamWScheduleFree(groups, **_adam(settings))
    made.train()
    return made


def _muon(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    matrices = [group for group in groups if group["is_matrix"]]
    others = [group for group in groups if not group["is_matrix"]]
    momentum = 0.95 if settings.momentum is None else settings.momentum
    made: list[torch.optim.Optimizer] = []
    if matrices:
        # Scaled so that one learning rate and decay suit both: Liu et al. 2025, arXiv:2502.16982, section 2.2.
        options = {"lr": settings.lr, "momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
        made.append(torch.optim.Muon(matrices, nesterov=momentum > 0, **options))  # type: ignore[arg-type]
    if others:
        fused = all(weight.dtype != torch.float64 for group in others for weight in group["params"])
        made.append(torch.optim.AdamW(others, fused=fused, **_adam(settings)))
    return Both(made)


def _galore(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as below
    from galore_torch import GaLoreAdamW

    projected = {
        "rank": settings.galore_rank,
        "update_proj_gap": settings.galore_interval,
        "scale": settings.galore_scale,
        "proj_type": "std",
    }
    made = [{**group, **(projected if group["is_matrix"] else {})} for group in groups]
    return GaLoreAdamW(made, no_deprecation_warning=True, **_adam(settings))


def _bitsandbytes(name: str, *, has_eps: bool = True) -> Callable[[Groups, OptimizerSettings], torch.optim.Optimizer]:
    def build(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
        # It looks for kernels on the hub that nobody asked for, and says that there are none.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(groups, **(_adam if has_eps else _betas)(settings))

    return build


def _paged(name: str, *, has_eps: bool = True) -> Callable[[Groups, OptimizerSettings], torch.optim.Optimizer]:
    def build(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
        # On a CPU bitsandbytes itself falls back to what is not paged: the state lies where pages would be moved to.
        is_on_gpu = any(weight.is_cuda for group in groups for weight in group["params"])
        return _bitsandbytes(f"Paged{name}" if is_on_gpu else name, has_eps=has_eps)(groups, settings)

    return build


def put_into_pages(optimizer: Any) -> None:
    """Move a loaded state back into pages, where the optimizer keeps its own there."""
    for one in getattr(optimizer, "parts", ()):
        put_into_pages(one)
    if not getattr(optimizer, "is_paged", False):
        return
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        state = optimizer.state.get(weight, {})
        for name in ("state1", "state2"):
            if name in state and not getattr(state[name], "is_paged", False):
                page = optimizer.get_state_buffer(weight, dtype=state[name].dtype)
                state[name] = page.copy_(state[name])


def _each(numbers: int) -> Callable[[Shape, OptimizerSettings, int, bool], int]:
    return lambda shape, settings, width, is_matrix: numbers * prod(shape) * width


def _muon_keeps(shape: Shape, settings: OptimizerSettings, width: int, is_matrix: bool) -> int:
    return (1 if is_matrix else 2) * prod(shape) * width


def _galore_keeps(shape: Shape, settings: OptimizerSettings, width: int, is_matrix: bool) -> int:
    if not is_matrix:
        return 2 * prod(shape) * width
    short, long = sorted(shape)
    rank = min(settings.galore_rank, short)
    return rank * (2 * long + short) * width


def _8bit(moments: int) -> Callable[[Shape, OptimizerSettings, int, bool], int]:
    def kept(shape: Shape, settings: OptimizerSettings, width: int, is_matrix: bool) -> int:
        count = prod(shape)
        scales = 4 * -(-count // BLOCK_8BIT)
        return moments * (count + scales + CODE_BYTES if count >= LEAST_8BIT else 4 * count)

    return kept


KINDS: dict[str, Kind] = {
    "Lion": Kind("lion_pytorch", _lion, _each(1)),
    "Muon": Kind("", _muon, _muon_keeps, tells_matrices=True),
    "AdamWScheduleFree": Kind("schedulefree", _schedule_free, _each(2)),
    "GaLoreAdamW": Kind("galore_torch", _galore, _galore_keeps, tells_matrices=True),
    "AdamW8bit": Kind("bitsandbytes", _bitsandbytes("AdamW8bit"), _8bit(2)),
    "Lion8bit": Kind("bitsandbytes", _bitsandbytes("Lion8bit", has_eps=False), _8bit(1)),
    "PagedAdamW": Kind("bitsandbytes", _paged("AdamW"), _each(2)),
    "PagedAdamW8bit": Kind("bitsandbytes", _paged("AdamW8bit"), _8bit(2)),
    "PagedLion": Kind("bitsandbytes", _paged("Lion", has_eps=False), _each(1)),
    "PagedLion8bit": Kind("bitsandbytes", _paged("Lion8bit", has_eps=False), _8bit(1)),
}
"""By `optimizer.name`."""
