"""Gradients, weights, learning rates and step counts at the ends of what there is: all stays finite and bounded."""

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers.schedules import LinearFrequency
from emerging_optimizers.soap import SOAP
from tests.algorithm.test_soap import Everything, new_model, train

MODES: dict[str, dict] = {
    "default": {},
    "kl": {"use_kl_shampoo": True},
    "eigh": {"use_eigh": True},
    "warm-up": {"adam_warmup_steps": 3},
    "1-D": {"precondition_1d": True},
    "merged": {"merge_dims": True},
    "kronecker": {"second_moment_refresh": "kronecker"},
}
SHAPES = [(6, 4), (4, 9), (5,), (1, 7), (1, 1), (1,), (2, 3, 4), (4, 1, 3, 3), ()]

each_mode = pytest.mark.parametrize("mode", MODES)
each_frequency = pytest.mark.parametrize("frequency", [1, 5])


def random_normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sized(low: float, high: float) -> Callable:
    """Entries of either size, in one tensor."""

    def gradient(shape: tuple[int, ...], step: int) -> Tensor:
        chosen = random_normal(shape, step + 500) > 0
        return random_normal(shape, step).sign() * torch.where(chosen, low, high)

    return gradient


def alternating(*sizes: float) -> Callable:
    return lambda shape, step: sizes[step % len(sizes)] * random_normal(shape, step).clamp(-1, 1)


def rank_one(shape: tuple[int, ...], step: int) -> Tensor:
    result = random_normal((), step)
    for axis, size in enumerate(shape):  # the same directions in every step
        result = torch.tensordot(result, random_normal((size,), axis), dims=0)
    return result


def conditioned(number: float) -> Callable:
    """Along every axis sizes from 1 down to ``number ** -0.5``, so that its factor has that condition number."""

    def gradient(shape: tuple[int, ...], step: int) -> Tensor:
        result = random_normal(shape, step)
        for axis, size in enumerate(shape):
            rotation = torch.linalg.qr(random_normal((size, size), axis)).Q
            scaled = rotation * torch.logspace(0, 0, size).new_tensor(number).pow(-0.5 * torch.linspace(0, 1, size))
            result = torch.tensordot(scaled @ rotation.T, result, dims=([1], [axis])).movedim(0, axis)
        return result

    return gradient


def one_entry(shape: tuple[int, ...], step: int) -> Tensor:
    result = torch.zeros(shape)
    result.view(-1)[step % result.numel()] = 1.0
    return result


GRADIENTS: dict[str, Callable[[tuple[int, ...], int], Tensor]] = {
    "zero": lambda shape, step: torch.zeros(shape),
    "zero, then not": lambda shape, step: random_normal(shape, step) * (step >= 4),
    "not, then zero": lambda shape, step: random_normal(shape, step) * (step < 4),
    "rank one": rank_one,
    "condition 1e12": conditioned(1e12),
    "condition 1e24": conditioned(1e24),
    "one entry": one_entry,
    "constant": lambda shape, step: torch.ones(shape),
    "constant, tiny": lambda shape, step: torch.full(shape, 1e-12),
    "alternating sign": lambda shape, step: torch.ones(shape) * (-1) ** step,
    "1e-30": alternating(1e-30),
    "denormal": lambda shape, step: torch.full(shape, 1e-40),
    "smallest": lambda shape, step: torch.full(shape, 1.4e-45),
    "denormal factors": alternating(3e-21),
    "second moment underflows": alternating(1e-23),
    "1e18": alternating(1e18),
    "1e30": alternating(1e30),
    "largest": lambda shape, step: torch.full(shape, torch.finfo(torch.float32).max),
    "1e-30 and 1e30 mixed": sized(1e-30, 1e30),
    "1e-18 and 1e18 mixed": sized(1e-18, 1e18),
    "1e-30 and 1e18 mixed": sized(1e-30, 1e18),
    "1e-30, 1e30 in turn": alternating(1e-30, 1e30),
    "1e-18, 1e18 in turn": alternating(1e-18, 1e18),
    "1e-40, 1, 1e18 in turn": alternating(1e-40, 1.0, 1e18),
    "1e-8, 1e8 in turn": alternating(1e-8, 1e8),
    "1e18, then one": lambda shape, step: random_normal(shape, step) * (1e18 if step < 4 else 1.0),
    "one, then 1e18": lambda shape, step: random_normal(shape, step) * (1e18 if step >= 4 else 1.0),
}


def floats(optimizer: SOAP) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            yield f"weight {i} {tuple(parameter.shape)}", parameter.detach()
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"{key} of {i} {tuple(parameter.shape)}", value


#: What a refresh accepts, in float32.
ORTHONORMAL = 100 * torch.finfo(torch.float32).eps


def orthogonality_error(basis: Tensor) -> float:
    wide = basis.double()
    return float((wide.mT @ wide - torch.eye(wide.shape[-1], dtype=torch.float64)).abs().max())


def assert_sound(optimizer: SOAP) -> None:
    """Finite weights and state, second moments and counters not negative, bases orthonormal."""
    for name, value in floats(optimizer):
        assert value.isfinite().all(), name
        if name.startswith(("exp_avg_sq", "step", "refresh_step", "skipped_steps")):
            assert (value >= 0).all(), name
        if name.startswith("Q_"):
            assert orthogonality_error(value) <= ORTHONORMAL, name


@each_frequency
@each_mode
@pytest.mark.parametrize("kind", GRADIENTS)
def test_any_gradient_leaves_all_finite_and_no_step_beyond_adams_bound(kind: str, mode: str, frequency: int) -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = SOAP(parameters, lr=1.0, weight_decay=0.0, precondition_frequency=frequency, **MODES[mode])
    for step in range(13):
        before = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = GRADIENTS[kind](tuple(p.shape), step) if step < 10 else random_normal(tuple(p.shape), step)
        optimizer.step()
        if step in (0, 5, 9, 12):
            assert_sound(optimizer)
        for p, old in zip(parameters, before, strict=True):
            rms = float(torch.linalg.vector_norm(p.detach() - old)) / p.numel() ** 0.5
            assert rms < 1.2, f"{tuple(p.shape)} moved by {rms:.3g} in step {step}"  # 1.17 by Cauchy-Schwarz
    skipped = {int(optimizer.state[p]["skipped_steps"]) for p in parameters}
    if kind in ("1e30", "largest"):
        assert skipped == {10}
    elif "1e30" not in kind:
        assert skipped == {0}


@each_mode
@pytest.mark.parametrize("size", [300.0, 6e4])  # the squares overflow float16, and so do the sums of some
def test_a_float16_gradient_whose_square_overflows_float16_is_used(mode: str, size: float) -> None:
    half = [nn.Parameter(torch.zeros(shape, dtype=torch.float16)) for shape in SHAPES]
    full = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizers = [SOAP(parameters, lr=0.1, **MODES[mode]) for parameters in (half, full)]
    for step in range(8):
        for low, high in zip(half, full, strict=True):
            low.grad = (size * random_normal(tuple(low.shape), step).clamp(-1, 1)).half()
            high.grad = low.grad.float()
            high.data.copy_(low.detach())
        for optimizer in optimizers:
            optimizer.step()
        assert all(torch.equal(low, high.half()) for low, high in zip(half, full, strict=True))
        assert_sound(optimizers[0])
    assert all(p.any() and int(optimizers[0].state[p]["skipped_steps"]) == 0 for p in half)


@each_mode
def test_a_float16_gradient_that_is_inf_is_skipped(mode: str) -> None:
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float16)) for shape in SHAPES]
    optimizer = SOAP(parameters, lr=0.1, **MODES[mode])
    for step in range(9):
        for p in parameters:
            grad = random_normal(tuple(p.shape), step)
            grad.view(-1)[0] = 7e4 if step % 3 == 1 else 1.0
            p.grad = grad.half()
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        moved = [not torch.equal(p, old) for p, old in zip(parameters, before, strict=True)]
        assert moved == [step % 3 != 1] * len(parameters)
        assert_sound(optimizer)
    assert all(int(optimizer.state[p]["skipped_steps"]) == 3 for p in parameters)


# --- a spike ------------------------------------------------------------------------------------------------------


def full_loss(model: Everything) -> Tensor:
    tokens = torch.randint(0, 11, (128, 6), generator=torch.Generator().manual_seed(99))
    return (model(tokens) - (tokens[:, 2:5].float().mean(1) - 5) / 2).square().mean()


SPIKE = 1000.0
#: Steps after which the second moment, SPIKE**2 at first, is what it was.
FORGOTTEN = math.ceil(-math.log(SPIKE**2) / math.log(0.95))


@each_frequency
@each_mode
@pytest.mark.parametrize("sign", [1, -1])
def test_training_recovers_from_a_spike_of_1000_before_the_second_moment_has_forgotten_it(
    sign: int, mode: str, frequency: int
) -> None:
    model = new_model()
    optimizer = SOAP(model.parameters(), lr=3e-2, precondition_frequency=frequency, **MODES[mode])
    losses: list[float] = []
    while len(losses) < 43 or losses[-1] > losses[40]:
        assert len(losses) <= 40 + FORGOTTEN
        loss = full_loss(model)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if len(losses) == 41:
            for p in model.parameters():
                p.grad *= sign * SPIKE
        optimizer.step()
        assert all(value.isfinite().all() for _, value in floats(optimizer))
    assert max(losses[41:]) > 3 * losses[40], "the spike did no harm, so nothing was tested"


# --- learning rate, counters, weights -----------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("zero", [0.0, 0, torch.tensor(0.0)], ids=["float", "int", "tensor"])
def test_at_a_learning_rate_of_zero_no_weight_moves_and_the_state_does_as_ever(mode: str, zero: float | Tensor) -> None:
    still, moving = ([nn.Parameter(random_normal(s, 77)) for s in SHAPES] for _ in range(2))
    start = [p.detach().clone() for p in still]
    options = {"weight_decay": 0.1, "weight_decay_method": "independent", **MODES[mode]}
    optimizers = [SOAP(still, lr=zero, **options), SOAP(moving, lr=0.1, **options)]
    for step in range(6):
        for ours, theirs in zip(still, moving, strict=True):
            ours.grad = theirs.grad = random_normal(tuple(ours.shape), step)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(still, start, strict=True))
    for ours, theirs in zip(still, moving, strict=True):
        state, other = optimizers[0].state[ours], optimizers[1].state[theirs]
        assert all(torch.equal(value, other[key]) for key, value in state.items())
        ours.data.copy_(theirs.detach())
    optimizers[0].param_groups[0]["lr"] = 0.1
    for ours, theirs in zip(still, moving, strict=True):
        ours.grad = theirs.grad = random_normal(tuple(ours.shape), 50)
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(still, moving, strict=True))
    assert not any(torch.equal(p, old) for p, old in zip(still, start, strict=True))


def with_counter(step: int, options: dict) -> tuple[list[nn.Parameter], SOAP]:
    """Parameters and an optimizer that has seen 4 gradients and believes to have done ``step`` steps."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = SOAP(parameters, lr=0.1, **options)
    advance(parameters, optimizer, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = torch.tensor(float(step), dtype=state["step"].dtype)
        if "refresh_step" in state:
            state["refresh_step"] = torch.tensor(float(step - 1), dtype=state["step"].dtype)
    optimizer.load_state_dict(saved)
    return parameters, optimizer


def advance(parameters: list[nn.Parameter], optimizer: SOAP, steps: int, seed: int = 0) -> list[int]:
    """The first parameter's ``refresh_step`` after each step."""
    seen = []
    for step in range(seed, seed + steps):
        for p in parameters:
            p.grad = random_normal(tuple(p.shape), step)
        optimizer.step()
        if "refresh_step" in optimizer.state[parameters[0]]:
            seen.append(int(optimizer.state[parameters[0]]["refresh_step"]))
    return seen


@each_mode
@pytest.mark.parametrize("start", [1_000_000 - 2, 2**24 - 3], ids=["a million", "2**24"])
def test_steps_are_counted_and_refreshes_due_beyond_any_number_of_steps(start: int, mode: str) -> None:
    parameters, optimizer = with_counter(start, {"precondition_frequency": 5, **MODES[mode]})
    seen = advance(parameters, optimizer, 15, seed=10)
    due, last = [], start - 1
    for step in range(start, start + 15):
        last = step + 1 if step % 5 == 0 else last
        due.append(last)
    assert seen == due
    assert [int(optimizer.state[p]["step"]) for p in parameters] == [start + 15] * len(parameters)
    assert_sound(optimizer)


@pytest.mark.parametrize("frequency", [lambda step: 1_000_000, LinearFrequency(1, 1000, 1_000_000)])
def test_a_callable_frequency_of_a_million_steps_is_asked_for_the_true_step(frequency: Callable[[int], int]) -> None:
    asked = []

    def asking(step: int) -> int:
        asked.append(step)
        return frequency(step)

    parameters, optimizer = with_counter(999_998, {"precondition_frequency": asking})
    asked.clear()
    seen = advance(parameters, optimizer, 5, seed=10)
    assert set(asked) == {999_998, 999_999, 1_000_000, 1_000_001, 1_000_002}
    assert seen == [999_997, 999_997, 1_000_001, 1_000_001, 1_000_001]
    assert_sound(optimizer)


def test_a_million_steps_of_counter_step_like_a_fresh_one_but_for_the_bias_correction() -> None:
    parameters, optimizer = with_counter(1_000_000, {"correct_bias": False, "precondition_frequency": 4})
    twins = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    twin = SOAP(twins, lr=0.1, correct_bias=False, precondition_frequency=4)
    advance(twins, twin, 4)
    assert advance(parameters, optimizer, 6, seed=10)[-1] - 1_000_000 == advance(twins, twin, 6, seed=10)[-1] - 4
    for ours, theirs in zip(parameters, twins, strict=True):  # the floor of the second moment is lower by then
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)


@each_frequency
@each_mode
@pytest.mark.parametrize("method", ["decoupled", "independent", "l2"])
@pytest.mark.parametrize("size", [1e15, 1e30])
def test_huge_weights_stay_finite_and_only_shrink(size: float, method: str, mode: str, frequency: int) -> None:
    parameters = [nn.Parameter(size * random_normal(shape, 3)) for shape in SHAPES]
    start = [p.detach().abs().max() for p in parameters]
    options = {"weight_decay_method": method, "precondition_frequency": frequency, **MODES[mode]}
    optimizer = SOAP(parameters, lr=0.1, weight_decay=0.1, **options)
    for step in range(8):
        for p in parameters:
            p.grad = random_normal(tuple(p.shape), step)
        optimizer.step()
        assert_sound(optimizer)
    assert all(p.detach().abs().max() <= most for p, most in zip(parameters, start, strict=True))


@each_mode
def test_a_gradient_that_overflows_again_and_again_does_not_stop_a_model(mode: str) -> None:
    model = new_model()
    optimizer = SOAP(model.parameters(), lr=3e-2, **MODES[mode])

    def overflow(_: object, __: object, ___: object) -> None:
        count = int(optimizer.state[model.scale]["step"]) if optimizer.state else 0
        if count % 4 == 3:
            for p in model.parameters():
                p.grad *= 1e25

    optimizer.register_step_pre_hook(overflow)
    losses = train(optimizer, model, 60)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert int(optimizer.state[model.hidden.weight]["skipped_steps"]) == 15
    assert_sound(optimizer)
