"""State dicts of parameters that several processes hold: every tensor whole, as a DTensor, whoever worked on it.

A state dict must not depend on who owned what, or it could not be loaded by another number of processes. So each owner
hands out its tensors in equal shares of rows, ``Shard(0)`` on a mesh of all processes that hold the parameter, and
distributed checkpointing can save each share once and cut them anew when loading. Counters are the same on all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from emerging_optimizers.soap.distributed.collectives import Spec, all_to_all, batches, spec_of
from emerging_optimizers.soap.distributed.grid import Ownership, ProcessGrid, is_dtensor, shards_of
from emerging_optimizers.soap.stacks import MOST_ELEMENTS
from emerging_optimizers.soap.state import HOST_KEYS, meta_state

State = dict[str, Any]


def share_states(
    groups: Sequence[Mapping[str, Any]], states: Mapping[Tensor, State], owned: Mapping[Tensor, Ownership]
) -> dict[Tensor, State]:
    """What a state dict has per parameter with a state: copies, the same keys on all processes. A collective."""
    shared: dict[Tensor, State] = {}
    entries: dict[ProcessGrid, list[tuple[Tensor, int, State]]] = {}
    for group in groups:
        for parameter in group["params"]:
            state = states.get(parameter)
            if not state:
                continue
            ownership = owned.get(parameter)
            if ownership is not None and ownership.owner is not None:
                entry = (parameter, ownership.owner, meta_state(parameter, group))
                entries.setdefault(ownership.grid, []).append(entry)
            elif is_dtensor(parameter):
                shared[parameter] = {
                    key: _like(parameter, value.clone()) if key.startswith("exp_avg") else value.clone()
                    for key, value in state.items()
                }
            else:
                shared[parameter] = {key: value.clone() for key, value in state.items()}
    for grid, of_grid in entries.items():
        for batch in batches(of_grid, _elements, MOST_ELEMENTS * grid.size):  # bounds the extra memory
            shared.update(_hand_out(batch, states, grid))
    # Not in the order of the states, which differs between processes: torch gathers full state dicts in this order.
    return {p: shared[p] for group in groups for p in group["params"] if p in shared}


def _like(parameter: Any, local: Tensor) -> Tensor:
    """A DTensor sharded like the parameter."""
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def _elements(entry: tuple[Tensor, int, State]) -> int:
    return sum(value.numel() for value in entry[2].values())


def _hand_out(
    batch: Sequence[tuple[Tensor, int, State]], states: Mapping[Tensor, State], grid: ProcessGrid
) -> Iterator[tuple[Tensor, State]]:
    """Sends this process's share of every tensor to it, and puts them together as DTensors."""
    from torch.distributed.tensor import DTensor, Shard

    outgoing: list[list[Tensor]] = [[] for _ in range(grid.size)]
    incoming: list[list[Spec]] = [[] for _ in range(grid.size)]
    device = batch[0][0].device
    for parameter, owner, wanted in batch:
        for key, template in wanted.items():
            if key != "step":
                incoming[owner].append(spec_of(_share(template, grid, grid.rank)))
                if owner == grid.rank:
                    value = states[parameter][key].to(device)
                    for process in range(grid.size):
                        outgoing[process].append(_share(value, grid, process))
    arrived = [iter(tensors) for tensors in all_to_all(grid.group, outgoing, incoming, device).wait()]
    for parameter, owner, wanted in batch:
        state: State = {}
        for key, template in wanted.items():
            if key == "step":
                state[key] = states[parameter][key].clone()
                continue
            share = next(arrived[owner]).clone()  # or the buffer would live as long as any part of it
            if template.dim() == 0:
                state[key] = share.to("cpu" if key in HOST_KEYS else device)
            else:
                mesh = grid.mesh(device.type)
                state[key] = DTensor.from_local(
                    share, mesh, [Shard(0)], run_check=False, shape=template.shape, stride=template.stride()
                )
        yield parameter, state


def _share(tensor: Tensor, grid: ProcessGrid, process: int) -> Tensor:
    """The rows of a tensor that ``Shard(0)`` gives a process; all of a 0-D tensor."""
    if tensor.dim() == 0:
        return tensor
    rows = -(-tensor.shape[0] // grid.size)
    return tensor[process * rows : (process + 1) * rows]


def held_part(value: Any, name: str, key: str, parameter: Tensor, ownership: Ownership | None) -> Tensor:
    """What this process keeps of a tensor of a loaded state: all, its shard, or nothing. May be a collective.

    Args:
        value: The tensor, whole: a plain one, or a DTensor in any placement.
        name: What an error calls it.
        key: Its key.
        parameter: The parameter.
        ownership: Who works on the parameter; None: this process alone has it.

    Raises:
        ValueError: A file that one process wrote has that process's shares and says so in the mesh's coordinates.
            Loaded by another they would pass for its own, and the tensor be put together from one share many times.
    """
    of_shard = (
        ownership is not None and ownership.owner is None and ownership.grid.shards > 1 and key.startswith("exp_avg")
    )
    whole: Tensor = value
    if is_dtensor(value):
        # Before any operation on it, which would give it this process's own mesh, if that is equal.
        mesh, placements = value.device_mesh, value.placements
        coordinate = mesh.get_coordinate()
        own = dist.is_initialized() and (coordinate is None or int(mesh.mesh[tuple(coordinate)]) == dist.get_rank())
        if not own and not all(placement.is_replicate() for placement in placements):
            raise ValueError(
                f"{name} has the share of another process alone: the file was written by one process, from a "
                "state_dict() of which each has a share. Save with torch.distributed.checkpoint, or without "
                "process_group"
            )
        if of_shard and (mesh, placements) == (parameter.device_mesh, parameter.placements):  # type: ignore[attr-defined]
            shard: Tensor = value.detach().to_local()
            return shard
        whole = value.detach().to(mesh.device_type).full_tensor()  # where its mesh can communicate
    if ownership is None:
        return whole
    if of_shard:
        return whole[shards_of(parameter, ownership.grid)[ownership.grid.shard]]
    return whole if ownership.is_local or key == "step" else whole.new_zeros(0)
