"""Rounds, in which processes exchange gradients and updates.

Every process knows the whole order of work, from the parameter list alone. In a round each works on some of the
parameters that it owns. Where they are sharded, the shards of the gradients come to the owners first and the shards of
the updates go back; then every process applies what it has. Where there are replicas, the replica of the owner sends
its new weights to the others, so that all have them bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.mixin import WeightDecayMixin
from emerging_optimizers.soap.costs import step_flops
from emerging_optimizers.soap.distributed.collectives import Spec, Transfer, all_to_all, batches, broadcast
from emerging_optimizers.soap.distributed.grid import ProcessGrid, local_grad, local_tensor, shape_of, shards_of
from emerging_optimizers.soap.stacks import MOST_ELEMENTS, Kind, Member, Run, StackedState, move_weights
from emerging_optimizers.soap.state import working_dtype

Group = Mapping[str, Any]
#: A stack to be: parameter group, kind and members.
Job = tuple[Group, Kind, list[Member]]
#: Of whom, what is subtracted, and which of them take part.
Update = tuple[Run, Tensor, Tensor | None]


class OwnedParameter:
    """A parameter that one process of a grid works on for all."""

    def __init__(self, group: Group, parameter: Tensor, grid: ProcessGrid) -> None:
        self.group, self.parameter = group, parameter
        self.shards = shards_of(parameter, grid)
        self.shapes = [shape_of(shard) for shard in self.shards]
        self.dtype = working_dtype(parameter)

    def grad_shard(self) -> Tensor:
        """What this process has of the gradient, with the "l2" penalty, which its owner could not add."""
        grad = local_grad(self.parameter)
        assert grad is not None
        if self.group["weight_decay_method"] == "l2" and self.group["weight_decay"] != 0:
            sign = -1 if self.group["maximize"] else 1  # the owner will turn the gradient round, but not the penalty
            weight = local_tensor(self.parameter).to(self.dtype)
            return sign * WeightDecayMixin.regularized_grad(sign * grad.to(self.dtype), weight, self.group)
        return grad


class Round:
    """What the processes of a grid do together.

    Args:
        grid: The processes.
        owned: The parameters that each of them works on in this round.
        stacks: Those of this process.
    """

    def __init__(
        self,
        grid: ProcessGrid,
        owned: Sequence[Sequence[OwnedParameter]],
        stacks: Sequence[StackedState],
    ) -> None:
        self.grid, self.stacks = grid, stacks
        self._owned = owned
        self._gathering: Transfer | None = None
        self._delivery: Transfer | None = None
        self._replicas: list[tuple[Transfer, list[Tensor]]] = []

    def _active(self, owner: int) -> list[OwnedParameter]:
        """The parameters of a process that have a gradient now."""
        return [one for one in self._owned[owner] if one.parameter.grad is not None]

    def send_gradients(self) -> None:
        """Starts bringing the shards of gradients to their owners."""
        grid = self.grid
        if grid.shard_group is None:
            return
        by_shard = [[one.grad_shard() for one in self._active(owner)] for owner in grid.shard_ranks]
        dtypes = [grad.dtype for grad in by_shard[grid.shard]]
        own = self._active(grid.rank)
        outgoing = [by_shard[shard] for shard in grid.shard_order]
        incoming = [
            [Spec(one.shapes[shard], dtype) for one, dtype in zip(own, dtypes, strict=True)]
            for shard in grid.shard_order
        ]
        self._gathering = all_to_all(grid.shard_group, outgoing, incoming, self._device)

    @property
    def _device(self) -> torch.device:
        return next(one.parameter.device for some in self._owned for one in some)

    def gradients(self) -> dict[Tensor, Tensor]:
        """The whole gradients of this process's parameters; waits for them."""
        own = self._active(self.grid.rank)
        whole: dict[Tensor, Tensor] = {}
        if self._gathering is None:
            for one in own:
                grad = local_grad(one.parameter)
                assert grad is not None
                whole[one.parameter] = grad
            return whole
        arrived = dict(zip(self.grid.shard_order, self._gathering.wait(), strict=True))
        self._gathering = None
        for place, one in enumerate(own):
            grad = arrived[0][place].new_empty(one.parameter.shape)
            for number, shard in enumerate(one.shards):
                grad[shard] = arrived[number][place]
            whole[one.parameter] = grad
        return whole

    def deliver(self, updates: Sequence[Update]) -> None:
        """Applies the updates that this process computed, or starts sending them to those who have the weights."""
        grid = self.grid
        if grid.shard_group is None:
            for run, update, finite in updates:
                run.move(update, finite)
            self._send_replicas()
            return
        of: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for run, update, finite in updates:
            flags = update.new_ones(len(update)) if finite is None else finite.to(update.dtype)
            for member, one, flag in zip(run.members, update, flags, strict=True):
                of[member.parameter] = (one.reshape(member.parameter.shape), flag)
        own = self._active(grid.rank)
        outgoing = [
            [tensor for one in own for tensor in (of[one.parameter][0][one.shards[shard]], of[one.parameter][1])]
            for shard in grid.shard_order
        ]
        incoming = [
            [
                spec
                for one in self._active(grid.shard_ranks[shard])
                for spec in (Spec(one.shapes[grid.shard], one.dtype), Spec((), one.dtype))
            ]
            for shard in grid.shard_order
        ]
        self._delivery = all_to_all(grid.shard_group, outgoing, incoming, self._device)

    def finish(self) -> None:
        """Waits for updates that were sent here, and applies them."""
        grid = self.grid
        if self._delivery is not None:
            arrived = self._delivery.wait()
            self._delivery = None
            for shard, tensors in zip(grid.shard_order, arrived, strict=True):
                for place, one in enumerate(self._active(grid.shard_ranks[shard])):
                    update, moves = tensors[2 * place : 2 * place + 2]
                    move_weights([local_tensor(one.parameter)], update.unsqueeze(0), moves.unsqueeze(0), one.group)
            self._send_replicas()

    def settle(self) -> None:
        """Waits for weights that were sent here, and puts them in place."""
        for transfer, weights in self._replicas:
            received = transfer.wait()[0]
            if received:
                torch._foreach_copy_(weights, received)
        self._replicas = []

    def _send_replicas(self) -> None:
        """Starts sending new weights from the replicas of their owners to the others."""
        grid = self.grid
        if grid.replicas == 1:
            return
        group = grid.replica_group()
        for replica in range(grid.replicas):
            owners = [rank for rank, (r, _) in enumerate(grid.places) if r == replica]
            weights = [local_tensor(one.parameter) for owner in owners for one in self._active(owner)]
            if weights:
                self._replicas.append((broadcast(group, grid.ranks[replica][grid.shard], weights), weights))


def rounds_of(grid: ProcessGrid, jobs: Sequence[Sequence[Job]], stacks: Mapping[int, StackedState]) -> Iterator[Round]:
    """The rounds of a grid: each process has about as much in one as fits into a stack.

    ``jobs`` are the stacks of each process; ``stacks`` has this one's, by the identity of their first parameter.
    """
    in_turn = [list(_batches(of_process)) for of_process in jobs]
    for per_process in zip_longest(*in_turn, fillvalue=()):
        owned = [
            [OwnedParameter(group, member.parameter, grid) for group, _, members in some for member in members]
            for some in per_process
        ]
        here = [stacks[id(members[0].parameter)] for _, _, members in per_process[grid.rank]]
        yield Round(grid, owned, here)


def _batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """The most expensive first, put together as long as they have no more elements than a stack may have.

    Processes wait for each other in every round. Those that own alike then have alike to do in each.
    """
    in_turn = sorted(jobs, key=lambda job: len(job[2]) * step_flops(job[1].layout), reverse=True)
    return batches(in_turn, lambda job: sum(member.parameter.numel() for member in job[2]), MOST_ELEMENTS)
