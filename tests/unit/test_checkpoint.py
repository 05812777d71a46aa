"""Checkpoints: bit-exact, checked before anything changes, copied, and loadable by torch's own tools."""

import copy
import io
import itertools
import logging

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
from tests.unit.test_soap import MODES, Everything, new_model, train


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_saving_and_loading_continues_bit_for_bit(mode: str, dtype: torch.dtype) -> None:
    model = new_model().to(dtype)
    options = {"lr": 1e-2, **MODES[mode]}
    optimizer = SOAP(model.parameters(), **options)
    for steps in (2, 5):  # during a warm-up of 3, and in the middle of a period of 10
        train(optimizer, model, steps)
        saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        other = new_model(seed=1).to(dtype)
        resumed = SOAP(other.parameters(), **options)
        other.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        for state, loaded in zip(optimizer.state.values(), resumed.state.values(), strict=True):
            assert all(torch.equal(state[key], loaded[key]) for key in state | loaded)
            assert {key: v.dtype for key, v in loaded.items()} == {key: v.dtype for key, v in state.items()}
        assert train(resumed, other, 8, start=30) == train(optimizer, model, 8, start=30)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_loading_copies_and_runs_the_users_hooks_once() -> None:
    _, optimizer = trained()
    saved, calls = optimizer.state_dict(), []
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after"))
    for _ in range(2):
        optimizer.load_state_dict(saved)
    assert calls == ["before", "after"] * 2
    pointers = {v.data_ptr() for state in saved["state"].values() for v in state.values()}
    assert not pointers & {v.data_ptr() for state in optimizer.state.values() for v in state.values()}


def test_a_hook_may_change_what_is_loaded() -> None:
    _, optimizer = trained()

    def halve(_: object, state_dict: dict) -> dict:
        state = {i: {**s, "exp_avg": s["exp_avg"] / 2} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    before = optimizer.state_dict()["state"][1]["exp_avg"].clone()
    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(optimizer.state_dict()["state"][1]["exp_avg"], before / 2)


def test_options_that_a_saved_state_does_not_know_keep_the_optimizers_values() -> None:
    _, optimizer = trained(second_moment_refresh="kronecker")
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["second_moment_refresh"]
    for state in saved["state"].values():
        del state["skipped_steps"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["second_moment_refresh"] == "kronecker"
    assert all(int(state["skipped_steps"]) == 0 for state in optimizer.state.values())


def test_an_empty_state_resets_the_optimizer() -> None:
    model, optimizer = trained()
    optimizer.load_state_dict(SOAP(new_model().parameters(), lr=0.5).state_dict())
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.5
    train(optimizer, model, 2)


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


def test_an_optimizer_is_deep_copied_and_goes_on_alike() -> None:
    model, optimizer = trained(precondition_frequency=LinearFrequency(1, 10, 50))
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    assert train(optimizer, model, 5, start=5) == train(optimizer_copy, model_copy, 5, start=5)


# --- what does not fit ---------------------------------------------------------------------------------------------


def spoil(saved: dict, how: str) -> None:
    state = saved["state"][6]
    group = saved["param_groups"][0]
    match how:
        case "group count":
            saved["param_groups"].append({**group, "params": []})
        case "parameter count":
            group["params"] = group["params"][:-1]
        case "missing key":
            del state["Q_0"]
        case "unknown key":
            state["momentum_buffer"] = torch.zeros(2)
        case "shape":
            state["GG_1"] = torch.zeros(3, 3)
        case "type":
            state["exp_avg"] = [1.0]
        case "option":
            group["betas"] = (0.9, 1.5)
        case "option type":
            group["merge_dims"] = "yes"
        case "layout":
            group["max_precond_dim"] = 22


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("group count", ValueError, "has 2 parameter groups, the optimizer 1"),
        ("parameter count", ValueError, "parameter group 0 has 8 parameters in the loaded state dict, 9 in"),
        ("missing key", ValueError, "state of parameter 'hidden.weight' has the keys .* missing 'Q_0'"),
        ("unknown key", ValueError, "state of parameter 'hidden.weight' .* unknown 'momentum_buffer'"),
        ("shape", ValueError, r"'GG_1' of parameter 'hidden.weight' must have shape \(24, 24\), got \(3, 3\)"),
        ("type", TypeError, "'exp_avg' of parameter 'hidden.weight' must be a Tensor, got list"),
        ("option", ValueError, "parameter group 0 of the loaded state dict: Invalid beta parameter at index 1: 1.5"),
        ("option type", TypeError, "parameter group 0 of the loaded state dict: Invalid merge_dims"),
        ("layout", ValueError, "unknown 'GG_1'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(how: str, error: type[Exception], message: str) -> None:
    model, optimizer = trained(named=True)
    twin_model, twin = copy.deepcopy((model, optimizer))
    saved = copy.deepcopy(trained(steps=9, named=True)[1].state_dict())
    spoil(saved, how)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert train(optimizer, model, 3, start=5) == train(twin, twin_model, 3, start=5)


def test_something_else_than_a_state_dict_is_refused() -> None:
    _, optimizer = trained()
    with pytest.raises(ValueError, match="keys 'state' and 'param_groups'"):
        optimizer.load_state_dict({"weight": torch.zeros(1)})


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
