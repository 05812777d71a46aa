"""What a step of SOAP costs each of N processes: work, state and bytes of ``emerging_optimizers.plan``, divided.

What a matrix costs, and who owns it, is what the package itself says of its shape. Added here are the processes of a
mesh, what travels between them, and a machine's rates. Nothing allocates a weight.
"""

from collections.abc import Mapping
from functools import lru_cache
from math import log2, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import Shape, gpt
from emerging_optimizers.plan import Model, load_model, model_of, plan
from emerging_optimizers.soap.costs import mean_flops, refresh_flops, share_out, step_flops
from emerging_optimizers.soap.due import refresh_offsets
from emerging_optimizers.soap.state import Layout


def gpt_model(width: int, layers: int, vocabulary: int, context: int) -> Mapping[str, Shape]:
    """Names and shapes of a GPT with learned positions, a head tied to the embedding and no biases."""
    model: dict[str, Shape] = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    for layer in range(layers):
        names = [f"h.{layer}.{name}.weight" for name in ("qkv", "out", "up", "down", "norm1", "norm2")]
        model |= zip(names, [*gpt(width, 1), (width,), (width,)], strict=True)
    return model | {"norm.weight": (width,)}


@lru_cache
def model(name: str) -> Model:
    """One of the models of ``docs/scale.md``."""
    presets = {"GPT-2 124M": "gpt2", "Llama-3 8B": "llama-3-8b", "Llama-3 70B": "llama-3-70b"}
    return load_model(presets[name]) if name in presets else model_of(gpt_model(2048, 24, 50257, 2048), name=name)


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
    return Mesh(processes // columns, columns)


class Division(NamedTuple):
    """The work of a step, divided.

    Attributes:
        mesh: The processes.
        frequency: Steps of a refresh period.
        owners: The shape, itemsize, layout and owner of each preconditioned parameter.
        places: Of its preconditioned axes in the period.
        elements: Of AdamW's parameters at each process, int64 (N,).
        state: Bytes of optimizer state of each process, int64 (N,).
    """

    mesh: Mesh
    frequency: int
    owners: list[tuple[Shape, int, Layout, int]]
    places: list[tuple[int, ...]]
    elements: Tensor
    state: Tensor


def divide(described: Model | Mapping[str, Shape], mesh: Mesh, **options: Any) -> Division:
    """Divides a model as the package does; ``options`` are SOAP's."""
    described = model_of(described)
    whole = plan(described, **options)
    chosen = [bool(row.layout.axes) for row in whole.rows]
    state, elements = torch.zeros(2, mesh.size, dtype=torch.int64)
    for preconditioned, ranks in ((True, mesh.size), (False, mesh.columns)):  # AdamW's are whole in each row
        kept = [place for place, choice in enumerate(chosen) if choice == preconditioned]
        part = Model(described.name, *(tuple(full[k] for k in kept) for full in (described.routes, described.dtypes)))
        shares = plan(part, ranks=ranks, sharded=mesh.columns > 1, **options).shares
        state += torch.tensor([share.state_bytes for share in shares]).repeat(mesh.size // ranks)
    rows = [row for row, choice in zip(whole.rows, chosen, strict=True) if choice]
    owners = share_out([mean_flops(row.layout, whole.frequency) for row in rows], [0.0] * mesh.size)
    for row in whole.rows:
        if not row.layout.axes:
            elements += piece_sizes(row.shape, mesh)
    owned = [(row.shape, row.dtype.itemsize, row.layout, owner) for row, owner in zip(rows, owners, strict=True)]
    return Division(mesh, whole.frequency, owned, [(0,) * len(row.layout.axes) for row in rows], elements, state)


def stagger(division: Division, processes: int | None = None) -> Division:
    """Spreads the refreshes over the period, as ``stagger_updates`` does on so many processes."""
    layouts = tuple(layout for _, _, layout, _ in division.owners)
    places = refresh_offsets(layouts, division.frequency, processes or division.mesh.size)
    return division._replace(places=list(places))


@lru_cache(maxsize=256)
def piece_sizes(shape: Shape, mesh: Mesh) -> Tensor:
    """Elements of a parameter that each process holds, cut along the first axis as ``torch.chunk`` does, int64 (N,)."""
    if mesh.columns == 1:
        return torch.full((mesh.size,), prod(shape))
    rows = -(-shape[0] // mesh.columns)
    column = torch.arange(mesh.size) % mesh.columns
    return (shape[0] - rows * column).clamp(0, rows) * prod(shape[1:])


class Traffic(NamedTuple):
    """Bytes per process and step, int64 (N,): in rows by all-to-all, between rows by broadcast, counted once."""

    sent: Tensor
    received: Tensor
    broadcast_sent: Tensor
    broadcast_received: Tensor


def traffic(division: Division) -> Traffic:
    """The bytes of a step. Gradients and weights travel in their own dtype, updates in float32 with a flag each."""
    mesh = division.mesh
    sent, received, out, into = torch.zeros(4, mesh.size, dtype=torch.int64)
    row = torch.arange(mesh.size) // mesh.columns
    for shape, itemsize, _, owner in division.owners:
        pieces, own_row = piece_sizes(shape, mesh), row == row[owner]
        if mesh.columns > 1:
            others = own_row * (torch.arange(mesh.size) != owner)
            gradients, updates = _aligned(pieces * itemsize) * others, (_aligned(pieces * 4) + 8) * others
            sent += gradients
            received += updates
            sent[owner] += updates.sum()
            received[owner] += gradients.sum()
        if mesh.rows > 1:
            out += _aligned(pieces * itemsize) * own_row
            into += _aligned(pieces * itemsize) * ~own_row
    return Traffic(sent, received, out, into)


def _aligned(sizes: Tensor) -> Tensor:
    """Tensors that travel together start at multiples of 8 bytes."""
    return (sizes + 7) // 8 * 8


def work(division: Division) -> Tensor:
    """What each process does in each step of a period: float64 (3, step, process).

    FLOPs of a step, FLOPs of refreshes, elements of elementwise Adam.
    """
    total = torch.zeros(3, division.frequency, division.mesh.size, dtype=torch.float64)
    total[2] += division.elements
    for (shape, _, layout, owner), places in zip(division.owners, division.places, strict=True):
        total[0, :, owner] += step_flops(layout)
        total[2, :, owner] += prod(shape)
        for axis, place in zip(layout.axes, places, strict=True):
            total[1, place, owner] += refresh_flops(layout, axis)
    return total


class Balance(NamedTuple):
    """How evenly FLOPs lie.

    Attributes:
        ranks: Mean work of the busiest process over that of all.
        steps: Work of all processes in the busiest step over that in the mean one.
        within_steps: The busiest process over the mean one, in the step where that is worst.
        critical_path: Mean time of a step, which is that of its busiest process, over the mean work of a process.
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
    """The balance of a division."""
    loads = work(division)[:2].sum(0)
    mean = loads.mean()
    times = loads.amax(1) / mean
    ratios = loads.mean(0).max() / mean, loads.mean(1).max() / mean, (loads.amax(1) / loads.mean(1)).max()
    return Balance(*map(float, ratios), float(times.mean()), float(times.max()), times.tolist())


# --- seconds ----------------------------------------------------------------------------------------------------------


class Machine(NamedTuple):
    """Rates of one process. FLOPs, elements and bytes per second; seconds.

    Attributes:
        products, refreshes, elements: Of the three kinds of :func:`work`.
        node: How many processes have the fast link among themselves.
        fast, slow: Bytes per second that a process sends, and at the same time receives, inside and between nodes.
        latency: Of a collective.
        hop: More of it per doubling of the processes of a broadcast, and per peer of an all-to-all.
        cores: If processes share cores, how many there are; None: each has its own.
        source: Where the figures come from.
    """

    products: float
    refreshes: float
    elements: float
    node: int
    fast: float
    slow: float
    latency: float
    hop: float
    cores: int | None
    source: str


#: Nothing has been run on a GPU: these are data sheets times guessed efficiencies.
H100 = Machine(
    products=0.5 * 495e12,
    refreshes=10e12,
    elements=0.8 * 3.35e12 / 80,
    node=8,
    fast=0.8 * 450e9,
    slow=0.8 * 50e9,
    latency=20e-6,
    hop=2e-6,
    cores=None,
    source=(
        "ASSUMED, not measured. NVIDIA's H100 SXM data sheet: 495 TFLOP/s dense TensorFloat-32 at a guessed 50%, "
        "memory 3.35 TB/s at a guessed 80% with a guessed 80 bytes for each element of unfused Adam, NVLink 450 GB/s "
        "each way and InfiniBand NDR 50 GB/s per GPU, both at a guessed 80%. Refreshes at a guessed 10 TFLOP/s, "
        "collectives at a guessed 20 us plus 2 us per hop or peer."
    ),
)


class Prediction(NamedTuple):
    """Seconds of an optimizer step: the mean, the longest, and the exchange that is in both."""

    mean: float
    worst: float
    exchange: float


def busy_seconds(division: Division, machine: Machine) -> Tensor:
    """Seconds that each process works in each step, float64 (step, process)."""
    rates = torch.tensor(machine[:3], dtype=torch.float64)
    return (work(division) / rates.view(-1, 1, 1)).sum(0)


def predict(division: Division, machine: Machine) -> Prediction:
    """The time of a step in which all wait for the busiest process, and exchange and work do not overlap."""
    busy = busy_seconds(division, machine)
    times = busy.amax(1)
    if machine.cores is not None:
        times = torch.maximum(times, busy.sum(1) / machine.cores)
    exchange = exchange_seconds(division, machine)
    return Prediction(float(times.mean()) + exchange, float(times.max()) + exchange, exchange)


def exchange_seconds(division: Division, machine: Machine) -> float:
    """Seconds of a step's collectives: two all-to-alls in rows, and a broadcast from each row to the others."""
    mesh, moved = division.mesh, traffic(division)
    in_row = machine.fast if mesh.columns <= machine.node else machine.slow
    in_column = machine.fast if mesh.size <= machine.node else machine.slow
    # All broadcasts of a column pass through each of its processes.
    seconds = torch.maximum(moved.sent, moved.received) / in_row
    seconds = float((seconds + (moved.broadcast_sent + moved.broadcast_received) / in_column).max())
    if mesh.columns > 1:
        seconds += 2 * (machine.latency + machine.hop * (mesh.columns - 1))
    if mesh.rows > 1:
        seconds += min(mesh.rows, len(division.owners)) * (machine.latency + machine.hop * log2(mesh.rows))
    return seconds
