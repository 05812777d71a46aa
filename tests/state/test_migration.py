"""Where SOAP behaves otherwise than its peers: what ``docs/migration.md`` says of it."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers.soap import SOAP

ROOT = Path(__file__).parent.parent.parent
SHAPE = (6, 4)

#: In the words of ``benchmarks/peers/experiments.py``.
OURS = {
    "weight_decay": ["lr * weight_decay, of the weights before the update"] * 3,
    "decay_methods": "decoupled 0.005, independent 0.5, l2 not a multiple of the weights, palm refused",
    "refreshes_by_default": f"after steps {list(range(1, 14))}",
    "refreshes_at_4": "after steps [1, 5, 9, 13]",
    "refresh_order": "refreshes, then moves the weights (step 5)",
    "vector": "equals AdamW",
    "vector_preconditioned": "differs from AdamW; bases of sizes [5]",
    "scalar": "equals AdamW",
    "convolution": "differs from AdamW; bases of sizes [3, 4, 6]",
    "convolution_merged": "differs from AdamW; bases of sizes [6, 36]",
    "limit": "limit 8: bases of sizes [4, 8]; limit 7: bases of sizes [4]",
    "limit_zero": "equals AdamW",
    "bfloat16_state": "float32; after loading float32",
    "resume_bfloat16": "bit for bit",
    "nan_gradient": "that one is finite, the other finite",
    "missing_gradients": "left alone while it has none; then steps as alone",
    "gradient_after": "unchanged",
    "tensor_rate": "accepted, and read at every step",
    "names": "accepted",
    "maximize": "as the negated gradient",
    "state_bytes": 24.0,
}


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which finds its neighbour by the folder that it lies in."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/peers"))
    return importlib.import_module("experiments")


@pytest.mark.parametrize("experiment", OURS)
def test_soap_behaves_so(experiment: str, experiments: ModuleType) -> None:
    assert getattr(experiments, experiment)(experiments.Subject("ours")) == OURS[experiment]


def test_no_update_is_larger_than_adams_largest(experiments: ModuleType) -> None:
    assert float(experiments.largest_update(experiments.Subject("ours"))) < 1.17


def test_a_sparse_gradient_is_an_error(experiments: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="sparse"):
        experiments.sparse_gradient(experiments.Subject("ours"))


def step_once(shape: tuple[int, ...] = SHAPE, **options: Any) -> tuple[Tensor, Tensor, SOAP]:
    """The weights before and after one step, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator))
    before = weight.detach().clone()
    weight.grad = torch.randn(shape, generator=generator)
    optimizer = SOAP([weight], **{"lr": 0.1, **options})
    optimizer.step()
    return before, weight.detach(), optimizer


@pytest.mark.parametrize("shape", [(), (5,), SHAPE, (3, 4, 2)], ids=str)
def test_the_first_step_moves_the_weights(shape: tuple[int, ...]) -> None:
    before, after, _ = step_once(shape, weight_decay=0.0)
    assert (after - before).norm() > 0.01


def test_a_first_step_at_rate_zero_moves_nothing_and_makes_the_bases() -> None:
    before, after, optimizer = step_once(lr=0.0, weight_decay=0.5)
    assert torch.equal(before, after)
    (state,) = optimizer.state.values()
    assert not torch.equal(state["Q_0"], torch.eye(6))
    assert state["exp_avg"].any()


@pytest.mark.parametrize("correct", [True, False])
def test_the_factors_decay_is_bias_corrected_unless_switched_off(correct: bool) -> None:
    *_, optimizer = step_once(shampoo_beta=0.9, correct_shampoo_beta_bias=correct)
    (weight,) = optimizer.param_groups[0]["params"]
    gram = weight.grad @ weight.grad.T
    torch.testing.assert_close(optimizer.state[weight]["GG_0"], gram if correct else 0.1 * gram)


def test_eps_is_added_after_bias_correction() -> None:
    before, after, optimizer = step_once((5,), eps=0.5, weight_decay=0.0)
    grad = optimizer.param_groups[0]["params"][0].grad
    torch.testing.assert_close(before - after, 0.1 * grad / (grad.abs() + 0.5))


@pytest.mark.parametrize(("limit", "axes"), [(8, {0, 1}), (7, {1}), (4, {1}), (3, set()), (0, set())])
def test_an_axis_as_long_as_the_limit_is_preconditioned(limit: int, axes: set[int]) -> None:
    *_, optimizer = step_once((8, 4), max_precond_dim=limit)
    (state,) = optimizer.state.values()
    assert {axis for axis in (0, 1) if f"Q_{axis}" in state} == axes


@pytest.mark.parametrize("option", ["precondition_freq", "max_precondition_dim", "nesterov", "normalize_grads"])
def test_an_option_that_does_not_exist_is_a_type_error(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        step_once(**{option: 1})


@pytest.mark.parametrize("keys", [["step", "exp_avg", "exp_avg_sq"], ["step", "exp_avg", "exp_avg_sq", "GG", "Q"]])
def test_a_state_of_adamw_or_a_peer_is_refused(keys: list[str]) -> None:
    before, _, optimizer = step_once()
    foreign = {key: torch.zeros(SHAPE) if "exp" in key else torch.tensor(1.0) for key in keys}
    with pytest.raises(ValueError, match=r"parameter 0 of its group, shape \(6, 4\) has the keys"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: foreign}})


def test_a_state_of_adamw_goes_on_where_every_group_is_adamw() -> None:
    weights = [nn.Parameter(torch.ones(SHAPE)) for _ in range(2)]
    adamw = torch.optim.AdamW(weights[:1], lr=0.1)
    soap = SOAP(weights[1:], lr=0.1, max_precond_dim=0)
    for step in range(4):
        if step == 2:
            soap.load_state_dict(adamw.state_dict())
            weights[1].data.copy_(weights[0].data)
        for weight, optimizer in zip(weights, (adamw, soap), strict=True):
            weight.grad = torch.arange(24.0).reshape(SHAPE) - 10 * step
            if optimizer is adamw or step >= 2:
                optimizer.step()
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("option", ["amsgrad", "foreach", "capturable", "differentiable", "fused"])
def test_what_only_adamw_has_is_kept_in_a_group_and_does_nothing(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        step_once(**{option: True})
    paths = []
    for extra in ({}, {option: True}):
        weight = nn.Parameter(torch.ones(SHAPE))
        weight.grad = torch.arange(24.0).reshape(SHAPE)
        SOAP([{"params": [weight], **extra}], lr=0.1).step()
        paths.append(weight.detach())
    assert torch.equal(*paths)
