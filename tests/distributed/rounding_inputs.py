"""A layer that rounds its inputs, split by these among processes, beside the same layer whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from training_hub.backends.torch_engine.layouts.pieces import cut_of, local_of
from training_hub.backends.torch_engine.layouts.split_linear import STYLES, split_linear
from training_hub.backends.torch_engine.layouts.tokens import Tokens
from training_hub.backends.torch_engine.loading.rounding import round_in_forward
from training_hub.backends.torch_engine.parallel import Group
from training_hub.recipe.qat import Qat


def apart(group: Group) -> dict[str, float]:
    """How far outputs and gradients of this process lie from those of the whole layer; and how far its inputs, rounded
    by themselves, would lie from those that are rounded with all."""
    chosen = Qat(weight_dtype="int8", activation_dtype="int8", group_size=16)
    mesh = init_device_mesh("cpu", (group.world_size,), mesh_dim_names=("tp",))
    numbers = torch.Generator().manual_seed(0)
    given = torch.randn(1, 20, 64, generator=numbers) * torch.linspace(0.1, 4, 64)
    upstream = torch.randn(1, 20, 24, generator=numbers)
    whole, split = _layer(chosen), _layer(chosen)
    split_linear(split, "0", STYLES["rowwise"], Tokens(mesh, are_sliced=False), enters=False)
    x, own = given.clone().requires_grad_(), given.chunk(group.world_size, -1)[group.rank].clone().requires_grad_()
    wanted, found = whole(x), split(own)
    (wanted * upstream).sum().backward()
    (found * upstream).sum().backward()
    weight = split[0].weight
    rounds = whole[0].activation_fake_quantizer
    return {
        "output": _difference(found, wanted),
        "inputs": _difference(own.grad, x.grad.chunk(group.world_size, -1)[group.rank]),
        "weight": _difference(local_of(weight.grad), whole[0].weight.grad[cut_of(weight).slices]),
        "alone": _difference(rounds(own), rounds(given).chunk(group.world_size, -1)[group.rank]),
    }


def _layer(chosen: Qat) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 24))
    round_in_forward(made, chosen)
    return made


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())
