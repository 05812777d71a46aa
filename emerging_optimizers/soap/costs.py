"""What matrices cost, in FLOPs of matrix products, and how work is shared out by it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import prod

from emerging_optimizers.soap.state import Layout


def step_flops(layout: Layout) -> int:
    """What a step costs: a Gram product and two projections, ``2 numel d`` each, for every axis."""
    return sum(6 * prod(layout.shape) * layout.shape[axis] for axis in layout.axes)


def refresh_flops(layout: Layout, axis: int) -> int:
    """Roughly what a refresh of one axis costs: ``K Q``, its QR, and the first moment out of the basis and in again."""
    size = layout.shape[axis]
    return 2 * size**3 + 4 * size**3 + 4 * prod(layout.shape) * size


def mean_flops(layout: Layout, frequency: int) -> float:
    """What a step costs on average, refreshes included."""
    return step_flops(layout) + sum(refresh_flops(layout, axis) for axis in layout.axes) / frequency


def share_out(costs: Sequence[float], loads: Sequence[float]) -> list[int]:
    """Greedy longest-processing-time scheduling (Graham 1969): the most expensive first, each to the least loaded.

    Args:
        costs: Of each job.
        loads: What each worker has to do already.

    Returns:
        Per job the number of its worker.

    Example:
        >>> share_out([1, 4, 2, 3], [0, 0])
        [0, 0, 1, 1]
    """
    heap = [(load, worker) for worker, load in enumerate(loads)]
    heapq.heapify(heap)
    workers = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        load, workers[job] = heap[0]
        heapq.heapreplace(heap, (load + costs[job], workers[job]))
    return workers
