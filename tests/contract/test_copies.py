"""Copies of an optimizer: deepcopy, pickle, and a file with the whole object in it."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.contract.configurations import Configuration, every_configuration
from tests.contract.models import Net, new_parameters, same, take_steps, train


def through_torch_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_torch_save,
}


@every_configuration()
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("steps", [0, 5])
def test_a_copy_made_with_the_model_goes_on_alike(configuration: Configuration, how: str, steps: int) -> None:
    """A copy of model and optimizer in one go optimizes the copied model, and goes on bit for bit alike."""
    model = Net()
    optimizer = configuration.optimizer(model.parameters())
    train(optimizer, model, steps)
    twin_model, twin = COPIES[how]((model, optimizer))
    held = [p for group in twin.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in twin_model.parameters()]
    assert repr(twin) == repr(optimizer)
    assert type(twin) is type(optimizer)
    assert train(optimizer, model, 6, start=steps) == train(twin, twin_model, 6, start=steps)
    assert same(model.parameters(), twin_model.parameters())


@every_configuration()
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_shares_nothing_with_the_original(configuration: Configuration, how: str) -> None:
    """A copy shares no tensor, group or hook with the original."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters, lr=torch.tensor(0.01))
    calls: list[int] = []
    if how == "deepcopy":
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
    take_steps(optimizer, parameters, 3)
    twin = COPIES[how](optimizer)
    held = [p for group in twin.param_groups for p in group["params"]]

    def storages(one: torch.optim.Optimizer, params: list) -> set[int]:
        state = [v for s in one.state.values() for v in s.values()]
        return {v.data_ptr() for v in [*state, *params, one.param_groups[0]["lr"]]}

    assert not storages(optimizer, parameters) & storages(twin, held)
    assert same(held, parameters)
    kept, calls_before = [p.detach().clone() for p in parameters], len(calls)
    twin.param_groups[0]["lr"].fill_(0.5)
    take_steps(twin, held, 2)
    assert same(parameters, kept)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.01)
    assert len(calls) == calls_before


@every_configuration()
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_a_working_optimizer(configuration: Configuration, how: str) -> None:
    """A copy saves, loads, takes groups and hooks like an optimizer that was constructed."""
    model = Net()
    optimizer = configuration.optimizer(model.named_parameters())
    train(optimizer, model, 3)
    twin_model, twin = COPIES[how]((model, optimizer))
    calls: list[str] = []
    twin.register_step_pre_hook(lambda *_: calls.append("pre"))
    twin.register_step_post_hook(lambda *_: calls.append("post"))
    twin.load_state_dict(copy.deepcopy(twin.state_dict()))
    twin.add_param_group({"params": [("extra", new_parameters([(2, 2)])[0])]})
    train(twin, twin_model, 2, start=3)
    assert calls == ["pre", "post"] * 2
    twin.zero_grad()
    assert all(p.grad is None for p in twin_model.parameters())
    assert twin.defaults.keys() >= optimizer.defaults.keys()


@every_configuration()
def test_repr_stays_the_same_in_training(configuration: Configuration) -> None:
    """The repr is the same before and after training: it shows options, not state."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    before = repr(optimizer)
    take_steps(optimizer, parameters, 3)
    assert repr(optimizer) == before
