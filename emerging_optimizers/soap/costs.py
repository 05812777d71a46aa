"""What matrices cost, in FLOPs of matrix products, and how work is shared out by it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import prod
from typing import Any

from emerging_optimizers.soap.layout import Layout


def step_flops(layout: Layout) -> int:
    """What a step costs: a Gram product and two projections, ``2 numel d`` each, for every axis."""
    return sum(6 * prod(layout.shape) * layout.shape[axis] for axis in layout.axes)


def refresh_flops(layout: Layout, axis: int) -> int:
    """Roughly what a refresh of one axis costs: ``K Q``, its QR, and the first moment out of the basis and in again.

    At frequency 1 the moment stays outside, so that this is up to ``2 numel d`` too much.
    """
    size, entries = layout.shape[axis], prod(layout.shape)
    return 2 * size**3 + 4 * size**3 + carry_flops(size, entries)


def carry_flops(size: int, entries: int) -> int:
    """What it costs to carry that many entries from an old basis of this size to a new one."""
    rotated, out_and_in = 2 * size**3 + 2 * entries * size, 4 * entries * size
    return rotated if carried_by_rotation(size, entries) else out_and_in


def carried_by_rotation(size: int, entries: int) -> bool:
    """Whether entries are carried by ``Q_old^T Q_new``: where that is the cheaper way, along the shorter axes."""
    return size**2 < entries


def mean_flops(layout: Layout, frequency: int) -> float:
    """What a step costs on average, refreshes included."""
    return step_flops(layout) + sum(refresh_flops(layout, axis) for axis in layout.axes) / frequency


def share_out(costs: Sequence[float], loads: Sequence[float], kinds: Sequence[Any] | None = None) -> list[int]:
    """Greedy longest-processing-time scheduling (Graham 1969): the most expensive first, each to the least loaded.

    Args:
        costs: Of each job.
        loads: What each worker has to do already.
        kinds: Of each job, sortable; jobs of one kind and cost follow each other, and go to the same worker as long as
            it then has no more than its share of all work. None: each is of a kind of its own.

    Returns:
        Per job the number of its worker.

    Example:
        >>> share_out([1, 4, 2, 3], [0, 0])
        [0, 0, 1, 1]
        >>> share_out([4, 1, 1, 1, 1, 4], [0, 0, 0]), share_out([4, 1, 1, 1, 1, 4], [0, 0, 0], "abbbba")
        ([0, 2, 2, 2, 2, 1], [0, 2, 2, 2, 2, 1])
    """
    heap = [(load, worker) for worker, load in enumerate(loads)]
    heapq.heapify(heap)
    workers = [0] * len(costs)
    share = (sum(costs) + sum(loads)) / len(loads)
    kind_of = range(len(costs)) if kinds is None else kinds
    order = sorted(range(len(costs)), key=lambda job: (-costs[job], kind_of[job], job))
    worker, load = -1, share
    for former, job in zip([None, *order], order, strict=False):
        if former is None or kind_of[former] != kind_of[job] or load + costs[job] > share:
            if former is not None:
                heapq.heappush(heap, (load, worker))
            load, worker = heapq.heappop(heap)
        workers[job] = worker
        load += costs[job]
    return workers
