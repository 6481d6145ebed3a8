"""The processes of a run as a mesh, by torchtitan's names for its dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from training_hub.recipe.parallelism import Degrees

DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Outermost first: neighbours in rank, which are near each other, share what says most."""

OF_EXPERTS = ("pp", "dp_replicate", "efsdp")
"""Dimensions beside `ep` of the mesh on which experts lie."""

EXPERT_TOKENS = ("dp_replicate", "efsdp")
"""Those along which processes have the same experts, and ask them about tokens of their own."""


def dense_mesh(degrees: Degrees, device: torch.device, timeout_seconds: float) -> DeviceMesh:
    """All processes of the run, by the dimensions along which there is more than one; one of 1 where there is none.

    `mesh["dp_shard"]`, `mesh["dp_replicate", "dp_shard"]` are those that a process shares with others.
    """
    names = [name for name in DIMENSIONS if getattr(degrees, name) > 1] or ["dp_shard"]
    return _mesh(names, degrees, device, timeout_seconds)


def expert_mesh(degrees: Degrees, device: torch.device, timeout_seconds: float) -> DeviceMesh:
    """The same processes, as experts lie on them, by the dimensions along which there is more than one, and `ep`."""
    names = [name for name in OF_EXPERTS if getattr(degrees, name) > 1]
    return _mesh([*names, "ep"], degrees, device, timeout_seconds)


def _mesh(names: Sequence[str], degrees: Degrees, device: torch.device, timeout_seconds: float) -> DeviceMesh:
    mesh = init_device_mesh(device.type, tuple(getattr(degrees, name) for name in names), mesh_dim_names=tuple(names))
    bound_waiting(mesh, timeout_seconds)
    return mesh


def bound_waiting(mesh: DeviceMesh, timeout_seconds: float) -> None:
    """Let the groups of a mesh wait as long as the run's own group; torch gives new ones half an hour."""
    for group in mesh.get_all_groups():
        _set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def stage_group(mesh: DeviceMesh, timeout_seconds: float) -> dist.ProcessGroup | None:
    """The processes that have the same layers as this one; None where all have them, or it alone. All must ask."""
    if size_of(mesh, "pp") in (1, mesh.size()):
        return None
    stages = mesh.mesh.flatten(1).tolist()  # "pp" is outermost
    own: dist.ProcessGroup = dist.new_subgroups_by_enumeration(stages, timedelta(seconds=timeout_seconds))[0]
    return own


def size_of(mesh: DeviceMesh | None, *names: str) -> int:
    """Processes along these dimensions of the mesh; a dimension that it lacks counts as one."""
    if mesh is None:
        return 1
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
    product = 1
    for name in names:
        product *= sizes.get(name, 1)
    return product


def place_in(mesh: DeviceMesh | None, *names: str) -> int:
    """This process's number among those along these dimensions of the mesh, the first of them outermost."""
    place = 0
    for name in names if mesh is not None else ():
        if mesh is not None and name in (mesh.mesh_dim_names or ()):
            place = place * size_of(mesh, name) + mesh.get_local_rank(name)
    return place


def groups_along(mesh: DeviceMesh | None, names: Iterable[str]) -> list[dist.ProcessGroup]:
    """Those of this process along these dimensions of the mesh, as far as there is more than one process along them."""
    return [mesh.get_group(name) for name in names if mesh is not None and size_of(mesh, name) > 1]
