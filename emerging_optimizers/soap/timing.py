"""When an eigenbasis is refreshed: every f steps, all together or spread over the period.

Refreshed together, the matrices make every f-th step several times longer than the others. With ``stagger_updates``
every axis of every tensor has a place of its own in the period, and is refreshed there, exactly f steps after the
last time. The places depend on the parameter list, the options, f, and the number of processes that shared the work
when they were made. That number stays in the group and is saved, so that a resumed run goes on with them, on whatever
number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from emerging_optimizers.soap.costs import mean_flops, refresh_flops, share_out
from emerging_optimizers.soap.layout import Layout, layout_for
from emerging_optimizers.soap.options import refresh_frequency
from emerging_optimizers.soap.state import is_elsewhere

#: Key of a group: for how many processes its places were made.
STAGGER_PROCESSES = "stagger_processes"


class Timetable:
    """What is due in one step of a parameter group.

    Args:
        group: The parameter group.
        states: The optimizer's state.

    Raises:
        TypeError, ValueError: The group's ``precondition_frequency`` is a callable and returned something impossible.
    """

    def __init__(self, group: Mapping[str, Any], states: Mapping[Tensor, dict[str, Any]]) -> None:
        self._group = group
        frequency = group["precondition_frequency"]
        #: The frequency at every step; or at those at which tensors with a basis are, after a warm-up.
        self._frequencies: int | dict[int, int] = frequency
        #: The places of each parameter's axes, once they were asked for.
        self._offsets: dict[int, tuple[tuple[int, ...], ...]] = {}
        if callable(frequency):
            active = [states[p] for p in group["params"] if p.grad is not None and "refresh_step" in states.get(p, ())]
            steps = {int(s["step"]) for s in active if not is_elsewhere(s) and s["refresh_step"] > 0}
            self._frequencies = {
                step: refresh_frequency(frequency, step) for step in steps if step >= group["adam_warmup_steps"]
            }

    def _frequency(self, step: int) -> int:
        return self._frequencies[step] if isinstance(self._frequencies, dict) else self._frequencies

    def due_axes(self, index: int, layout: Layout, step: int) -> tuple[int, ...]:
        """The axes that are refreshed at ``step``, for the parameter with this index in the group; it has a basis."""
        if step < self._group["adam_warmup_steps"]:
            return ()
        frequency = self._frequency(step)
        if not self._group["stagger_updates"]:
            return layout.axes if step % frequency == 0 else ()
        if frequency not in self._offsets:
            layouts = tuple(layout_for(parameter, self._group) for parameter in self._group["params"])
            self._offsets[frequency] = refresh_offsets(layouts, frequency, self._group[STAGGER_PROCESSES])
        offsets = self._offsets[frequency][index]
        return tuple(axis for axis, o in zip(layout.axes, offsets, strict=True) if (step - o) % frequency == 0)


@lru_cache(maxsize=256)
def refresh_offsets(layouts: Sequence[Layout], period: int, processes: int = 1) -> tuple[tuple[int, ...], ...]:
    """A place in the period for every preconditioned axis, such that each step of the period has about the same work.

    Greedy: the most expensive refresh first, each to the step with the least work so far. Where several processes share
    the matrices, each one's are spread by themselves: like owners then refresh like sizes in the same step, and none
    waits for another.

    Args:
        layouts: Of every parameter, in order.
        period: The number of places.
        processes: How many share them.

    Returns:
        Per parameter, the places of its preconditioned axes.

    Example:
        >>> refresh_offsets((Layout((8, 4), (0, 1)), Layout((4, 4), (0, 1))), 2)
        ((0, 1), (1, 1))
        >>> refresh_offsets((Layout((8, 4), (0, 1)), Layout((8, 4), (0, 1))), 2, processes=2)
        ((0, 1), (0, 1))
    """
    workers = max(1, min(processes, len(layouts)))  # more would have nothing to do
    owners = share_out([mean_flops(layout, period) for layout in layouts], [0.0] * workers)
    place: dict[tuple[int, int], int] = {}
    for owner in set(owners):
        jobs = [(i, axis) for i, layout in enumerate(layouts) if owners[i] == owner for axis in layout.axes]
        if jobs:
            steps = [0] * min(period, len(jobs))  # more places than jobs stay empty
            flops = [refresh_flops(layouts[i], axis) for i, axis in jobs]
            steps_of_jobs = share_out(flops, steps)
            place.update(zip(jobs, steps_of_jobs, strict=True))
    return tuple(tuple(place[i, axis] for axis in layout.axes) for i, layout in enumerate(layouts))
