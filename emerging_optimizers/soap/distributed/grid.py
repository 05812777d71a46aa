"""Which processes hold a parameter, in which shards, and which of them owns it.

The parameters decide, not an option. A DTensor carries its mesh; a plain tensor is on every process of the group that
the optimizer was given, or on this one alone. Either way the processes that share a parameter form a grid of replicas
and shards. Data parallelism (DDP) has replicas of one shard, FSDP2 one replica of shards, HSDP both, and a single
process is no grid at all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from emerging_optimizers.soap.costs import mean_flops, share_out
from emerging_optimizers.soap.options import refresh_frequency
from emerging_optimizers.soap.state import layout_for

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: Per axis of a tensor, which of its indices a process has.
Shard = tuple[slice, ...]


class ProcessGrid:
    """The processes that hold the same parameters.

    Args:
        ranks: The global rank of each, ``ranks[replica][shard]``.
        group: A process group of all of them.
        shard_group: A group of those that have this process's replica; None for a single shard.

    Attributes:
        replica, shard: This process's place.
        size: The number of processes.
        rank: This process's rank in ``group``. Owners are named by it.
    """

    def __init__(
        self, ranks: Sequence[Sequence[int]], group: dist.ProcessGroup, shard_group: dist.ProcessGroup | None
    ) -> None:
        self.ranks, self.group, self.shard_group = ranks, group, shard_group
        self.replicas, self.shards = len(ranks), len(ranks[0])
        self.size = self.replicas * self.shards
        places = {rank: (r, s) for r, replica in enumerate(ranks) for s, rank in enumerate(replica)}
        self.replica, self.shard = places[dist.get_rank()]
        #: Per rank in ``group`` its replica and shard.
        self.places = [places[rank] for rank in dist.get_process_group_ranks(group)]
        self.rank = dist.get_rank(group)
        #: Per rank in ``shard_group`` its shard.
        self.shard_order = (
            [0] if shard_group is None else [places[rank][1] for rank in dist.get_process_group_ranks(shard_group)]
        )
        by_place = {place: rank for rank, place in enumerate(self.places)}
        #: Per shard of this replica the rank in ``group``.
        self.shard_ranks = [by_place[self.replica, shard] for shard in range(self.shards)]
        self._replica_group: dist.ProcessGroup | None = None
        self._meshes: dict[str, DeviceMesh] = {}

    def replica_group(self) -> dist.ProcessGroup:
        """A group of the processes that hold the same shards as this one."""
        if self.shards == 1:
            return self.group
        if self._replica_group is None:
            self._replica_group = _group([replica[self.shard] for replica in self.ranks])
        return self._replica_group

    def mesh(self, device_type: str) -> DeviceMesh:
        """A mesh of one dimension over all processes, in the order of ``group``."""
        from torch.distributed.device_mesh import DeviceMesh

        if device_type not in self._meshes:
            self._meshes[device_type] = DeviceMesh.from_group(self.group, device_type)
        return self._meshes[device_type]


class Ownership(NamedTuple):
    """Who works on a parameter that several processes hold.

    The owner, by its rank in ``grid.group``, computes its updates and keeps its state; None: each does so for its
    shard, as for tensors that get AdamW.
    """

    grid: ProcessGrid
    owner: int | None

    @property
    def is_local(self) -> bool:
        """Whether this process has state of the parameter."""
        return self.owner is None or self.owner == self.grid.rank


def is_dtensor(tensor: object) -> bool:
    """Whether this is a DTensor, without importing them: that takes half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a plain tensor itself, a DTensor's local one."""
    if is_dtensor(tensor):
        local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return local
    return tensor


def local_grad(parameter: Tensor) -> Tensor | None:
    """What this process holds of a parameter's gradient, sharded like the parameter."""
    grad = parameter.grad
    if grad is None or not is_dtensor(parameter):
        return grad
    placements = parameter.placements  # type: ignore[attr-defined]
    if is_dtensor(grad) and grad.placements != placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(parameter.device_mesh, placements)  # type: ignore[attr-defined]
    return local_tensor(grad)


class ProcessGrids:
    """The grids of an optimizer's parameters, each made once.

    Args:
        process_group: The processes that hold every plain tensor: a group that this process is in, a mesh of one
            dimension, or None.
    """

    def __init__(self, process_group: object) -> None:
        group = process_group
        if group is not None and type(group).__name__ == "DeviceMesh":
            if group.ndim != 1:  # type: ignore[attr-defined]
                raise ValueError(f"process_group must be a mesh of one dimension, got {group}")
            group = group.get_group()  # type: ignore[attr-defined]
        known = dist.is_available() and (group is None or isinstance(group, dist.ProcessGroup))
        if group is not None and dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group must be a group that this process is in")
        if not known and group is not None:
            raise TypeError(
                f"process_group must be a ProcessGroup, a DeviceMesh or None, got {type(process_group).__name__}"
            )
        self._replicated: ProcessGrid | None = None
        if isinstance(group, dist.ProcessGroup) and dist.get_world_size(group) > 1:
            ranks = dist.get_process_group_ranks(group)
            self._replicated = ProcessGrid([[rank] for rank in ranks], group, None)
        self._of_meshes: dict[tuple[DeviceMesh, tuple[int, ...]], ProcessGrid] = {}

    def __reduce__(self) -> Any:
        if self._replicated is None:
            return ProcessGrids, (None,)
        raise TypeError("a SOAP optimizer with a process_group cannot be pickled; save its state_dict()")

    def of(self, parameter: Tensor) -> ProcessGrid | None:
        """The grid of a parameter; None where this process alone has it, or each works on its own."""
        if not is_dtensor(parameter):
            return self._replicated
        mesh: DeviceMesh = parameter.device_mesh  # type: ignore[attr-defined]
        placements = parameter.placements  # type: ignore[attr-defined]
        if any(placement.is_partial() for placement in placements):
            raise ValueError(f"a parameter must be sharded or replicated on its mesh, got {placements}")
        sharded = tuple(dim for dim, placement in enumerate(placements) if not placement.is_replicate())
        if mesh.size() == 1:
            return None
        if (mesh, sharded) not in self._of_meshes:
            self._of_meshes[mesh, sharded] = _grid_of(mesh, sharded)
        return self._of_meshes[mesh, sharded]


def _grid_of(mesh: DeviceMesh, sharded: tuple[int, ...]) -> ProcessGrid:
    """The grid of a mesh, of which some dimensions are sharded and the others replicated."""
    if mesh.get_coordinate() is None:
        raise ValueError(f"a parameter must be on a mesh that this process is in, got {mesh}")
    replicated = [dim for dim in range(mesh.ndim) if dim not in sharded]
    shards = prod(mesh.size(dim) for dim in sharded)
    table = mesh.mesh.permute(*replicated, *sharded).reshape(-1, shards).tolist()
    group = mesh.get_group() if mesh.ndim == 1 else _group(mesh.mesh.flatten().tolist())
    shard_group = None
    if shards > 1:
        if not replicated:
            shard_group = group
        elif len(sharded) == 1:
            shard_group = mesh.get_group(sharded[0])
        else:
            shard_group = _group(next(replica for replica in table if dist.get_rank() in replica))
    return ProcessGrid(table, group, shard_group)


def _group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A group of these global ranks, made by them alone."""
    world = dist.group.WORLD
    if world is not None and sorted(ranks) == dist.get_process_group_ranks(world):
        return world
    group: dist.ProcessGroup = dist.new_group(list(ranks), use_local_synchronization=True)
    return group


def shards_of(parameter: Tensor, grid: ProcessGrid) -> list[Shard]:
    """Per shard, which part of the parameter it is."""
    if not is_dtensor(parameter):
        return [tuple(slice(0, size) for size in parameter.shape)]
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    cuts = tuple(
        (mesh.size(dim), placement.dim % max(parameter.dim(), 1), int(getattr(placement, "split_factor", 1)))
        for dim, placement in enumerate(placements)
        if not placement.is_replicate()
    )
    return _shards(tuple(parameter.shape), cuts)


@lru_cache(maxsize=1024)
def _shards(shape: tuple[int, ...], cuts: tuple[tuple[int, int, int], ...]) -> list[Shard]:
    """Cuts a tensor of this shape along one mesh dimension after the other.

    Of each sharded dimension are given the number of parts, the tensor's axis, and the split factor: the number of
    parts that the axis is in already when this dimension cuts it, which is how FSDP2 over tensor parallelism writes
    that it cuts last, though its dimension comes first.
    """
    in_turn = sorted(range(len(cuts)), key=lambda cut: cuts[cut][2])
    found = []
    for coordinate in product(*(range(count) for count, *_ in cuts)):
        held = [slice(0, size) for size in shape]
        for cut in in_turn:
            count, axis, _ = cuts[cut]
            held[axis] = _chunk(held[axis], count, coordinate[cut])
        found.append(tuple(held))
    return found


def _chunk(indices: slice, count: int, place: int) -> slice:
    """The one at ``place`` of ``count`` chunks, as ``torch.chunk`` cuts, with empty ones at the end."""
    size = -(-(indices.stop - indices.start) // count)
    start = min(indices.start + place * size, indices.stop)
    return slice(start, min(start + size, indices.stop))


def shape_of(shard: Shard) -> tuple[int, ...]:
    """The shape of a shard."""
    return tuple(part.stop - part.start for part in shard)


def assign_owners(
    groups: Iterable[Mapping[str, Any]], grids: ProcessGrids, known: Mapping[Tensor, Ownership]
) -> dict[Tensor, Ownership]:
    """Who works on every parameter that several processes hold, by their mean costs; those that are known stay.

    Every process comes to the same answer from the parameter list and the options, without asking the others.
    """
    owned: dict[Tensor, Ownership] = {}
    jobs: dict[ProcessGrid, list[tuple[Tensor, float]]] = {}
    loads: dict[ProcessGrid, list[float]] = {}
    for group in groups:
        for parameter in group["params"]:
            grid = grids.of(parameter)
            if grid is None:
                continue
            layout = layout_for(parameter, group)
            cost = mean_flops(layout, refresh_frequency(group["precondition_frequency"], 0))
            ownership = known.get(parameter)
            if ownership is not None:
                owned[parameter] = ownership
                if ownership.owner is not None:
                    loads.setdefault(grid, [0.0] * grid.size)[ownership.owner] += cost
            elif layout.axes:
                jobs.setdefault(grid, []).append((parameter, cost))
            else:
                owned[parameter] = Ownership(grid, None)
    for grid, work in jobs.items():
        owners = share_out([cost for _, cost in work], loads.get(grid, [0.0] * grid.size))
        for (parameter, _), owner in zip(work, owners, strict=True):
            owned[parameter] = Ownership(grid, owner)
    return owned
