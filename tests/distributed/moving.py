"""Steps of an optimizer over weights that lie in pieces on several processes, beside the same steps over whole ones.

Both get the same gradients, so that nothing but the optimizer's own work can differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from training_hub.backends.torch_engine.layouts import fully_sharded
from training_hub.backends.torch_engine.layouts.pieces import whole_of
from training_hub.backends.torch_engine.optim import Masters, Updater
from training_hub.backends.torch_engine.parallel import Group
from training_hub.recipe.sections import Optimizer

SHAPES = {
    "table": (130, 48),
    "blocks.wide": (96, 64),
    "blocks.odd": (3, 1500),
    "norm": (33,),
    "blocks.stack": (4, 40, 30),
}
"""Uneven ones, of one of which the last of four processes has nothing; 8-bit moments need 4,096 numbers."""

STEPS = 3


def slices_bytes(group: Group) -> bool:
    """Whether this torch can divide quantised weights."""
    mesh = init_device_mesh("cpu", (group.world_size,), mesh_dim_names=("dp_shard",))
    return fully_sharded.slices_bytes(mesh)


def weights_of(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=numbers).to(dtype) for name, shape in SHAPES.items()}


def gradients() -> Iterator[dict[str, Tensor]]:
    return (weights_of(1 + step, torch.float32) for step in range(STEPS))


def placements(name: str, layout: str) -> list[Any] | None:
    """None: the weight is whole in each process."""
    cut = Shard(1) if name == "blocks.wide" and layout == "columns" else Shard(0)
    if layout == "columns" and name == "norm":
        return None
    return [Replicate(), cut] if layout == "replicas" else [cut]


def updater_of(parameters: dict[str, nn.Parameter], settings: dict[str, Any]) -> Updater:
    chosen = Optimizer.model_validate({"lr": 1e-2, "weight_decay": 0.1, "galore_rank": 4, **settings})
    masters = Masters(parameters.items(), are_split=chosen.state != "full")
    return Updater(masters, chosen, 0.0, {"table"})


def step(updater: Updater, gradient: dict[str, Tensor]) -> None:
    masters = updater.masters
    for name, parameter in masters.parameters.items():
        exact = gradient[name]
        if isinstance(parameter, DTensor):
            exact = distribute_tensor(exact, parameter.device_mesh, parameter.placements).to_local()
        masters.weights[name].grad = exact.clone()
    updater.step(1e-2)


def apart(group: Group, layout: str, dtype: str, settings: dict[str, Any]) -> list[str]:
    """Names of the weights, and of what the optimizer keeps, that are not those of one process; after steps of which
    the last is made by an optimizer that goes on from what the first one gave out."""
    kind, count = getattr(torch, dtype), group.world_size
    replicas = 2 if layout == "replicas" else 1
    mesh = init_device_mesh("cpu", (replicas, count // replicas) if replicas > 1 else (count,))
    whole = {name: nn.Parameter(tensor) for name, tensor in weights_of(0, kind).items()}
    divided = {}
    for name, tensor in weights_of(0, kind).items():
        lies = placements(name, layout)
        divided[name] = nn.Parameter(tensor if lies is None else distribute_tensor(tensor, mesh, lies))
    alone, together = updater_of(whole, settings), updater_of(divided, settings)
    for number, gradient in enumerate(gradients()):
        if number == STEPS - 1:
            kept = {key: tensor.clone() for key, tensor in together.state().items()}
            weights = {name: tensor.clone() for name, tensor in together.masters.saved().items()}
            together = updater_of(divided, settings)
            together.masters.load(weights)
            together.load_state(kept)
        step(alone, gradient)
        step(together, gradient)
    exact = {name: whole_of(together.masters.exact(name), divided[name]) for name in SHAPES}
    wrong = [name for name in SHAPES if not same(exact[name], alone.masters.exact(name), name in together.owners.names)]
    wanted = alone.state()
    owned = {key: value for key, value in together.state().items() if key.rpartition("/")[0] in together.owners.whole}
    return [*wrong, *(key for key, value in owned.items() if not torch.equal(value, wanted[key]))]


def same(one: Tensor, other: Tensor, is_owned: bool) -> bool:
    """Bit for bit where a weight was whole. In pieces other numbers are the last of a vector unit, which rounds these
    otherwise."""
    return torch.equal(one, other) if is_owned else torch.allclose(one, other, rtol=1e-6, atol=1e-7)


def owned(group: Group, settings: dict[str, Any]) -> list[str]:
    """Names of the weights that this process owns whole."""
    mesh = init_device_mesh("cpu", (group.world_size,))
    divided = {
        name: nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)]))
        for name, tensor in weights_of(0, torch.float32).items()
    }
    return sorted(updater_of(divided, settings).owners.whole)
