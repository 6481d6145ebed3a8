"""Sums of gradients over replicas that begin while backward still computes the layers before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from training_hub.backends.torch_engine.parallel import Group, buckets

SMALL_BYTES = 2**20
"""Gradients smaller than this travel together, as a copy; a larger one alone, where it lies."""


@dataclass(frozen=True)
class _Begun:
    """A sum that is under way. flat: the copy that travels, where not the gradients themselves do."""

    work: Any
    gradients: list[Tensor]
    flat: Tensor | None


class EarlySums:
    """The gradients of a step, added up over all processes of a group bucket by bucket.

    Weights lie in buckets in the reverse of their order in the model, which is about the order in which backward makes
    their gradients (Li et al. 2020, arXiv:2006.15704, section 3.2.3). A bucket is sent once the last backward pass of
    the step is through with each of its weights and the bucket before is on its way, so that all processes send in one
    order; what a pass did not reach, `send_rest` sends. For each step, in turn: `begin` before the last backward pass,
    where this process makes one, `send_rest` after it and before processes say anything else, `finish`.

    parameters: by name what autograd has gradients of; weights: by the same names, and more, whose `grad` is summed.
    """

    def __init__(
        self,
        group: Group,
        parameters: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        small_bytes: int = SMALL_BYTES,
    ):
        self._group = group
        self._others = [weight for name, weight in weights.items() if name not in parameters]
        order = [weights[name] for name in reversed(list(parameters))]
        self.buckets = list(buckets(order, small_bytes))
        place = {id(weight): number for number, bucket in enumerate(self.buckets) for weight in bucket}
        self._nodes = [get_gradient_edge(parameter).node for parameter in parameters.values()]  # alive as long as hooks
        self._hooks = [
            node.register_hook(partial(self._arrived, place[id(weights[name])]))
            for name, node in zip(parameters, self._nodes, strict=True)
        ]
        self._awaited: list[int] = []
        self._own: list[list[bool]] = []
        self._begun: list[_Begun] = []

    @property
    def num_begun(self) -> int:
        """How many buckets of this step are on their way."""
        return len(self._begun)

    def begin(self) -> None:
        """The backward pass that comes is the last of this step."""
        self._awaited = [len(bucket) for bucket in self.buckets]

    def send_rest(self) -> None:
        """Send what is not on its way; the backward passes of this step are over."""
        self._awaited = []
        while self.num_begun < len(self.buckets):
            self._send()

    def finish(self) -> None:
        """Every gradient is the sum of all processes'; what no process has one of has none."""
        self.send_rest()
        self._group.sum_gradients(self._others)
        is_there = iter(self._group.highest([int(own) for bucket in self._own for own in bucket]))
        with self._group.explained("the sum of gradients"):
            for begun in self._begun:
                begun.work.wait()
                if begun.flat is not None:
                    parts = begun.flat.split([gradient.numel() for gradient in begun.gradients])
                    shaped = [part.view_as(one) for part, one in zip(parts, begun.gradients, strict=True)]
                    torch._foreach_copy_(begun.gradients, shaped)
        for bucket in self.buckets:
            for weight in bucket:
                if not next(is_there):
                    weight.grad = None
        self._own, self._begun = [], []

    def release(self) -> None:
        """Let go of the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _arrived(self, number: int, *_: Any) -> None:
        if not self._awaited:
            return
        self._awaited[number] -= 1
        while self.num_begun < len(self.buckets) and not self._awaited[self.num_begun]:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self.buckets[self.num_begun]
        self._own.append([weight.grad is not None for weight in bucket])
        for weight in bucket:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        gradients = [weight.grad for weight in bucket if weight.grad is not None]
        is_alone = len(gradients) == 1 and gradients[0].is_contiguous()
        flat = None if is_alone else torch.cat([gradient.reshape(-1) for gradient in gradients])
        with self._group.explained("the sum of gradients"):
            work = dist.all_reduce(gradients[0] if flat is None else flat, async_op=True)
        self._begun.append(_Begun(work, gradients, flat))
