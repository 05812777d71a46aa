"""Factors of which a step keeps but the lower triangle up to date are whole to whoever gets them from the optimizer."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from emerging_optimizers.health import examine
from emerging_optimizers.soap import SOAP

OPTIONS: dict[str, Any] = {"lr": 0.01, "precondition_frequency": 4}


def training(steps: int, between: Callable[[SOAP], object] = lambda optimizer: None, **options: object) -> SOAP:
    generator = torch.Generator().manual_seed(0)
    optimizer = SOAP([torch.nn.Parameter(torch.zeros(300, 200))], **OPTIONS | options)
    for _ in range(steps):
        optimizer.param_groups[0]["params"][0].grad = torch.randn(300, 200, generator=generator)
        optimizer.step()
        between(optimizer)
    return optimizer


def state_of(optimizer: SOAP) -> dict[str, Tensor]:
    return next(iter(optimizer.state.values()))


def first_of(saved: dict[str, Any]) -> Tensor:
    return saved["state"][0]["GG_0"]


@pytest.mark.parametrize(
    "get",
    [
        lambda optimizer: first_of(optimizer.state_dict()),
        lambda optimizer: state_of(copy.deepcopy(optimizer))["GG_0"],
        lambda optimizer: state_of(pickle.loads(pickle.dumps(optimizer)))["GG_0"],
    ],
    ids=["state_dict", "deepcopy", "pickle"],
)
def test_a_factor_that_is_handed_out_is_whole(get: Callable[[SOAP], Tensor]) -> None:
    optimizer = training(7)
    factor = state_of(optimizer)["GG_0"]
    assert not torch.allclose(factor, factor.mT), "the upper triangle was kept up, so that nothing was tested"
    lower = factor.clone().tril()
    whole = get(optimizer)
    assert torch.equal(whole.tril(), lower)
    torch.testing.assert_close(whole, whole.mT)


@pytest.mark.parametrize("options", [{}, {"use_kl_shampoo": True}, {"second_moment_refresh": "kronecker"}], ids=str)
def test_handing_factors_out_changes_no_bit_of_a_run(options: dict[str, Any]) -> None:
    undisturbed, saved = training(10, **options), training(10, SOAP.state_dict, **options)
    ours, theirs = undisturbed.state_dict()["state"][0], saved.state_dict()["state"][0]
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_health_looks_at_the_lower_triangle() -> None:
    optimizer = training(7)
    before = examine(optimizer)
    optimizer.state_dict()
    after = examine(optimizer)
    assert before.tensors[0].factors == after.tensors[0].factors


def test_kl_shampoo_can_be_turned_on_between_two_refreshes() -> None:
    optimizer, completed = training(6), training(6)
    completed.state_dict()
    for one in (optimizer, completed):
        one.param_groups[0]["use_kl_shampoo"] = True
        one.step()
    ours, theirs = optimizer.state_dict()["state"][0], completed.state_dict()["state"][0]
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
