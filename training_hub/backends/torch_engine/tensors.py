"""What the engine computes on: one pack as tensors on a device, and the term an objective makes of it."""

# T tokens of the pack, N positions whose next token is trained

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training_hub.errors import DataError
from training_hub.types import Pack


@dataclass(frozen=True)
class PackTensors:
    """A pack on its device.

    ids [1, T] int64, positions [1, T] int64 (restart at 0 for each document), weights [1, T] float32,
    lengths: tokens of each document, in order, as plain numbers; cu_seqlens [n + 1] int32: where each begins and ends.
    rows [N] int64: positions t whose next token has a weight. Found on the host, since asking a GPU for the places
    that are not zero would make the host wait for it in every micro-step.
    on_host: the pack these are the tensors of, for what is found by the number of a sample.
    """

    ids: Tensor
    positions: Tensor
    weights: Tensor
    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    rows: Tensor
    on_host: Pack | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @property
    def targets(self) -> Tensor:
        """[N] int64: the token that follows each of `rows`."""
        return self.ids[0, self.rows + 1]

    @property
    def target_weights(self) -> Tensor:
        """[N] float32: the weight of each of `targets`."""
        return self.weights[0, self.rows + 1]

    def places(self) -> np.ndarray:
        """[N]: where in the pack on the host each of `rows` stands."""
        assert self.on_host is not None
        return np.flatnonzero(self.on_host.weights[1:])

    def whole(self) -> PackTensors:
        """All of the pack on the host."""
        return self

    def of_trained(self, whole_Mx: Tensor) -> Tensor:
        """[N, ...]: what belongs to `rows`, of what belongs to all trained tokens of the pack on the host."""
        return whole_Mx

    def of_tokens(self, whole_Tx: Tensor) -> Tensor:
        """What belongs to `ids`, of what belongs to all tokens of the pack on the host."""
        return whole_Tx

    def arguments(self, forward: Callable[..., Any]) -> dict[str, Any]:
        """Keyword arguments for a transformers `forward`, leaving out what its signature has no room for.

        The cumulative lengths go under transformers' own names, which linear-attention layers read as well;
        `document_lengths` is what our attention reads where no kernel takes cumulative lengths. A single document needs
        neither, and layers that refuse packs can then be run.
        """
        offered: dict[str, Any] = {"input_ids": self.ids, "position_ids": self.positions, "use_cache": False}
        if len(self.lengths) > 1:
            longest = self.longest
            offered |= {
                "document_lengths": self.lengths,
                "cu_seq_lens_q": self.cu_seqlens,
                "cu_seq_lens_k": self.cu_seqlens,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        parameters = inspect.signature(forward).parameters
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return offered
        return {name: value for name, value in offered.items() if name in parameters}


@dataclass(frozen=True)
class Term:
    """What an objective makes of one pack: `total`, the weighted sum of losses over its trained tokens.

    A scalar in float32 (float64 for a float64 model), not yet divided by anything. losses [N]: its summands, without
    gradients.
    """

    total: Tensor
    losses: Tensor | None = None


def to_device(pack: Pack, device: torch.device | str) -> PackTensors:
    """The pack as tensors on `device`; copies to a GPU do not wait for it.

    Raises DataError where the first token of a document has a weight: nothing predicts it.
    """
    refuse_trained_starts(pack)
    lengths = np.diff(pack.boundaries)
    return PackTensors(
        ids=put(pack.ids.astype(np.int64)[None], device),
        positions=put(pack.positions.astype(np.int64)[None], device),
        weights=put(pack.weights.astype(np.float32)[None], device),
        lengths=tuple(int(length) for length in lengths),
        cu_seqlens=put(pack.boundaries.astype(np.int32), device),
        rows=put(np.flatnonzero(pack.weights[1:]).astype(np.int64), device),
        on_host=pack,
    )


def refuse_trained_starts(pack: Pack) -> None:
    """Raise DataError where the first token of a document has a weight."""
    led = np.flatnonzero(pack.weights[pack.boundaries[:-1]])
    if len(led):
        found = ", ".join(str(pack.samples[i]) for i in led[:5])
        raise DataError(
            f"samples {found}: the first token has a weight, but nothing predicts it; its weight must be 0."
        )


def put(array: np.ndarray, device: torch.device | str) -> Tensor:
    """The array as a tensor on `device`.

    A GPU gets it from page-locked memory: for a copy from any other the host waits until the GPU has come to it, asked
    to wait or not. Source: CUDA's runtime API, "API synchronization behavior".
    """
    tensor = torch.from_numpy(array)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def nonfinite_tensors(tensors: dict[str, Tensor]) -> list[str]:
    """One line for each tensor with NaN or infinite numbers; [] where there is none."""
    # Formats of one byte, as in quantised folders, have no isfinite.
    plain = (Tensor, torch.nn.Parameter)  # a library's own kind of tensor holds integers and their scales
    floats = {
        name: tensor
        for name, tensor in tensors.items()
        if type(tensor) in plain and tensor.is_floating_point() and tensor.element_size() > 1
    }
    if not floats or all(bool(torch.isfinite(tensor).all()) for tensor in floats.values()):
        return []
    counts = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in floats.items()}
    return [f"{name} holds {count:,} numbers that are not finite" for name, count in counts.items() if count]
