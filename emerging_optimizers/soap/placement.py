"""Where parameters live: which processes hold a parameter, in which pieces, and how they are told apart.

The parameters decide, not an option. A DTensor carries its mesh; a plain tensor is on every process of the group that
the optimizer was given, or on this one alone. Either way the processes that share a parameter form a grid: the
processes of a row have each a piece of it, the rows have it once each. Data parallelism (DDP) is a grid of one column,
FSDP2 a grid of one row, HSDP has rows and columns, and a single process is no grid at all.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)

#: A plain 1-D parameter with more elements than this is taken for several that an engine has laid end to end.
LONGEST_VECTOR = 2**20

#: Per axis of a tensor, which of its indices a process has.
Piece = tuple[slice, ...]


class Grid:
    """The processes that hold the same parameters, as rows of columns.

    Args:
        ranks: The global rank of each, ``ranks[row][column]``.
        everyone: A process group of all of them.
        row_group: A group of this process's row; None for a single column.

    Attributes:
        row, column: This process's place.
        size: The number of processes.
        me: This process's number in ``everyone``. Owners are numbered like that.
    """

    def __init__(
        self, ranks: Sequence[Sequence[int]], everyone: dist.ProcessGroup, row_group: dist.ProcessGroup | None
    ) -> None:
        self.ranks, self.everyone, self.row_group = ranks, everyone, row_group
        self.rows, self.columns = len(ranks), len(ranks[0])
        self.size = self.rows * self.columns
        places = {rank: (r, c) for r, row in enumerate(ranks) for c, rank in enumerate(row)}
        self.row, self.column = places[dist.get_rank()]
        #: Per process, numbered as in ``everyone``: its row and column.
        self.places = [places[rank] for rank in dist.get_process_group_ranks(everyone)]
        self.me = dist.get_rank(everyone)
        #: Per process of the row, numbered as in ``row_group``: its column.
        self.row_order = (
            [0] if row_group is None else [places[rank][1] for rank in dist.get_process_group_ranks(row_group)]
        )
        numbers = {place: number for number, place in enumerate(self.places)}
        #: The process in my row and that column, numbered as in ``everyone``.
        self.in_row = [numbers[self.row, column] for column in range(self.columns)]
        self._column_group: dist.ProcessGroup | None = None
        self._meshes: dict[str, DeviceMesh] = {}

    def column_group(self) -> dist.ProcessGroup:
        """A group of this process's column: the processes that hold the same pieces."""
        if self.columns == 1:
            return self.everyone
        if self._column_group is None:
            self._column_group = _group([row[self.column] for row in self.ranks])
        return self._column_group

    def mesh(self, device_type: str) -> DeviceMesh:
        """A mesh of one dimension over all processes, in the order of ``everyone``."""
        from torch.distributed.device_mesh import DeviceMesh

        if device_type not in self._meshes:
            self._meshes[device_type] = DeviceMesh.from_group(self.everyone, device_type)
        return self._meshes[device_type]


class Place(NamedTuple):
    """What this process has to do with a parameter that several hold.

    Attributes:
        grid: The processes that hold it.
        owner: Which of them computes its updates and keeps its state (a number in ``grid.everyone``); None where each
            does so for what it holds, as for tensors that get AdamW.
    """

    grid: Grid
    owner: int | None

    @property
    def mine(self) -> bool:
        """Whether this process has state of the parameter."""
        return self.owner is None or self.owner == self.grid.me


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


def warn_if_flattened(parameter: Tensor, name: str) -> None:
    """Logs a warning for a parameter in which an engine has laid matrices end to end, so that they are gone."""
    by_fsdp1 = type(parameter).__name__ == "FlatParameter" or getattr(parameter, "_fsdp_flattened", False)
    if by_fsdp1 or (parameter.dim() == 1 and parameter.numel() > LONGEST_VECTOR):
        logger.warning(
            "%s is a vector of %d elements%s: its matrices are gone, and it gets plain AdamW. Give SOAP the matrices: "
            "shard with FSDP2 (torch.distributed.fsdp.fully_shard), or pass the unflattened parameters.",
            name,
            parameter.numel(),
            " that FSDP1 made" if by_fsdp1 else "",
        )


class Grids:
    """The grids of an optimizer's parameters, each made once.

    Args:
        process_group: The processes that hold every plain tensor: a group, a mesh of one dimension, or None.

    Raises:
        TypeError: It is something else.
        ValueError: It is a mesh of several dimensions, or this process is not in it.
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
        #: Of the parameters that several processes hold.
        self.places: Mapping[Tensor, Place] = {}
        #: Whether a DTensor has been asked for.
        self.have_dtensors = False
        self._replicated: Grid | None = None
        if isinstance(group, dist.ProcessGroup) and dist.get_world_size(group) > 1:
            ranks = dist.get_process_group_ranks(group)
            self._replicated = Grid([[rank] for rank in ranks], group, None)
        self._of_meshes: dict[tuple[DeviceMesh, tuple[int, ...]], Grid] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Grids:
        """The same processes, which are not copied, and the same places for the copies of the parameters."""
        other = object.__new__(Grids)
        vars(other).update(vars(self))
        other.places = {copy.deepcopy(parameter, memo): place for parameter, place in self.places.items()}
        return other

    def __reduce__(self) -> Any:
        if self._replicated is None:
            return Grids, (None,)
        raise TypeError("a SOAP optimizer with a process_group cannot be pickled; save its state_dict()")

    def of(self, parameter: Tensor) -> Grid | None:
        """The grid of a parameter; None where this process alone has it, or each works on its own.

        Raises:
            ValueError: It is a DTensor that is partial, or on a mesh without this process.
        """
        if not is_dtensor(parameter):
            return self._replicated
        self.have_dtensors = True
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


def _grid_of(mesh: DeviceMesh, sharded: tuple[int, ...]) -> Grid:
    """The grid of a mesh: its sharded dimensions make the columns, the others the rows."""
    if mesh.get_coordinate() is None:
        raise ValueError(f"a parameter must be on a mesh that this process is in, got {mesh}")
    replicated = [dim for dim in range(mesh.ndim) if dim not in sharded]
    columns = prod(mesh.size(dim) for dim in sharded)
    table = mesh.mesh.permute(*replicated, *sharded).reshape(-1, columns).tolist()
    everyone = mesh.get_group() if mesh.ndim == 1 else _group(mesh.mesh.flatten().tolist())
    row_group = None
    if columns > 1:
        if not replicated:
            row_group = everyone
        elif len(sharded) == 1:
            row_group = mesh.get_group(sharded[0])
        else:
            row_group = _group(next(row for row in table if dist.get_rank() in row))
    return Grid(table, everyone, row_group)


def _group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A group of these global ranks, made by them alone."""
    world = dist.group.WORLD
    if world is not None and sorted(ranks) == dist.get_process_group_ranks(world):
        return world
    group: dist.ProcessGroup = dist.new_group(list(ranks), use_local_synchronization=True)
    return group


def pieces(parameter: Tensor, grid: Grid) -> list[Piece]:
    """Per column of the grid, which part of the parameter its processes hold."""
    if not is_dtensor(parameter):
        return [tuple(slice(0, size) for size in parameter.shape)]
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    cuts = tuple(
        (mesh.size(dim), placement.dim % max(parameter.dim(), 1), int(getattr(placement, "split_factor", 1)))
        for dim, placement in enumerate(placements)
        if not placement.is_replicate()
    )
    return _pieces(tuple(parameter.shape), cuts)


@lru_cache(maxsize=1024)
def _pieces(shape: tuple[int, ...], cuts: tuple[tuple[int, int, int], ...]) -> list[Piece]:
    """Cuts a tensor along one mesh dimension after the other.

    Args:
        shape: Its shape.
        cuts: For each sharded mesh dimension the number of parts, the tensor's axis, and the split factor: the number
            of parts that the axis is in already when this dimension cuts it, which is how FSDP2 over tensor
            parallelism writes that it cuts last, though its dimension comes first.
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


def shape_of(piece: Piece) -> tuple[int, ...]:
    """The shape of a piece."""
    return tuple(p.stop - p.start for p in piece)
