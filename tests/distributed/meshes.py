"""What a process finds of a mesh, in runs one after the other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from training_hub.backends.torch_engine.parallel import Group


def sum_on_a_mesh(group: Group, others: int) -> tuple[list[float], bool]:
    """A sum of numbers in slices, and whether it lies on the mesh of this run. others: groups that were made before."""
    for _ in range(others):
        dist.new_group(list(range(group.world_size)))
    mesh = init_device_mesh("cpu", (group.world_size,), mesh_dim_names=("slices",))
    numbers = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
    twice: DTensor = numbers + numbers
    return twice.full_tensor().tolist(), twice.device_mesh is mesh
