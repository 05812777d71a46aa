"""The order of work: local buckets, and rounds in which processes exchange gradients and updates.

Every process knows the whole order, from the parameter list alone. In a round each works on some of the matrices that
it owns. Where tensors are in pieces, the pieces of the gradients come to the owners first and the pieces of the updates
go back; then every process applies what it has. Where rows of processes hold the same, the row of the owner sends its
new weights to the others, so that all have them bit for bit. One process has no rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.mixin import WeightDecayMixin
from emerging_optimizers.precision import fp32_matmul_precision, without_autocast
from emerging_optimizers.soap.algorithm import Update, apply, apply_to_piece, updates_of
from emerging_optimizers.soap.buckets import CHUNK_ELEMENTS, NO_AXIS, Bucket, Kind, batches, chunks_of, form_buckets
from emerging_optimizers.soap.costs import step_flops
from emerging_optimizers.soap.exchange import Spec, Transfer, all_to_all, broadcast
from emerging_optimizers.soap.incidents import count_skips
from emerging_optimizers.soap.placement import Grid, Piece, Place, local_grad, local_tensor, pieces, shape_of
from emerging_optimizers.soap.state import init_elsewhere, working_dtype
from emerging_optimizers.soap.timing import Timetable

Group = dict[str, Any]


class Matrix:
    """A parameter that one process of a grid works on for all.

    Args:
        group: Its parameter group.
        parameter: The parameter.
        grid: The processes.
    """

    def __init__(self, group: Group, parameter: Tensor, grid: Grid) -> None:
        self.group, self.parameter = group, parameter
        self.pieces: list[Piece] = pieces(parameter, grid)
        self.shapes = [shape_of(piece) for piece in self.pieces]
        self.dtype = working_dtype(parameter)

    def grad_piece(self) -> Tensor:
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
        matrices: Per process, numbered as in ``grid.everyone``, the matrices that it works on in this round.
        buckets: Those of this process, with their groups.
    """

    def __init__(
        self, grid: Grid, matrices: Sequence[Sequence[Matrix]], buckets: Sequence[tuple[Group, Bucket]]
    ) -> None:
        self.grid, self.buckets = grid, buckets
        self._all = matrices
        self._gathering: Transfer | None = None
        self._delivery: Transfer | None = None
        self._rows: list[tuple[Transfer, list[Tensor]]] = []

    def _active(self, process: int) -> list[Matrix]:
        """The matrices of a process that have a gradient now."""
        return [matrix for matrix in self._all[process] if matrix.parameter.grad is not None]

    def send_gradients(self) -> None:
        """Starts bringing the pieces of gradients to their owners."""
        grid = self.grid
        if grid.row_group is None:
            return
        by_column = [[matrix.grad_piece() for matrix in self._active(owner)] for owner in grid.in_row]
        dtypes = [grad.dtype for grad in by_column[grid.column]]
        mine = self._active(grid.me)
        outgoing = [by_column[column] for column in grid.row_order]
        incoming = [
            [Spec(m.shapes[column], dtype) for m, dtype in zip(mine, dtypes, strict=True)] for column in grid.row_order
        ]
        self._gathering = all_to_all(grid.row_group, outgoing, incoming, self._device)

    @property
    def _device(self) -> torch.device:
        return next(matrix.parameter.device for some in self._all for matrix in some)

    def gradients(self) -> list[list[Tensor | None]]:
        """The whole gradients of each bucket's members; waits for them."""
        if self._gathering is None:
            return [[local_grad(parameter) for parameter in bucket.parameters] for _, bucket in self.buckets]
        arrived = dict(zip(self.grid.row_order, self._gathering.wait(), strict=True))
        self._gathering = None
        whole: dict[Tensor, Tensor] = {}
        for place, matrix in enumerate(self._active(self.grid.me)):
            grad = arrived[0][place].new_empty(matrix.parameter.shape)
            for column, piece in enumerate(matrix.pieces):
                grad[piece] = arrived[column][place]
            whole[matrix.parameter] = grad
        return [[whole.get(parameter) for parameter in bucket.parameters] for _, bucket in self.buckets]

    def deliver(self, updates: Sequence[Update]) -> None:
        """Starts sending the updates that this process computed to those who have the weights."""
        grid = self.grid
        if grid.row_group is None:
            self._send_rows()
            return
        directions: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for run, direction, finite in updates:
            flags = direction.new_ones(len(run.parameters)) if finite is None else finite.to(direction.dtype)
            for parameter, one, flag in zip(run.parameters, run.split(direction), flags.unbind(), strict=True):
                directions[parameter] = (one, flag)
        mine = self._active(grid.me)
        zero = torch.zeros((), device=self._device)  # one whose gradient was skipped has no update
        outgoing = []
        for column in grid.row_order:
            tensors = []
            for m in mine:
                whole, flag = directions.get(m.parameter, (zero.to(m.dtype).expand(m.parameter.shape), zero))
                tensors += [whole[m.pieces[column]], flag.to(m.dtype)]
            outgoing.append(tensors)
        incoming = [
            [
                spec
                for matrix in self._active(grid.in_row[column])
                for spec in (Spec(matrix.shapes[grid.column], matrix.dtype), Spec((), matrix.dtype))
            ]
            for column in grid.row_order
        ]
        self._delivery = all_to_all(grid.row_group, outgoing, incoming, self._device)

    def finish(self) -> None:
        """Waits for updates that were sent here, and applies them."""
        grid = self.grid
        if self._delivery is not None:
            arrived = self._delivery.wait()
            self._delivery = None
            for column, tensors in zip(grid.row_order, arrived, strict=True):
                for place, matrix in enumerate(self._active(grid.in_row[column])):
                    weight = local_tensor(matrix.parameter)
                    direction, moves = tensors[2 * place : 2 * place + 2]
                    apply_to_piece(weight, direction, moves, matrix.group)
            self._send_rows()

    def settle(self) -> None:
        """Waits for weights that were sent here, and puts them in place."""
        for transfer, weights in self._rows:
            received = transfer.wait()[0]
            if received:
                torch._foreach_copy_(weights, received)
        self._rows = []

    def _send_rows(self) -> None:
        """Starts sending new weights from the rows of their owners to the others."""
        grid = self.grid
        if grid.rows == 1:
            return
        group = grid.column_group()
        for row in range(grid.rows):
            owners = [number for number, (r, _) in enumerate(grid.places) if r == row]
            weights = [local_tensor(matrix.parameter) for owner in owners for matrix in self._active(owner)]
            if weights:
                self._rows.append((broadcast(group, grid.ranks[row][grid.column], weights), weights))


class Plan:
    """Everything that a step does, in order.

    Args:
        groups: The parameter groups.
        states: The optimizer's state; gets an entry for every parameter that has a gradient and none yet.
        places: The place of every parameter that several processes hold.
        former: The plan of the last step, whose buckets are used again where they stand; is emptied.

    Attributes:
        buckets: Per parameter group, those on this process.
        local: The buckets that need no other process, with their groups.
        rounds: Those that do.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        states: dict[Tensor, dict[str, Any]],
        places: Mapping[Tensor, Place],
        former: Plan | None,
    ) -> None:
        self.buckets: list[list[Bucket]] = []
        self.local: list[tuple[Group, Bucket]] = []
        self._elsewhere: list[tuple[Tensor, Tensor]] = []
        jobs: dict[Grid, list[list[Job]]] = {}
        mine: dict[int, Bucket] = {}
        old: list[list[Bucket]] = [[] for _ in groups]
        if former is not None:
            former.local = []  # or no bucket would be freed before all are replaced
            old = former.buckets + old
        for group, former_buckets in zip(groups, old, strict=False):
            held = []
            for kind, owner, chunk in chunks_of(group, states, places):
                if kind.grid is not None and owner is not None:
                    per_owner = jobs.setdefault(kind.grid, [[] for _ in range(kind.grid.size)])
                    per_owner[owner].append((group, kind, chunk))
                    if owner != kind.grid.me:
                        self._leave(group, chunk, states)
                        continue
                held.append((kind, owner, chunk))
            buckets = form_buckets(group, [(kind, chunk) for kind, _, chunk in held], states, former_buckets)
            self.buckets.append(buckets)
            for bucket, (_, owner, _) in zip(buckets, held, strict=True):
                if owner is None:
                    self.local.append((group, bucket))
                else:
                    mine[id(bucket.parameters[0])] = bucket
        #: What the rounds were made of: by identity, since groups and tensors do not compare.
        self._made_of: list[Any] = [
            (grid, owner, id(group), kind, [id(parameter) for _, parameter in chunk])
            for grid, per_owner in jobs.items()
            for owner, some in enumerate(per_owner)
            for group, kind, chunk in some
        ]
        self._made_of += mine.values()
        self.rounds: list[Round]
        if former is not None and former._made_of == self._made_of:
            self.rounds = former.rounds
        else:
            self.rounds = [round_ for grid, per_owner in jobs.items() for round_ in _rounds(grid, per_owner, mine)]

    def _leave(self, group: Group, chunk: list[tuple[int, Tensor]], states: dict[Tensor, dict[str, Any]]) -> None:
        """Parameters for another process to work on: here only their steps are counted."""
        for _, parameter in chunk:
            state = states[parameter]
            if not state:
                init_elsewhere(state, parameter, group)
            self._elsewhere.append((parameter, state["step"]))

    def step(self, groups: Sequence[Group], states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Does everything. While a round is computed the next one's gradients and the last one's updates are under way.

        Args:
            groups: The parameter groups.
            states: The optimizer's state.
        """
        timetables = {id(group): Timetable(group, states) for group in groups}
        skipped: list[Tensor] = []
        steps = [step for parameter, step in self._elsewhere if parameter.grad is not None]
        if steps:
            torch._foreach_add_(steps, 1)
        if self.rounds:
            self.rounds[0].send_gradients()
        for group, bucket in self.local:
            grads = [local_grad(parameter) for parameter in bucket.parameters]
            _work(group, bucket, grads, timetables[id(group)], skipped)
        for number, this in enumerate(self.rounds):
            if number + 1 < len(self.rounds):
                self.rounds[number + 1].send_gradients()
            updates: list[Update] = []
            for (group, bucket), grads in zip(this.buckets, this.gradients(), strict=True):
                updates += _work(group, bucket, grads, timetables[id(group)], skipped)
            this.deliver(updates)
            if number >= 1:
                self.rounds[number - 1].finish()
            if number >= 2:
                self.rounds[number - 2].settle()
        for last in self.rounds[-1:]:
            last.finish()
        for last in self.rounds[-2:]:
            last.settle()
        count_skips(skipped)


def _work(
    group: Group, bucket: Bucket, grads: Sequence[Tensor | None], timetable: Timetable, skipped: list[Tensor]
) -> list[Update]:
    """A step of a bucket; returns the updates that are not for this process alone to apply."""
    updates = []
    precision = fp32_matmul_precision(group["fp32_matmul_prec"])
    with precision, without_autocast(bucket.device.type):
        for run in list(bucket.runs(grads)):
            for update in updates_of(run, group, timetable, skipped):
                if bucket.gathered:
                    updates.append(update)
                else:
                    apply(update, group)
    return updates


Job = tuple[Group, Kind, list[tuple[int, Tensor]]]


def _flops(job: Job) -> int:
    _, kind, chunk = job
    return len(chunk) * step_flops(kind.layout or NO_AXIS)


def _rounds(grid: Grid, per_owner: Sequence[Sequence[Job]], buckets: Mapping[int, Bucket]) -> Iterator[Round]:
    """The rounds of a grid: each process has about as much in one as fits into a bucket.

    Args:
        grid: The grid.
        per_owner: Per process its buckets, as group, kind and members.
        buckets: This process's, by the identity of their first parameter.
    """
    in_turn = [list(_batches(jobs)) for jobs in per_owner]
    for per_process in zip_longest(*in_turn, fillvalue=()):
        matrices = [
            [Matrix(group, parameter, grid) for group, _, chunk in jobs for _, parameter in chunk]
            for jobs in per_process
        ]
        mine = [(group, buckets[id(chunk[0][1])]) for group, _, chunk in per_process[grid.me]]
        yield Round(grid, matrices, mine)


def _batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """The most expensive first, put together as long as they have no more elements than a bucket may have.

    Processes wait for each other in every round. Those that own alike then have alike to do in each.
    """
    in_turn = sorted(jobs, key=_flops, reverse=True)
    return batches(in_turn, lambda job: sum(parameter.numel() for _, parameter in job[2]), CHUNK_ELEMENTS)
