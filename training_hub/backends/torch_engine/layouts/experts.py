"""Experts of a mixture dealt out to ranks, whole: each computes what tokens are sent to its own.

transformers holds the experts of a layer in a few weights whose first dimension is their number, and calls them with
tokens, the experts that each is sent to, and their shares. What is exchanged here is that call.
"""

# N tokens, K experts that a token is sent to, P = N K pairs of these, M pairs whose expert is here, D width of a token
# E experts, I inputs and O outputs of each, R ranks of its adapter

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from training_hub.backends.torch_engine.fused.exchange import Forward
from training_hub.backends.torch_engine.fused.low_rank import ADAPTER
from training_hub.backends.torch_engine.layouts.exchanges import entering, leaving
from training_hub.backends.torch_engine.layouts.shared import Rows, exchange, locally

DEGREE = "parallelism.expert_parallel_degree"


WRAPPED = ".base_layer"
"""Where PEFT has the experts of a layer whose weights have adapters, for each of these anew."""


def experts_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module that holds the experts of a layer in weights of its own, as transformers 5 builds them, by the name
    that it is called by; adapters of its weights stand around it there."""
    for name, module in model.named_modules():
        held = [parameter for _, parameter in module.named_parameters(recurse=False)]
        count, called = getattr(module, "num_experts", None), name.replace(WRAPPED, "")
        if called.endswith("experts") and isinstance(count, int) and held and all(len(one) == count for one in held):
            yield called, module


def bare(module: Any) -> Any:
    """The experts themselves, where adapters stand around them."""
    while hasattr(module, WRAPPED[1:]):
        module = module.base_layer
    return module


def deal_out(model: nn.Module, name: str, mesh: DeviceMesh, *, are_tokens_shared: bool) -> frozenset[str]:
    """Leave each rank of the mesh its experts of the module called `name`, in place.

    are_tokens_shared: whether all ranks of the mesh see the same tokens; else each has its own. The weights become
    DTensors under their names; what is computed with are a rank's own experts. Adapters stay whole on each rank, of
    which it uses those of its experts: gives their names, since a gradient of theirs is the sum over the ranks.
    """
    module = bare(model.get_submodule(name))
    for key, weight in list(module.named_parameters(recurse=False)):
        split = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter(key, nn.Parameter(split, requires_grad=weight.requires_grad))
    return _exchange_all(model, name, _of_all if are_tokens_shared else _of_each)


def _exchange_all(model: nn.Module, name: str, make: Callable[[Any], Forward]) -> frozenset[str]:
    """Let the experts of this name run what `make` makes, and be told of their adapters, whose weights' names these
    are."""
    around = set()
    while hasattr(module := model.get_submodule(name), WRAPPED[1:]):
        around |= {f"{name}.{key}" for key, _ in module.named_parameters() if not key.startswith(WRAPPED[1:])}
        exchange(model, name, module, _telling)
        name += WRAPPED
    exchange(model, name, module, make)
    return frozenset(around)


def run_part(model: nn.Module, name: str) -> None:
    """Let experts with adapters, of whose weights the first rank's part is left here, run with their part of these."""
    if hasattr(model.get_submodule(name), WRAPPED[1:]):
        _exchange_all(model, name, _of_first)


def _telling(own: Any) -> Forward:
    """An adapter of a weight, which the experts add to it themselves, each rank to its own."""

    def forward(self: Any, hidden_ND: Tensor, *arguments: Tensor, adapters: tuple[Any, ...] = ()) -> Tensor:
        own_too = () if self.disable_adapters or self.merged else (self,)
        said: Tensor = self.base_layer(hidden_ND, *arguments, adapters=(*adapters, *own_too))
        return said

    return forward


def _of_first(own: Any) -> Forward:
    def forward(self: Any, hidden_ND: Tensor, *arguments: Tensor, adapters: tuple[Any, ...] = ()) -> Tensor:
        part = _with_adapters(locally(own, self), adapters, slice(0, self.num_experts))
        said: Tensor = own.forward(part, hidden_ND, *arguments)
        return said

    return forward


def _with_adapters(part: Any, adapters: tuple[Any, ...], here: slice) -> Any:
    """Experts whose weights are plain tensors, with what their adapters add to these `here` of all."""
    for one in adapters:
        left_EIR, right_ERO, scale = one.get_delta_factors(ADAPTER)
        weight_EIO = getattr(part, one.parameter_name)
        part._parameters[one.parameter_name] = torch.baddbmm(weight_EIO, left_EIR[here], right_ERO[here], alpha=scale)
    return part


def _of_all(own: Any) -> Forward:
    """Each rank answers for its own experts; the sum of what the ranks say is what all experts say."""

    def forward(self: Any, hidden_ND: Tensor, *arguments: Tensor, adapters: tuple[Any, ...] = ()) -> Tensor:
        rows = Rows.of(next(self.parameters(recurse=False)))
        index_NK, shares_NK = arguments
        hidden_ND, shares_NK = entering(hidden_ND, rows.mesh), entering(shares_NK, rows.mesh)
        token_M, place_M = torch.where(rows.here(index_NK))
        given = (hidden_ND[token_M], index_NK[token_M, place_M], shares_NK[token_M, place_M])
        said_MD = _asked(own, self, rows, adapters, *given)
        return leaving(torch.zeros_like(hidden_ND).index_add(0, token_M, said_MD), rows.mesh)

    return torch.compiler.disable(forward)  # how many tokens there are to send only the router knows


def _of_each(own: Any) -> Forward:
    """Each rank sends its tokens to the ranks that have their experts, and gets back what these say."""

    def forward(self: Any, hidden_ND: Tensor, *arguments: Tensor, adapters: tuple[Any, ...] = ()) -> Tensor:
        rows = Rows.of(next(self.parameters(recurse=False)))
        index_NK, shares_NK = arguments
        expert_P = index_NK.flatten()
        order_P = expert_P.argsort(stable=True)  # so they lie by rank, too
        token_P = order_P // index_NK.shape[1]
        sent = torch.bincount(expert_P // rows.most, minlength=rows.mesh.size())
        received = torch.empty_like(sent)
        group = rows.mesh.get_group()
        dist.all_to_all_single(received, sent, group=group)
        counts = (sent.tolist(), received.tolist())
        expert_M = _Exchange.apply(expert_P[order_P], *counts, group)
        given_MD = _Exchange.apply(hidden_ND[token_P], *counts, group)
        said_MD = _asked(own, self, rows, adapters, given_MD, expert_M, given_MD.new_ones(len(given_MD)))
        said_PD = _Exchange.apply(said_MD, *reversed(counts), group)
        said_PD = said_PD * shares_NK.flatten()[order_P, None]
        return torch.zeros_like(hidden_ND).index_add(0, token_P, said_PD.to(hidden_ND.dtype))

    return torch.compiler.disable(forward)


class _Exchange(torch.autograd.Function):
    """Rows in the order of the ranks that they are sent to, for rows in the order of those that they come from."""

    @staticmethod
    def forward(ctx: Any, rows_Px: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = (sent, received), group
        return _exchanged(rows_Px, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.counts
        return _exchanged(upstream[0], received, sent, ctx.group), None, None, None


def _exchanged(rows_Px: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    result = rows_Px.new_empty(sum(received), *rows_Px.shape[1:])
    dist.all_to_all_single(result, rows_Px.contiguous(), received, sent, group=group)
    return result


def _asked(
    own: Any,
    module: Any,
    rows: Rows,
    adapters: tuple[Any, ...],
    given_MD: Tensor,
    expert_M: Tensor,
    share_M: Tensor,
) -> Tensor:
    """[M, D]: what experts of this rank say to tokens, times the tokens' shares."""
    # One more, of nothing: a rank whose experts nobody asks has gradients of 0, and none are missing.
    given_MD = torch.cat([given_MD, given_MD.new_zeros(1, given_MD.shape[-1])])
    expert_M = torch.cat([expert_M - rows.start, expert_M.new_zeros(1)])
    share_M = torch.cat([share_M, share_M.new_zeros(1)])
    part = locally(own, module, num_experts=rows.end - rows.start)
    part = _with_adapters(part, adapters, slice(rows.start, rows.end))
    said_MD: Tensor = own.forward(part, given_MD, expert_M[:, None], share_M[:, None])
    return said_MD[:-1].to(given_MD.dtype)


def expert_problems(model: Any, degree: int) -> list[str]:
    """Why the experts of this model, which may lie on the meta device, cannot be dealt out to `degree` ranks."""
    kind = type(model).__name__
    counts = {module.num_experts for _, module in experts_of(model)}
    if not counts:
        return [f"{DEGREE}: {degree}, but {kind} has no experts that can be dealt out. Write 1."]
    most = gcd(*counts)
    if most % degree == 0:
        return []
    allowed = ", ".join(str(number) for number in range(1, most + 1) if most % number == 0)
    return [f"{DEGREE}: {degree} does not divide {most} experts of {kind}; allowed: {allowed}."]


def deal_out_all(model: nn.Module, mesh: DeviceMesh) -> frozenset[str]:
    """Leave each rank of the mesh, which has tokens of its own, its experts of every layer, in place; as `deal_out`."""
    names = [name for name, _ in experts_of(model)]
    return frozenset().union(*(deal_out(model, name, mesh, are_tokens_shared=False) for name in names))
