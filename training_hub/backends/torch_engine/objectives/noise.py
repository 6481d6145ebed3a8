"""Noise on the embeddings in training: NEFTune (Jain et al. 2023, arXiv:2310.05914)."""

# L tokens of one sample, T of the pack, D width of the model

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from training_hub.backends.torch_engine.layouts.cut import route_of
from training_hub.backends.torch_engine.tensors import PackTensors, Term

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Noisy:
    """`objective` of a model whose embeddings are disturbed, in training mode only: each number by a uniform one of at
    most alpha / sqrt(L D).

    Drawn for each sample by itself, from the seed of the step (torch.initial_seed) and the sample's number: the same
    noise however samples are packed, and after a stop.
    """

    objective: Callable[[Any, PackTensors], Term]
    alpha: float

    def __call__(self, model: PreTrainedModel, pack: PackTensors) -> Term:
        route = route_of(model)
        if route is not None and route.stage is not None:
            return self.objective(model, pack)  # the first stage has seen to the embeddings
        with self.around_decoder(model, pack):
            return self.objective(model, pack)

    @contextmanager
    def around_decoder(self, model: PreTrainedModel, pack: PackTensors) -> Iterator[None]:
        """Within, the model, where it is in training, disturbs the embeddings of the pack."""
        if not model.training:
            yield
            return

        def disturb(layer: Any, given: Any, embedded_1TD: Tensor) -> Tensor:
            return embedded_1TD + self._noise(pack, embedded_1TD)

        hook = model.get_input_embeddings().register_forward_hook(disturb)
        try:
            yield
        finally:
            hook.remove()

    def _noise(self, pack: PackTensors, like_1TD: Tensor) -> Tensor:
        assert pack.on_host is not None
        width, device = like_1TD.shape[-1], like_1TD.device
        generator = torch.Generator(device)
        drawn = []
        lengths = np.diff(pack.on_host.boundaries).tolist()
        for sample, length in zip(pack.on_host.samples.tolist(), lengths, strict=True):
            generator.manual_seed((torch.initial_seed() * 1_000_003 + sample) % 2**63)
            bound = self.alpha / math.sqrt(length * width)
            drawn.append(torch.rand(length, width, generator=generator, device=device).mul_(2 * bound).sub_(bound))
        return pack.of_tokens(torch.cat(drawn))[None].to(like_1TD.dtype)
