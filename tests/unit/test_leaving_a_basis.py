"""Where refreshes are staggered, a first moment leaves a basis in the step before its refresh: earlier, that is all."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers.health import examine
from emerging_optimizers.soap import SOAP, buckets
from emerging_optimizers.soap import state as state_module
from emerging_optimizers.soap.layout import Layout
from emerging_optimizers.soap.state import axes_outside, flags_of
from emerging_optimizers.soap.timing import Timetable

SHAPES = [(9, 4), (4, 10), (3, 5, 4), (6, 6)]
STEPS = 33


@pytest.fixture(autouse=True)
def every_tensor_is_worked_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "CHUNK_ELEMENTS", 0)  # as large ones are


DIRTY, MISSING = "dirty", "missing"


def train(
    options: dict[str, Any],
    change: Callable[[SOAP, int], object] = lambda optimizer, step: None,
    gradient: Callable[[int], str | None] = lambda step: None,
    dtype: torch.dtype = torch.float64,
) -> tuple[SOAP, list[list[int]]]:
    """A trained optimizer, and the flags ``unrotated`` of every tensor after every step."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    base = {"lr": 0.01, "precondition_frequency": 5, "stagger_updates": True, "eps": 1e-3}
    optimizer = SOAP(parameters, **base | options)
    scales = [torch.logspace(0, -1, shape[0], dtype=dtype).view(-1, *[1] * (len(shape) - 1)) for shape in SHAPES]
    flags = []
    for step in range(STEPS):
        change(optimizer, step)
        for parameter, scale in zip(parameters, scales, strict=True):
            grad = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            parameter.grad = None if gradient(step) == MISSING else grad
            if gradient(step) == DIRTY:
                grad.view(-1)[0] = float("nan")
        optimizer.step()
        flags.append([int(optimizer.state[parameter]["unrotated"]) for parameter in parameters])
    return optimizer, flags


def outcome(optimizer: SOAP) -> list[Tensor]:
    return [one.detach() for p, state in optimizer.state.items() for one in (p, state["exp_avg_sq"], state["Q_0"])]


def never_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Timetable, "axes_to_leave", lambda *_: ())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_kl_shampoo": True, "adam_warmup_steps": 3},
    {"use_eigh": True, "use_nesterov": True},
    {"second_moment_refresh": "kronecker", "nonfinite": "propagate", "pack_factors": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradient", [lambda step: None, lambda step: MISSING if step % 4 == 2 else None])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_run_is_the_same_bit_for_bit(
    options: dict[str, Any], gradient: Callable, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, flags = train(options, gradient=gradient, dtype=dtype)
    seen = {flag for line in flags for flag in line}
    assert seen == {0, flags_of((0,)), flags_of((1,))}, "no moment left a basis, so that nothing was tested"
    never_leaving(monkeypatch)
    expected, flags = train(options, gradient=gradient, dtype=dtype)
    assert not any(map(any, flags))
    assert all(map(torch.equal, outcome(optimizer), outcome(expected)))


def set_option(**options: Any) -> Callable[[SOAP, int], object]:
    """Sets options at steps 7 to 12 and 20 to 21, and back."""
    before: dict[str, Any] = {}

    def change(optimizer: SOAP, step: int) -> None:
        group = optimizer.param_groups[0]
        before.update({key: group[key] for key in options} if not before else {})
        group.update(options if 7 <= step < 13 or 20 <= step < 22 else before)

    return change


def masks_for_a_while(monkeypatch: pytest.MonkeyPatch) -> Callable[[SOAP, int], object]:
    return lambda optimizer, step: monkeypatch.setattr(state_module, "masks_on", lambda device: 7 <= step < 13)


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], Callable[[SOAP, int], object]]] = {
    "stagger_updates off": lambda _: set_option(stagger_updates=False),
    "another frequency": lambda _: set_option(precondition_frequency=3),
    "every step": lambda _: set_option(precondition_frequency=1),
    "a callable": lambda _: set_option(precondition_frequency=lambda step: 5),
    "the adaptive criterion": lambda _: set_option(use_adaptive_criteria=True, adaptive_update_tolerance=0.5),
    "warm-up again": lambda _: set_option(adam_warmup_steps=12),
    "masks": masks_for_a_while,
    "nothing": lambda _: lambda optimizer, step: None,
}


@pytest.mark.parametrize("gradient", [lambda step: None, lambda step: DIRTY if step % 3 == 1 else None])
@pytest.mark.parametrize("change", CHANGES)
def test_what_comes_between_changes_no_more_than_rounding(
    change: str, gradient: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, flags = train({}, CHANGES[change](monkeypatch), gradient)
    assert any(flag > 1 for line in flags for flag in line), "no moment left a basis, so that nothing was tested"
    never_leaving(monkeypatch)
    expected, _ = train({}, CHANGES[change](monkeypatch), gradient)
    for ours, theirs in zip(outcome(optimizer), outcome(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_run_that_is_saved_while_a_moment_is_outside_goes_on_bit_for_bit() -> None:
    def save_and_load(optimizer: SOAP, step: int) -> None:
        if step:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    expected, flags = train({})
    resumed, same_flags = train({}, save_and_load)
    assert flags == same_flags
    assert all(map(torch.equal, outcome(resumed), outcome(expected)))


def test_health_sees_the_moment_in_all_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    def measures() -> list[list[float | None]]:
        seen: list[list[float | None]] = []
        train({}, lambda optimizer, _: seen.append([tensor.direction_rms for tensor in examine(optimizer).tensors]))
        return seen[1:]

    ours = measures()
    never_leaving(monkeypatch)
    for one, expected in zip(ours, measures(), strict=True):
        assert one == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("options", [{"state_dtype": torch.bfloat16}, {"use_adaptive_criteria": True}], ids=str)
def test_a_moment_that_would_be_rounded_once_more_or_may_keep_its_basis_stays(options: dict[str, Any]) -> None:
    _, flags = train(options, dtype=torch.float32)
    assert not any(map(any, flags))


def test_tensors_that_may_be_worked_on_with_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "CHUNK_ELEMENTS", 2 * 100)  # two of (4, 10) fit, whose factor has 100 elements
    _, flags = train({})
    assert not any(map(any, flags))
    assert buckets.is_always_alone(Layout((11, 2), (0, 1)))
    assert not buckets.is_always_alone(Layout((10, 9), (0,)))


def test_flags() -> None:
    layout = Layout((2, 3, 4), (0, 2))
    for axes in [(), (0,), (2,), (0, 2)]:
        assert axes_outside(flags_of(axes), layout) == axes
    assert axes_outside(state_module.OUT_OF_ALL, layout) == (0, 2)
