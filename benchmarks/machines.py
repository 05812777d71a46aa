"""How long a step takes on a machine: the counts of ``cost_model.py`` over the rates of a :class:`Machine`."""

from __future__ import annotations

from math import log2
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cost_model import Division, slowest, traffic, work


class Machine(NamedTuple):
    """Rates of one process. FLOPs, elements and bytes per second; seconds.

    Attributes:
        products, full_products, decompositions, elements: See ``cost_model.KINDS``.
        node: How many processes have the fast link among themselves.
        fast, slow: Bytes per second that a process sends, and at the same time receives, inside and between nodes.
        latency: Of a collective.
        hop: More of it per doubling of the processes of a broadcast or all-reduce, and per peer of an all-to-all.
        cores: If processes share cores, how many there are; None: each has its own.
        source: Where the figures come from.
    """

    products: float
    full_products: float
    decompositions: float
    elements: float
    node: int
    fast: float
    slow: float
    latency: float
    hop: float
    cores: int | None
    source: str

    @property
    def rates(self) -> Tensor:
        """In the order of ``cost_model.KINDS``."""
        return torch.tensor([self.products, self.full_products, self.decompositions, self.elements]).double()


#: Nothing has been run on a GPU: these are data sheets times guessed efficiencies.
MACHINES = {
    "H100": Machine(
        products=0.5 * 495e12,
        full_products=0.7 * 67e12,
        decompositions=4e12,
        elements=0.8 * 3.35e12 / 80,
        node=8,
        fast=0.8 * 450e9,
        slow=0.8 * 50e9,
        latency=20e-6,
        hop=2e-6,
        cores=None,
        source=(
            "ASSUMED, not measured. NVIDIA's H100 SXM data sheet: 495 TFLOP/s dense TensorFloat-32 at a guessed 50%, "
            "67 TFLOP/s float32 at a guessed 70%, memory 3.35 TB/s at a guessed 80% with a guessed 80 bytes for each "
            "element of unfused Adam, NVLink 450 GB/s each way and InfiniBand NDR 50 GB/s per GPU, both at a guessed "
            "80%. QR at a guessed 4 TFLOP/s (6% of float32), collectives at a guessed 20 us plus 2 us per hop or peer."
        ),
    )
}


class Prediction(NamedTuple):
    """Seconds of an optimizer step: work of the slowest process, exchange, their sum; mean and longest step."""

    work: float
    exchange: float
    mean: float
    worst: float


def predict(division: Division, machine: Machine) -> Prediction:
    """The time of a step with nothing overlapped: an upper bound, were the rates right."""
    seconds = (work(division) / machine.rates.view(-1, 1, 1, 1)).sum(0)
    times = slowest(seconds, division.slack)
    if machine.cores is not None:
        times = torch.maximum(times, seconds.sum((1, 2)) / machine.cores)
    exchange = exchange_seconds(division, machine)
    return Prediction(float(times.mean()), exchange, float(times.mean()) + exchange, float(times.max()) + exchange)


def busy_seconds(division: Division, machine: Machine) -> Tensor:
    """Seconds that each process works in a mean step, waiting left out, float64 (N,)."""
    return (work(division).sum(2).mean(1) / machine.rates.unsqueeze(1)).sum(0)


def exchange_seconds(division: Division, machine: Machine) -> float:
    """Seconds of a step's collectives, one after the other."""
    mesh, moved = division.mesh, traffic(division)
    in_row = machine.fast if mesh.columns <= machine.node else machine.slow
    in_column = machine.fast if mesh.size <= machine.node else machine.slow
    # All broadcasts of a column pass through each of its processes.
    seconds = torch.maximum(moved.sent, moved.received) / in_row
    seconds = seconds + (moved.broadcast_sent + moved.broadcast_received) / in_column
    return (
        float(seconds.max())
        + moved.all_to_alls * (machine.latency + machine.hop * (mesh.columns - 1))
        + moved.broadcasts * (machine.latency + machine.hop * log2(mesh.rows))
        + moved.all_reduces * (machine.latency + machine.hop * log2(mesh.columns))
    )
