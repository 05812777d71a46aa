"""Which process computes which matrix: the most expensive first, each to the process with the least work so far.

Every process comes to the same answer from the parameter list and the options, without asking the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from emerging_optimizers.soap.layout import Layout, layout_for
from emerging_optimizers.soap.options import refresh_frequency
from emerging_optimizers.soap.placement import Grid, Grids, Place
from emerging_optimizers.soap.timing import refresh_flops


def step_flops(layout: Layout) -> int:
    """What a step costs in matrix products: a Gram product and two projections, ``2 numel d`` each, for every axis."""
    return sum(6 * prod(layout.shape) * layout.shape[axis] for axis in layout.axes)


def mean_flops(layout: Layout, frequency: int) -> float:
    """What a step costs on average, refreshes included."""
    return step_flops(layout) + sum(refresh_flops(layout, axis) for axis in layout.axes) / frequency


def share_out(costs: Sequence[float], loads: Sequence[float]) -> list[int]:
    """Greedy longest-processing-time scheduling (Graham 1969).

    Args:
        costs: Of each job.
        loads: What each process has to do already.

    Returns:
        Per job the number of its process.

    Example:
        >>> share_out([1, 4, 2, 3], [0, 0])
        [0, 0, 1, 1]
    """
    heap = [(load, process) for process, load in enumerate(loads)]
    heapq.heapify(heap)
    owners = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        load, process = heap[0]
        owners[job] = process
        heapq.heapreplace(heap, (load + costs[job], process))
    return owners


def place_parameters(
    groups: Iterable[Mapping[str, Any]], grids: Grids, known: Mapping[Tensor, Place]
) -> dict[Tensor, Place]:
    """The place of every parameter that several processes hold.

    Args:
        groups: The parameter groups.
        grids: The grids of their parameters.
        known: Those that have a place already, and keep it.
    """
    places: dict[Tensor, Place] = {}
    jobs: dict[Grid, list[tuple[Tensor, float]]] = {}
    loads: dict[Grid, list[float]] = {}
    for group in groups:
        for parameter in group["params"]:
            grid = grids.of(parameter)
            if grid is None:
                continue
            layout = layout_for(parameter, group)
            cost = mean_flops(layout, refresh_frequency(group["precondition_frequency"], 0))
            place = known.get(parameter)
            if place is not None:
                places[parameter] = place
                if place.owner is not None:
                    loads.setdefault(grid, [0.0] * grid.size)[place.owner] += cost
            elif layout.axes:
                jobs.setdefault(grid, []).append((parameter, cost))
            else:
                places[parameter] = Place(grid, None)
    for grid, work in jobs.items():
        owners = share_out([cost for _, cost in work], loads.get(grid, [0.0] * grid.size))
        for (parameter, _), owner in zip(work, owners, strict=True):
            places[parameter] = Place(grid, owner)
    return places
