"""What a step of SOAP costs each of N processes: work, state and bytes, from shapes alone.

Who owns what, which axes have factors, when they are refreshed and which matrices go together in a round is not
modelled but asked of the package itself, with parameters on torch's "meta" device. What is modelled: FLOPs per matrix
(``soap/ownership.py``, ``soap/timing.py``) and the bytes of ``soap/rounds.py``. Counts are per step and process,
vectors over the processes. Nothing here allocates a weight. What it comes to in seconds: ``machines.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.parameter_sets import Weight
from emerging_optimizers.soap.buckets import chunks_of
from emerging_optimizers.soap.costs import carry_flops, step_flops
from emerging_optimizers.soap.state import Layout, layout_for
from emerging_optimizers.soap.ownership import place_parameters
from emerging_optimizers.soap.placement import Place
from emerging_optimizers.soap.rounds import _batches
from emerging_optimizers.soap.state import meta_state, working_dtype
from emerging_optimizers.soap.due import refresh_offsets


class Mesh(NamedTuple):
    """Processes in rows of columns: a row has each parameter once, in pieces; process = row * columns + column."""

    rows: int
    columns: int

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.rows * self.columns


def mesh_of(placement: str, processes: int, shard: int = 8) -> Mesh:
    """The mesh of "ddp", "fsdp" or "hsdp", the latter with shards over ``shard`` processes."""
    columns = {"ddp": 1, "fsdp": processes, "hsdp": min(shard, processes)}[placement]
    if processes % columns:
        raise ValueError(f"processes must be a multiple of the {columns} of a row, got {processes}")
    return Mesh(processes // columns, columns)


class Options(NamedTuple):
    """SOAP's options that cost something, and the dtype of weights and gradients."""

    frequency: int = 10
    max_precond_dim: int = 10_000
    merge_dims: bool = False
    pack_factors: bool = False
    state_dtype: torch.dtype | None = None
    dtype: torch.dtype = torch.float32


class Member(NamedTuple):
    """A parameter.

    Attributes:
        owner: The process that works on it; None: each on what it holds.
        round: In which it does so.
        places: Of its preconditioned axes in the refresh period.
        state: Bytes of its whole state; ``factors`` those of factors and bases, ``moments`` those of both moments.
    """

    shape: tuple[int, ...]
    layout: Layout
    owner: int | None
    round: int
    places: tuple[int, ...]
    state: int
    factors: int
    moments: int


class Division(NamedTuple):
    """The work of a step, divided."""

    mesh: Mesh
    options: Options
    members: list[Member]
    rounds: int
    flat_buckets: int

    @property
    def slack(self) -> int:
        """How many rounds a process may be ahead of the others: ``rounds.Plan`` waits for the last but ``slack``.

        Updates are waited for one round after the own ones were sent, whole weights two rounds after.
        """
        return 2 if self.mesh.columns == 1 else 1


class _Meshes:
    """Stands for the package's ``Grids``: all parameters are on one mesh, which nobody has to be connected to."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def of(self, parameter: Tensor) -> Mesh | None:
        return self._mesh if self._mesh.size > 1 else None


def divide(weights: Sequence[Weight], options: Options, mesh: Mesh) -> Division:
    """Has the package divide a model: preconditioned weights in one group, the others in a second one."""
    groups = [_group(weights, options, True), _group(weights, options, False)]
    meshes: Any = _Meshes(mesh)
    owners = {parameter: place.owner for parameter, place in place_parameters(groups, meshes, {}).items()}
    jobs: list[list[Any]] = [[] for _ in range(mesh.size)]
    flat_buckets = 0
    for group in groups:
        states: Any = {parameter: {"step": None} for parameter in group["params"]}
        in_place: Any = {p: Place(mesh, owners[p]) for p in group["params"] if p in owners}  # type: ignore[arg-type]
        for kind, owner, chunk in chunks_of(group, states, in_place):
            flat_buckets += kind.layout is None
            if owner is not None:
                jobs[owner].append((group, kind, chunk))
    rounds: dict[Tensor, int] = {}
    for own in jobs:
        for number, batch in enumerate(_batches(own)):
            rounds.update({parameter: number for _, _, chunk in batch for _, parameter in chunk})
    members = []
    for group in groups:
        for parameter in group["params"]:
            layout = layout_for(parameter, group)
            owner = owners.get(parameter, 0 if layout.axes else None)
            together = (0,) * len(layout.axes)
            number = rounds.get(parameter, 0)
            members.append(Member(tuple(parameter.shape), layout, owner, number, together, *_bytes(parameter, group)))
    return Division(mesh, options, members, 1 + max(rounds.values(), default=0), flat_buckets)


def _bytes(parameter: Tensor, group: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes of the whole state, of factors and bases, and of the moments."""
    sizes = {key: value.numel() * value.dtype.itemsize for key, value in meta_state(parameter, group).items()}
    factors = sum(size for key, size in sizes.items() if key.startswith(("GG_", "Q_")))
    return sum(sizes.values()), factors, sizes["exp_avg"] + sizes["exp_avg_sq"]


def _group(weights: Sequence[Weight], options: Options, preconditioned: bool) -> dict[str, Any]:
    chosen = [weight.shape for weight in weights if weight.preconditioned == preconditioned]
    return {
        "params": [torch.empty(shape, dtype=options.dtype, device="meta") for shape in chosen],
        "max_precond_dim": options.max_precond_dim if preconditioned else 0,
        "precondition_1d": False,
        "merge_dims": options.merge_dims,
        "pack_factors": options.pack_factors,
        "state_dtype": options.state_dtype,
        "precondition_frequency": options.frequency,
    }


def stagger(division: Division, processes: int | None = None) -> Division:
    """Spreads the refreshes over the period, as ``stagger_updates`` does.

    Args:
        division: The division.
        processes: For how many processes the places are made; None: for those of the division. With 1, each step has
            the same work summed over all processes, which then wait for the few that refresh something large.
    """
    members = division.members
    layouts = tuple(member.layout for member in members)
    places = refresh_offsets(layouts, division.options.frequency, processes or division.mesh.size)
    moved = [member._replace(places=place) for member, place in zip(members, places, strict=True)]
    return division._replace(members=moved)


#: What a process has of a parameter that another one works on: ``step``.
STEP_BYTES = 8


# --- state and bytes ------------------------------------------------------------------------------------------------


def state_bytes(division: Division) -> Tensor:
    """Bytes of optimizer state per process, counters included, int64 (N,)."""
    total = torch.zeros(division.mesh.size, dtype=torch.int64)
    for member in division.members:
        if member.owner is None:  # the moments of a piece, the counters everywhere
            held = piece_sizes(member.shape, division.mesh)
            total += member.state - member.moments + member.moments // prod(member.shape) * held
        else:
            total += STEP_BYTES
            total[member.owner] += member.state - STEP_BYTES
    return total


def factor_bytes(division: Division) -> Tensor:
    """Bytes of factors and bases alone, int64 (N,)."""
    total = torch.zeros(division.mesh.size, dtype=torch.int64)
    for member in division.members:
        if member.owner is not None:
            total[member.owner] += member.factors
    return total


@lru_cache(maxsize=256)
def piece_sizes(shape: tuple[int, ...], mesh: Mesh) -> Tensor:
    """Elements of a parameter that each process holds, cut along the first axis as ``torch.chunk`` does, int64 (N,)."""
    if mesh.columns == 1:
        return torch.full((mesh.size,), prod(shape))
    rows = -(-shape[0] // mesh.columns)
    column = torch.arange(mesh.size) % mesh.columns
    return (shape[0] - rows * column).clamp(0, rows) * prod(shape[1:])


class Traffic(NamedTuple):
    """What travels in a step: bytes per process, int64 (N,), and how many collectives there are.

    A broadcast counts once for its sender, however many receive it, as in ``exchange.sent``.
    """

    sent: Tensor
    received: Tensor
    broadcast_sent: Tensor
    broadcast_received: Tensor
    all_to_alls: int
    broadcasts: int
    all_reduces: int

    @property
    def all_sent(self) -> Tensor:
        """By all-to-all and by broadcast."""
        return self.sent + self.broadcast_sent

    @property
    def all_received(self) -> Tensor:
        """By all-to-all and by broadcast."""
        return self.received + self.broadcast_received


def traffic(division: Division) -> Traffic:
    """The bytes of a step. Gradients and weights travel in their own dtype, updates in float32 with a flag each."""
    mesh, dtype = division.mesh, division.options.dtype
    sent, received, out, into = torch.zeros(4, mesh.size, dtype=torch.int64)
    row = torch.arange(mesh.size) // mesh.columns
    rows_in_rounds = set()
    for member in division.members:
        if member.owner is None or mesh.size == 1:
            continue
        pieces = piece_sizes(member.shape, mesh)
        others = torch.arange(mesh.size) != member.owner
        if mesh.columns > 1:
            gradients = _aligned(pieces * dtype.itemsize) * others * (row == row[member.owner])
            working = working_dtype(torch.empty(0, dtype=dtype)).itemsize
            updates = (_aligned(pieces * working) + _aligned(torch.tensor(working))) * others
            updates *= row == row[member.owner]
            sent += gradients
            received += updates
            sent[member.owner] += updates.sum()
            received[member.owner] += gradients.sum()
        if mesh.rows > 1:
            weights = _aligned(pieces * dtype.itemsize)
            out += weights * (row == row[member.owner])
            into += weights * (row != row[member.owner])
            rows_in_rounds.add((member.round, int(row[member.owner])))
    apart = mesh.columns > 1
    return Traffic(
        sent, received, out, into, 2 * division.rounds * apart, len(rows_in_rounds), division.flat_buckets * apart
    )


def _aligned(sizes: Tensor) -> Tensor:
    """As ``exchange.Spec.bytes``."""
    return (sizes + 7) // 8 * 8


# --- work and time --------------------------------------------------------------------------------------------------

#: Kinds of work, the rows of :func:`work`: FLOPs in products at SOAP's precision ("high": TensorFloat-32 on a GPU), in
#: float32 products, in QR decompositions; elements of elementwise Adam.
KINDS = ("products", "full_products", "decompositions", "elements")


def step_work(layout: Layout) -> list[int]:
    """Of a matrix in every step, per kind."""
    return [step_flops(layout), 0, 0, prod(layout.shape)]


def refresh_work(layout: Layout, axis: int) -> list[int]:
    """Of the refresh of one axis, per kind; the FLOPs add up to ``costs.refresh_flops``."""
    size = layout.shape[axis]
    return [carry_flops(size, prod(layout.shape)), 2 * size**3, 4 * size**3, 0]


def work(division: Division) -> Tensor:
    """What each process does in each round of each step of a period, per kind: float64 (kind, step, round, process).

    Tensors that get AdamW, which come before the rounds, are counted in the first.
    """
    sizes = (len(KINDS), division.options.frequency, division.rounds, division.mesh.size)
    total = torch.zeros(sizes, dtype=torch.float64)
    for member in division.members:
        if member.owner is not None:
            layout, mine = member.layout, total[:, :, member.round, member.owner]
            mine += torch.tensor(step_work(layout), dtype=torch.float64).unsqueeze(1)
            for axis, place in zip(layout.axes, member.places, strict=True):
                mine[:, place] += torch.tensor(refresh_work(layout, axis), dtype=torch.float64)
        else:
            total[3, :, 0] += piece_sizes(member.shape, division.mesh)
    return total


def flops(division: Division) -> Tensor:
    """FLOPs, those of all kinds alike: float64 (step, round, process)."""
    return work(division)[:3].sum(0)


def slowest(loads: Tensor, slack: int) -> Tensor:
    """When the last process is done with each step: (step,) from loads (step, round, process).

    Before a round a process waits until all others are done with the one ``slack + 1`` rounds before it.
    """
    done = [torch.zeros_like(loads[:, 0])] * (slack + 1)
    for load in loads.unbind(1):
        done.append(torch.maximum(done[-1], done[-1 - slack].amax(1, keepdim=True)) + load)
    return done[-1].amax(1)


class Balance(NamedTuple):
    """How evenly work lies.

    Attributes:
        ranks: Mean work of the busiest process over that of all.
        steps: Work of all processes in the busiest step over that in the mean one.
        within_steps: The busiest process over the mean one, in the step where that is worst.
        critical_path: Mean time of a step, waiting for the slowest process included, over the mean work of a process.
        worst_step: Time of the longest step over the same.
        times: Time of each step over the same.
    """

    ranks: float
    steps: float
    within_steps: float
    critical_path: float
    worst_step: float
    times: list[float]


def balance(division: Division) -> Balance:
    """The balance of FLOPs."""
    loads = flops(division)
    per_process = loads.sum(1)
    mean = per_process.mean()
    times = slowest(loads, division.slack) / mean
    return Balance(
        float(per_process.mean(0).max() / mean),
        float(per_process.mean(1).max() / mean),
        float((per_process.amax(1) / per_process.mean(1)).max()),
        float(times.mean()),
        float(times.max()),
        times.tolist(),
    )
