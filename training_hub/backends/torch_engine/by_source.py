"""The loss of each source of the data, or of each validation set, gathered on the device and fetched with the whole."""

# N trained positions of a pack, S sources

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from training_hub.backends.shared.sources import metric_names
from training_hub.backends.torch_engine.tensors import PackTensors, Term, put
from training_hub.data.prepare import Prepared
from training_hub.data.store import TokenStore
from training_hub.types import Pack


class BySource:
    """Sums of one step: of the losses and of the weights of each source's trained tokens."""

    def __init__(self, sources: Sequence[str], store: TokenStore, device: torch.device, what: str = "source_loss"):
        self.names = metric_names(sources, what)
        self._of_sample = store.source_index
        self._sums_2S = torch.zeros(2, len(sources), dtype=torch.float64, device=device)

    def begin(self) -> None:
        """Forget the last step."""
        self._sums_2S.zero_()

    def add(self, term: Term, tensors: PackTensors, pack: Pack) -> None:
        """Add the losses of a pack, or of what this process has of it, as `tensors`."""
        assert term.losses is not None
        weights_N = tensors.target_weights
        documents = np.searchsorted(pack.boundaries, tensors.places(), side="right") - 1
        sources_N = put(self._of_sample[pack.samples[documents]].astype(np.int64), weights_N.device)
        both_2N = torch.stack([term.losses, weights_N.to(term.losses.dtype)]).to(torch.float64)
        self._sums_2S.index_add_(1, sources_N, both_2N)

    @property
    def sums(self) -> Tensor:
        """[2 S] float64: the losses, then the weights."""
        return self._sums_2S.flatten()

    def means(self, sums: Sequence[float]) -> dict[str, float]:
        """The mean loss of each source that the step had, from `sums` as numbers."""
        losses, weights = sums[: len(self.names)], sums[len(self.names) :]
        return {name: loss / weight for name, loss, weight in zip(self.names, losses, weights, strict=True) if weight}


def sets_of(prepared: Prepared, device: torch.device) -> BySource | None:
    """The sums of each validation set, where there are several."""
    names = [one["name"] for one in prepared.report.get("validation", {}).get("sources", ())]
    store = prepared.validation
    return BySource(names, store, device, "validation_loss") if store is not None and len(names) > 1 else None
