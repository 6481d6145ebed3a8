"""Fully sharded data parallelism by torch's `fully_shard`: each process keeps a slice of every weight, gathers those of
a layer when it needs them, and adds up the layer's gradients into slices as soon as backward has them.

Source: Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO, stage 3); Zhao et al. 2023, arXiv:2304.11277.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from training_hub.backends.torch_engine.as_forward import DEVICE, DTYPE, NAME
from training_hub.backends.torch_engine.checkpointing import layers_of
from training_hub.backends.torch_engine.layouts.abilities import can_slice_bytes
from training_hub.backends.torch_engine.layouts.mesh import size_of
from training_hub.backends.torch_engine.layouts.sliced_stages import SlicedStages
from training_hub.errors import RecipeError
from training_hub.recipe.parallelism import Parallelism

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DIMENSIONS = ("dp_replicate", "dp_shard")
LOW_PRECISION = (torch.bfloat16, torch.float16)


def shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    asked: Parallelism,
    dtype: torch.dtype,
    apart: frozenset[nn.Parameter] = frozenset(),
    dealt: Sequence[nn.Module] = (),
    experts: DeviceMesh | None = None,
) -> None:
    """Divide the model's weights over the mesh, in place; it computes in `dtype`.

    What trains is kept in float32, in slices, and gathered as `dtype`: the slices are the optimizer's masters. Tied
    weights, embeddings, the last norm and the head are one group, which is gathered once in a pass. apart: weights that
    stay whole in each process; so do those that several layers have in common. dealt: modules whose experts are dealt
    out over `ep` of the mesh `experts`; over what is left of that they are divided, too, where anything is. Raises
    RecipeError where processes could use different weights in a pass.
    """
    _refuse_listed_experts(model)
    is_left = size_of(experts, "efsdp") > 1
    apart |= {weight for module in dealt for weight in module.parameters(recurse=False) if not is_left}
    apart |= _of_several(model, blocks_of(model))
    _widen(model, dtype, apart)
    is_low = dtype in LOW_PRECISION
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype if is_low else None,
            reduce_dtype=torch.float32 if is_low else None,
            cast_forward_inputs=False,
        ),
        "offload_policy": _offloading(asked, mesh),
        "ignored_params": set(apart),
    }
    if experts is not None and is_left:
        for one in dealt:
            fully_shard(one, mesh=_along(experts, ("dp_replicate", "efsdp")), reshard_after_forward=True, **options)
    for layer in (*blocks_of(model), model):
        fully_shard(layer, mesh=_along(mesh, DIMENSIONS), reshard_after_forward=True, **options)
    for module in sharded_modules(model):
        # The loss is divided once, by the trained weight of the step; so gradients are added up.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    _tell(model, mesh, dtype)
    if asked.pipeline_parallel_degree > 1:
        SlicedStages(model, asked)


def shard_frozen(model: PreTrainedModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Divide the weights of a model that does not train over `dp_shard` of the mesh, in place, in the format that they
    have, `dtype`: a block, or what stands around the blocks, is whole only while it computes."""
    model.requires_grad_(False)
    for layer in (*blocks_of(model), model):
        fully_shard(layer, mesh=mesh["dp_shard"], reshard_after_forward=True)
    _tell(model, mesh, dtype)


def _tell(model: PreTrainedModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Leave on a divided model how it is run, in what and where."""
    setattr(model, NAME, MethodType(_run, model))
    register_fsdp_forward_method(model, NAME)
    setattr(model, DTYPE, dtype)
    is_gpu = mesh.device_type == "cuda"
    setattr(model, DEVICE, torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu"))


def slices_bytes(mesh: DeviceMesh) -> bool:
    """Whether this torch can divide weights over the mesh that are kept in fewer bits; all processes must ask."""
    return can_slice_bytes(_along(mesh, DIMENSIONS))


def _along(mesh: DeviceMesh, names: Sequence[str]) -> DeviceMesh:
    """The mesh along these of its dimensions, as far as it has them."""
    return mesh[tuple(name for name in names if name in (mesh.mesh_dim_names or ()))]


def _refuse_listed_experts(model: nn.Module) -> None:
    lists = [name for name, one in model.named_modules() if isinstance(one, nn.ModuleList) and name.endswith("experts")]
    if lists:
        raise RecipeError(
            f"parallelism.data_parallel_shard_degree: {lists[0]} of {type(model).__name__} is a list of modules, of "
            "which each process may use others in a pass; their gradients would be added up to the wrong ones. Write 1."
        )


def _widen(model: nn.Module, dtype: torch.dtype, apart: frozenset[nn.Parameter]) -> None:
    if dtype not in LOW_PRECISION:
        return
    wide: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad or parameter in apart or parameter.dtype not in LOW_PRECISION:
                continue
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(torch.float32)
                continue
            if parameter not in wide:  # a DTensor keeps the format that it was made in
                wide[parameter] = nn.Parameter(parameter.detach().to(torch.float32))
            module.register_parameter(key, wide[parameter])


def _offloading(asked: Parallelism, mesh: DeviceMesh) -> OffloadPolicy:
    return CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if asked.enable_cpu_offload else OffloadPolicy()


def _run(model: nn.Module, work: Callable[[], Any]) -> Any:
    return work()


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """What is gathered at once: the decoder layers; [] where a model does not say which they are. Of those that lie
    within each other the outermost."""
    named = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if _own_name(module) in named]
    within = {one for module in found for one in module.modules() if one is not module}
    return [module for module in found if module not in within] or list(layers_of(model))


def _of_several(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> frozenset[nn.Parameter]:
    """Weights that several blocks would gather, or one and what stands around: those that layers have in common."""
    around = list(_around(model, frozenset(blocks)))
    places = [set(block.parameters()) for block in blocks]
    places.append({weight for module in around for weight in module.parameters(recurse=False)})
    counts = Counter(weight for place in places for weight in place)
    return frozenset(weight for weight, count in counts.items() if count > 1)


def _around(module: nn.Module, blocks: frozenset[nn.Module]) -> Iterator[nn.Module]:
    if module in blocks:
        return
    yield module
    for child in module.children():
        yield from _around(child, blocks)


def _own_name(module: nn.Module) -> str:
    return type(module).__name__


def sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules of a divided model that gather their own weights."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def let_go(model: nn.Module) -> None:
    """Forget gathered weights, which an update of the slices has made stale."""
    for module in sharded_modules(model):
        module.reshard()


def begin_pass(model: nn.Module, asked: Parallelism, *, is_last: bool) -> None:
    """Say, before a forward pass that is followed by its backward pass, whether it is the last of its step.

    What stands around the layers stays gathered between the two. Sums over replicas are taken once per step. So are
    those over slices, and all weights stay gathered till then, where fsdp_reshard_after_forward is never.
    """
    assert isinstance(model, FSDPModule)
    stays_whole = asked.fsdp_reshard_after_forward == "never"
    model.set_reshard_after_forward(False, recurse=stays_whole)
    model.set_requires_all_reduce(is_last)
    if stays_whole:
        model.set_requires_gradient_sync(is_last)
        model.set_reshard_after_backward(is_last)


def end_passes(model: nn.Module) -> None:
    """The backward passes of a step are over: a forward pass by itself, as in validation, lets everything go, and a
    backward pass by itself, as in proofs, adds everything up."""
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_forward(True)
    model.set_reshard_after_backward(True)
    model.set_requires_gradient_sync(True)
