"""Checkpoints: checked before anything changes, and loadable by torch's own tools."""

import copy
import io
import itertools
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from emerging_optimizers.schedules import LinearFrequency
from emerging_optimizers.soap import SOAP
from tests.algorithm.test_soap import MODES, Everything, new_model, train


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(steps: int = 5, named: bool = False, **options: object) -> tuple[Everything, SOAP]:
    model = new_model()
    optimizer = SOAP(model.named_parameters() if named else model.parameters(), **{"lr": 1e-2, **options})
    train(optimizer, model, steps)
    return model, optimizer


def test_options_that_a_saved_state_does_not_know_keep_the_optimizers_values() -> None:
    _, optimizer = trained(second_moment_refresh="kronecker")
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["second_moment_refresh"]
    for state in saved["state"].values():
        del state["skipped_steps"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["second_moment_refresh"] == "kronecker"
    assert all(int(state["skipped_steps"]) == 0 for state in optimizer.state.values())


FREQUENCIES = {"integer": 7, "schedule": LinearFrequency(1, 10, 50), "lambda": lambda step: 3}


@pytest.mark.parametrize(("saved", "live"), list(itertools.product(FREQUENCIES, repeat=2)))
def test_a_callable_frequency_is_not_saved_and_the_live_one_is_kept(
    saved: str, live: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, optimizer = trained(precondition_frequency=FREQUENCIES[saved])
    state = through_a_file(optimizer.state_dict())
    other = SOAP(new_model().parameters(), lr=1e-2, precondition_frequency=FREQUENCIES[live])
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(state)
    assert other.param_groups[0]["precondition_frequency"] is FREQUENCIES[live]
    mismatch = (saved == "integer") != (live == "integer")
    assert len(caplog.records) == mismatch
    if mismatch:
        assert "precondition_frequency" in caplog.text


# --- what does not fit ---------------------------------------------------------------------------------------------

#: What is done to the saved groups and to the state of a matrix, and the error.
SPOILED: dict[str, tuple[Callable[[list, dict], object], type[Exception], str]] = {
    "group count": (
        lambda groups, _: groups.append({**groups[0], "params": []}),
        ValueError,
        "has 2 parameter groups, the optimizer 1",
    ),
    "parameter count": (
        lambda groups, _: groups[0]["params"].pop(),
        ValueError,
        "parameter group 0 has 8 parameters in the loaded state dict, 9 in",
    ),
    "missing key": (
        lambda _, state: state.pop("Q_0"),
        ValueError,
        "state of parameter 'hidden.weight' has the keys .* missing 'Q_0'",
    ),
    "unknown key": (
        lambda _, state: state.update(momentum_buffer=torch.zeros(2)),
        ValueError,
        "state of parameter 'hidden.weight' .* unknown 'momentum_buffer'",
    ),
    "shape": (
        lambda _, state: state.update(GG_1=torch.zeros(3, 3)),
        ValueError,
        r"'GG_1' of parameter 'hidden.weight' must have shape \(24, 24\), got \(3, 3\)",
    ),
    "type": (
        lambda _, state: state.update(exp_avg=[1.0]),
        TypeError,
        "'exp_avg' of parameter 'hidden.weight' must be a Tensor, got list",
    ),
    "option": (
        lambda groups, _: groups[0].update(betas=(0.9, 1.5)),
        ValueError,
        "parameter group 0 of the loaded state dict: Invalid beta parameter at index 1: 1.5",
    ),
    "option type": (
        lambda groups, _: groups[0].update(merge_dims="yes"),
        TypeError,
        "parameter group 0 of the loaded state dict: Invalid merge_dims",
    ),
    "layout": (lambda groups, _: groups[0].update(max_precond_dim=22), ValueError, "unknown 'GG_1'"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_state_that_does_not_fit_is_refused_whole(how: str) -> None:
    model, optimizer = trained(named=True)
    twin_model, twin = copy.deepcopy((model, optimizer))
    saved = copy.deepcopy(trained(steps=9, named=True)[1].state_dict())
    spoil, error, message = SPOILED[how]
    spoil(saved["param_groups"], saved["state"][6])
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert train(optimizer, model, 3, start=5) == train(twin, twin_model, 3, start=5)


# --- torch.distributed.checkpoint, on one process -------------------------------------------------------------------


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("mode", ["default", "warm-up", "kl, 1-D, eigh", "merged", "independent", "packed, bfloat16"])
def test_distributed_checkpoint_state_dicts_go_there_and_back(mode: str, flatten: bool) -> None:
    model, optimizer = trained(**MODES[mode])
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other = new_model()
    other.load_state_dict(model.state_dict())
    resumed = SOAP(other.parameters(), **{"lr": 1e-2, **MODES[mode]})
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert train(resumed, other, 12, start=5) == train(optimizer, model, 12, start=5)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "l2"])  # there the gradient is not zero
def test_the_hidden_step_that_makes_state_moves_no_weight_and_leaves_no_basis(mode: str, lr: float | Tensor) -> None:
    model = new_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = SOAP(model.parameters(), **{"weight_decay": 0.1, **MODES[mode], "lr": lr})
    get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(int(state.get("refresh_step", 0)) == 0 for state in optimizer.state.values())
    keys = {name: sorted(optimizer.state[p]) for name, p in model.named_parameters()}
    train(optimizer, model, 4)
    assert keys == {name: sorted(optimizer.state[p]) for name, p in model.named_parameters()}
    assert all(p.isfinite().all() for p in model.parameters())
