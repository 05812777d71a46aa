"""Refreshes spread over the period: balanced, each with its own exact period, and the same after a resume."""

import copy

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers.schedules import LinearFrequency
from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.costs import refresh_flops
from emerging_optimizers.soap.due import refresh_offsets
from emerging_optimizers.soap.state import Layout

SHAPES = [(6, 4), (6, 4), (5, 7), (3, 2, 4), (4,), (6, 4), (8, 8)]


def stepped(steps: int, seen: dict | None = None, **options: object) -> tuple[list[nn.Parameter], SOAP]:
    parameters = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = SOAP(parameters, **{"lr": 0.01, "stagger_updates": True, **options})
    go_on(parameters, optimizer, range(steps), seen)
    return parameters, optimizer


def go_on(parameters: list[nn.Parameter], optimizer: SOAP, steps: range, seen: dict | None = None) -> None:
    for step in steps:
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        before = bases(parameters, optimizer)
        optimizer.step()
        for key, basis in bases(parameters, optimizer).items():
            if seen is not None and (key not in before or not torch.equal(basis, before[key])):
                seen.setdefault(key, []).append(step)


def bases(parameters: list[nn.Parameter], optimizer: SOAP) -> dict[tuple[int, str], Tensor]:
    states = [(i, optimizer.state.get(p, {})) for i, p in enumerate(parameters)]
    return {(i, key): v.clone() for i, state in states for key, v in state.items() if key.startswith("Q_")}


@pytest.mark.parametrize("frequency", [1, 3, 10])
def test_every_axis_keeps_its_own_period_exactly(frequency: int) -> None:
    seen: dict = {}
    stepped(35, seen, precondition_frequency=frequency)
    assert len(seen) == 13
    places = set()
    for first, second, *rest in seen.values():
        assert first == 0
        assert 1 <= second <= frequency
        assert [second, *rest] == list(range(second, 35, frequency))
        places.add(second)
    assert len(places) == min(frequency, 10)


def test_after_a_warm_up_all_start_together_and_then_spread() -> None:
    seen: dict = {}
    stepped(30, seen, precondition_frequency=5, adam_warmup_steps=7)
    for places in seen.values():
        first, second, *_ = [step for step in places if step > 0]  # step 0 makes the identity
        assert first == 7
        assert 8 <= second <= 12


def test_a_schedule_of_frequencies_is_followed_with_its_places() -> None:
    seen: dict = {}
    stepped(60, seen, precondition_frequency=lambda step: 2 if step < 30 else 6)
    for places in seen.values():
        assert {b - a for a, b in zip(places[1:-1], places[2:], strict=True) if b < 30} == {2}
        assert {b - a for a, b in zip(places[1:-1], places[2:], strict=True) if a >= 30} == {6}


def test_resuming_goes_on_with_the_same_places() -> None:
    options = {"precondition_frequency": LinearFrequency(2, 7, 40)}
    parameters, optimizer = stepped(13, **options)
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in parameters]
    seen, again = {}, {}
    go_on(parameters, optimizer, range(13, 30), seen)
    others, resumed = stepped(0, **options)
    resumed.load_state_dict(saved)
    for p, weight in zip(others, weights, strict=True):
        p.data.copy_(weight)
    go_on(others, resumed, range(13, 30), again)
    assert seen == again
    assert all(torch.equal(p, q) for p, q in zip(parameters, others, strict=True))


def test_the_work_is_balanced() -> None:
    widths = [(384, 128), (128, 128), (512, 128), (128, 512)]
    gpt = 8 * [Layout(shape, (0, 1)) for shape in widths]
    for period in (2, 4, 8, 10, 16):
        offsets = refresh_offsets(tuple(gpt), period)
        load = [0] * period
        for layout, places in zip(gpt, offsets, strict=True):
            for axis, place in zip(layout.axes, places, strict=True):
                load[place] += refresh_flops(layout, axis)
        largest = max(refresh_flops(layout, axis) for layout in gpt for axis in layout.axes)
        assert max(load) - min(load) <= largest
        assert max(load) <= sum(load) / period + largest


def test_a_period_longer_than_any_run_is_no_trouble() -> None:
    seen: dict = {}
    stepped(20, seen, precondition_frequency=10**30)
    assert {steps[0] for steps in seen.values()} == {0}
    assert len(seen) == 13
    assert all(len(steps) <= 2 for steps in seen.values())
    later = {step for steps in seen.values() for step in steps[1:]}
    assert len(later) > 8
    assert later <= set(range(1, 13))
    layouts = tuple(Layout((d, d), (0, 1)) for d in range(2, 9))
    places = [place for axes in refresh_offsets(layouts, 10**30) for place in axes]
    assert sorted(places) == list(range(14))
