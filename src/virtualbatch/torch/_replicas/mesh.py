"""The ranks over which a fully sharded module adds up gradients, read from its parameters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

# Ranks of a mesh with several dimensions -> their process group, which is created once.
_GROUPS: dict[tuple[int, ...], Any] = {}


def reducing_group(parameters: Sequence[torch.Tensor], given: Any) -> Any:
    """The process group of the ranks that hold different rows.

    Args:
        parameters: the parameters, all DTensors.
        given: the caller's process group or mesh, which is needed if the placements do not show
            the ranks; or None.

    Raises:
        ValueError: nothing shows which ranks these are, or the placements show other ranks than
            `given`.
    """
    mesh = _data_mesh([x for x in parameters if isinstance(x, DTensor)])
    if mesh is None and given is None:
        largest: Any = max((x.device_mesh for x in parameters if isinstance(x, DTensor)), key=_ndim)
        names = largest.mesh_dim_names or tuple(range(largest.ndim))
        raise ValueError(
            "Weights are summed over the ranks that hold different rows. Got parameters on a mesh "
            f'{names}, which does not show which ranks these are. Pass group=mesh["dp"].'
        )
    if mesh is None:
        return _group(given)
    found = _group(mesh)
    if given is not None:
        ranks, asked = map(distributed.get_process_group_ranks, (found, _group(given)))
        if sorted(ranks) != sorted(asked):
            raise ValueError(
                "group must be the ranks over which the module adds up gradients. "
                f"Got ranks {asked} for a module of ranks {ranks}. Leave group out."
            )
    return found


def _data_mesh(parameters: Sequence[DTensor]) -> DeviceMesh | None:
    """The mesh over which gradients are added up; None if the placements do not show it."""
    meshes = {parameter.device_mesh for parameter in parameters}
    smallest = min(meshes, key=_ndim)
    names = set(smallest.mesh_dim_names or ())
    for mesh in meshes:
        # A mesh with tensor parallelism has one more dimension.
        if mesh != smallest and not (names and names <= set(mesh.mesh_dim_names or ())):
            return None
    if smallest.ndim == 1:
        return smallest
    placements = {tuple(x.placements) for x in parameters if x.device_mesh == smallest}
    if smallest.ndim == 2 and all(a.is_replicate() and b.is_shard() for a, b in placements):
        return smallest
    return None


def _ndim(mesh: DeviceMesh) -> int:
    return mesh.ndim


def _group(given: Any) -> Any:
    """The process group of all ranks of a mesh; a process group itself is returned as it is."""
    if not isinstance(given, DeviceMesh):
        return given
    if given.ndim == 1:
        return given.get_group()
    ranks = tuple(given.mesh.flatten().tolist())
    if len(ranks) == distributed.get_world_size():
        return distributed.group.WORLD
    if ranks not in _GROUPS:
        # Only the ranks of this group are here. Other ranks may run no window now.
        _GROUPS[ranks] = distributed.new_group(ranks, use_local_synchronization=True)
    return _GROUPS[ranks]
