"""Which process works on which matrix: shared out evenly, alike on all processes, and so is the state."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.costs import mean_flops, refresh_flops, share_out, step_flops
from emerging_optimizers.soap.distributed.grid import assign_owners
from emerging_optimizers.soap.due import refresh_offsets
from emerging_optimizers.soap.state import Layout, layout_for
from tests.distributed import scenarios
from tests.distributed.harness import Processes

COSTS = st.lists(st.integers(1, 100), min_size=1, max_size=7)


class ManyProcesses:
    """A grid of which nothing but the size is asked, and the grids of an optimizer that has no other."""

    def __init__(self, size: int) -> None:
        self.size = size

    def of(self, parameter: nn.Parameter) -> "ManyProcesses":
        return self


def loads_of(costs: list[float], owners: list[int], processes: int) -> list[float]:
    loads = [0.0] * processes
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    return loads


@given(costs=COSTS, processes=st.integers(1, 3))
@settings(deadline=None)
def test_the_slowest_process_has_at_most_a_third_more_than_in_the_best_division(
    costs: list[int], processes: int
) -> None:
    owners = share_out(costs, [0] * processes)
    best = min(max(loads_of(costs, list(choice), processes)) for choice in product(range(processes), repeat=len(costs)))
    assert max(loads_of(costs, owners, processes)) <= (4 / 3 - 1 / (3 * processes)) * best + 1e-9  # Graham 1969


@given(costs=COSTS, loads=st.lists(st.integers(0, 300), min_size=1, max_size=4))
def test_what_processes_have_to_do_already_counts(costs: list[int], loads: list[int]) -> None:
    owners = share_out(costs, loads)
    assert len(owners) == len(costs)
    totals = [load + more for load, more in zip(loads, loads_of(costs, owners, len(loads)), strict=True)]
    for process in set(owners):  # its last job is its cheapest, and went to it because the others had no less
        cheapest = min(cost for cost, owner in zip(costs, owners, strict=True) if owner == process)
        assert totals[process] - cheapest <= min(totals)


@given(costs=COSTS, processes=st.integers(1, 4))
def test_processes_that_share_out_the_same_jobs_agree(costs: list[int], processes: int) -> None:
    assert share_out(costs, [0] * processes) == share_out([float(cost) for cost in costs], [0.0] * processes)


def test_equal_jobs_go_around() -> None:
    assert share_out([5] * 7, [0, 0, 0]) == [0, 1, 2, 0, 1, 2, 0]


def gpt2_124m() -> list[nn.Parameter]:
    """The parameters of GPT-2 124M, without storage: weights (out, in), vectors, the embeddings."""
    width = 768
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    vectors = [(3 * width,), (width,), (4 * width,), (width,)] + 4 * [(width,)]
    shapes = [(50257, width), (1024, width), *12 * (block + vectors), (width,), (width,)]
    return [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]


def placed(parameters: list[nn.Parameter], processes: int, **options: object) -> tuple[dict, dict]:
    """The group of the parameters, and the owner of each that is preconditioned."""
    (group,) = SOAP(parameters, lr=0.1, **options).param_groups
    places = assign_owners([group], ManyProcesses(processes), {})
    assert set(places) == set(parameters)
    return group, {p: place.owner for p, place in places.items() if place.owner is not None}


@pytest.mark.parametrize("frequency", [1, 10, 100])
@pytest.mark.parametrize("embeddings", [True, False], ids=["all", "no embeddings"])
def test_gpt2_is_shared_out_evenly_by_8_processes(frequency: int, embeddings: bool) -> None:
    parameters = gpt2_124m() if embeddings else gpt2_124m()[2:]
    group, owners = placed(parameters, 8, precondition_frequency=frequency)
    loads = [0.0] * 8
    for parameter, owner in owners.items():
        loads[owner] += mean_flops(layout_for(parameter, group), frequency)
    assert max(loads) <= 1.15 * sum(loads) / 8


@pytest.mark.parametrize("frequency", [10, 20, 50])
def test_staggered_no_process_waits_long_for_another_and_no_step_is_much_longer(frequency: int) -> None:
    group, owners = placed(gpt2_124m(), 8, precondition_frequency=frequency, stagger_updates=True)
    layouts = tuple(layout_for(parameter, group) for parameter in group["params"])
    work = torch.zeros(8, frequency, dtype=torch.float64)
    largest = 0
    for parameter, layout, offsets in zip(
        group["params"], layouts, refresh_offsets(layouts, frequency, 8), strict=True
    ):
        for axis, offset in zip(layout.axes, offsets, strict=True):
            work[owners[parameter], offset] += refresh_flops(layout, axis)
            largest = max(largest, refresh_flops(layout, axis))
        if layout.axes:
            work[owners[parameter]] += step_flops(layout)
    mean = work.mean()
    assert work.mean(1).max() <= 1.15 * mean  # the slowest process, over a period
    assert work.amax(0).mean() <= 1.15 * mean  # what a period takes, when in each step all wait for the slowest
    # The slowest step: a refresh of 3072 cannot be divided, and nobody has two of them, or one and others, at once.
    assert work.max() <= work.amin(1).max() + largest


def test_a_matrix_costs_what_its_products_cost() -> None:
    # Gram product 2 m n m and 2 n m n, in and out of the basis again 2 (2 m m n + 2 m n n).
    assert step_flops(Layout((7, 5), (0, 1))) == 3 * (2 * 7 * 5 * 7 + 2 * 7 * 5 * 5)
    assert mean_flops(Layout((7, 5), ()), 10) == 0
    assert mean_flops(Layout((7, 5), (0,)), 10) == step_flops(Layout((7, 5), (0,))) + (6 * 7**3 + 4 * 7 * 5 * 7) / 10


@pytest.mark.parametrize("placement", ["ddp of 2", "ddp of 4", "shard 0 of 2", "shard 0 of 4", "hsdp"])
def test_each_process_keeps_its_share_of_the_state(placement: str, processes: Processes) -> None:
    width = 32
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    case = scenarios.Case(placement, shapes=tuple(4 * block + [(width,)] * 4), steps=1, dtype=torch.float32)
    (alone,) = processes.run(1, scenarios.kept_elements, scenarios.Case(**{**vars(case), "placement": "one process"}))
    size = scenarios.PLACEMENTS[placement][0]
    kept = processes.run(size, scenarios.kept_elements, case)
    for kind in ("factors", "matrices"):
        assert sum(one[kind] for one in kept) == alone[kind]
        assert max(one[kind] for one in kept) <= 1.15 / size * alone[kind]
    copies = {"ddp of 2": 2, "ddp of 4": 4, "hsdp": 2}.get(placement, 1)
    assert sum(one["vectors"] for one in kept) == copies * alone["vectors"]
