"""Which process computes which matrix, by their mean costs.

Every process comes to the same answer from the parameter list and the options, without asking the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from emerging_optimizers.soap.costs import mean_flops, share_out
from emerging_optimizers.soap.layout import layout_for
from emerging_optimizers.soap.options import refresh_frequency
from emerging_optimizers.soap.placement import Grid, Grids, Place


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
