"""When an eigenbasis is refreshed: every f steps, all together or spread over the period.

Refreshed together, the matrices make every f-th step several times longer than the others. With ``stagger_updates``
every axis of every tensor has a place of its own in the period, and is refreshed there, every f steps after the first
time. The places depend on the parameter list, the options, f, and the number of workers that shared the matrices
when they were made. That number stays in the group and is saved, so that a resumed run goes on with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from emerging_optimizers.soap.costs import mean_flops, refresh_flops, share_out
from emerging_optimizers.soap.options import refresh_frequency
from emerging_optimizers.soap.state import Layout, layout_for

#: Key of a group: for how many workers its places were made.
STAGGER_PROCESSES = "stagger_processes"

#: Which tensors of a stack are refreshed along which axes.
Due = Sequence[tuple[slice, tuple[int, ...]]]


class Schedule:
    """What is due in one step of a parameter group."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self._group = group
        self._places: dict[int, Sequence[Sequence[int]]] = {}

    def due(self, indices: Sequence[int], layout: Layout, step: int, based: bool) -> Due:
        """What is refreshed of a stack of parameters with these indices in the group, after so many steps.

        Without eigenbases (``based``) all are due after the warm-up, whatever the frequency says. Raises a TypeError or
        ValueError where ``precondition_frequency`` is a callable and returned something impossible.
        """
        group = self._group
        if not layout.axes or step < group["adam_warmup_steps"]:
            return []
        everything = [(slice(None), layout.axes)]
        if not based:
            return everything
        frequency = group["precondition_frequency"]
        if callable(frequency):
            frequency = refresh_frequency(frequency, step)
        if not group["stagger_updates"]:
            return everything if step % frequency == 0 else []
        if frequency not in self._places:
            layouts = tuple(layout_for(parameter, group) for parameter in group["params"])
            self._places[frequency] = refresh_offsets(layouts, frequency, group[STAGGER_PROCESSES])
        places = self._places[frequency]
        axes = [
            tuple(
                axis for axis, place in zip(layout.axes, places[index], strict=True) if (step - place) % frequency == 0
            )
            for index in indices
        ]
        return [(slice(start, stop), axes[start]) for start, stop in stretches(axes) if axes[start]]


def stretches(values: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Start and stop of each longest stretch of equal neighbours.

    Example:
        >>> list(stretches([1, 1, 2, 1]))
        [(0, 2), (2, 3), (3, 4)]
    """
    start = 0
    for stop in range(1, len(values) + 1):
        if stop == len(values) or values[stop] != values[start]:
            yield start, stop
            start = stop


@lru_cache(maxsize=256)
def refresh_offsets(layouts: Sequence[Layout], period: int, workers: int = 1) -> tuple[tuple[int, ...], ...]:
    """A place in the period for every preconditioned axis, such that each step of the period has about the same work.

    Greedy: the most expensive refresh first, each to the step with the least work so far. Where several workers share
    the matrices, each one's are spread by themselves: workers then refresh like sizes in the same step, and none waits
    for another.

    Returns:
        Per parameter, the places of its preconditioned axes.

    Example:
        >>> refresh_offsets((Layout((8, 4), (0, 1)), Layout((4, 4), (0, 1))), 2)
        ((0, 1), (1, 1))
        >>> refresh_offsets((Layout((8, 4), (0, 1)), Layout((8, 4), (0, 1))), 2, workers=2)
        ((0, 1), (0, 1))
    """
    workers = max(1, min(workers, len(layouts)))  # more would have nothing to do
    owners = share_out([mean_flops(layout, period) for layout in layouts], [0.0] * workers)
    place: dict[tuple[int, int], int] = {}
    for owner in set(owners):
        jobs = [(i, axis) for i, layout in enumerate(layouts) if owners[i] == owner for axis in layout.axes]
        if jobs:
            flops = [refresh_flops(layouts[i], axis) for i, axis in jobs]
            steps = share_out(flops, [0.0] * min(period, len(jobs)))  # more places than jobs stay empty
            place.update(zip(jobs, steps, strict=True))
    return tuple(tuple(place[i, axis] for axis in layout.axes) for i, layout in enumerate(layouts))
