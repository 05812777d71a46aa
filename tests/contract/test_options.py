"""Options: tensors as learning rates, validation wherever an option can enter, and keys that are not ours."""

import copy

import pytest
import torch

from tests.contract.configurations import SHARED_INVALID, SOAP_INVALID, Configuration, every_configuration, option_of
from tests.contract.models import new_parameters, same, snapshot, take_steps

GROUPS_ARE_NOT_LOOKED_AT = "AdamW validates the constructor's arguments and no group"


def cases_for(configuration: Configuration) -> dict:
    return SHARED_INVALID if configuration.info.name == "AdamW" else SHARED_INVALID | SOAP_INVALID


@every_configuration()
def test_every_option_is_validated_in_the_constructor(configuration: Configuration) -> None:
    """An impossible value of any option is refused by the constructor."""
    for case, (value, message) in cases_for(configuration).items():
        with pytest.raises((TypeError, ValueError), match=message):
            configuration.optimizer(new_parameters(), **{option_of(case): value})


@every_configuration(adamw_fails=GROUPS_ARE_NOT_LOOKED_AT)
def test_every_option_is_validated_in_a_group(configuration: Configuration) -> None:
    """An impossible value of any option is refused in a group that is given to the constructor."""
    for case, (value, message) in cases_for(configuration).items():
        with pytest.raises((TypeError, ValueError), match=message):
            configuration.optimizer([{"params": new_parameters(), option_of(case): value}])


@every_configuration(adamw_fails=GROUPS_ARE_NOT_LOOKED_AT)
def test_every_option_is_validated_in_add_param_group(configuration: Configuration) -> None:
    """An impossible value of any option is refused by `add_param_group`, which adds nothing then."""
    optimizer = configuration.optimizer(new_parameters())
    for case, (value, message) in cases_for(configuration).items():
        with pytest.raises((TypeError, ValueError), match=message):
            optimizer.add_param_group({"params": new_parameters(), option_of(case): value})
        assert len(optimizer.param_groups) == 1


@every_configuration(adamw_fails="AdamW steps with whatever is in the group")
def test_an_option_changed_to_an_impossible_value_is_refused_before_anything_moves(
    configuration: Configuration,
) -> None:
    """An impossible value that someone puts into a group later is refused by `step` before anything moves."""
    first, second = new_parameters(), new_parameters()
    optimizer = configuration.optimizer([{"params": first}, {"params": second}])
    take_steps(optimizer, first + second, 2)
    before, state = snapshot(first + second), copy.deepcopy(optimizer.state_dict()["state"])
    for case, (value, message) in cases_for(configuration).items():
        group = optimizer.param_groups[1]
        kept = group[option_of(case)]
        group[option_of(case)] = value
        with pytest.raises((TypeError, ValueError), match=message):
            optimizer.step()
        group[option_of(case)] = kept
        assert same(first + second, before)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][key], state[i][key]) for i in state for key in state[i])


@every_configuration(adamw_fails="AdamW loads whatever options the state dict has")
def test_an_impossible_option_in_a_state_dict_is_refused(configuration: Configuration) -> None:
    """An impossible value of any option is refused by `load_state_dict`, which changes nothing then."""
    optimizer = configuration.optimizer(new_parameters())
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    for case, (value, message) in cases_for(configuration).items():
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0][option_of(case)] = value
        with pytest.raises((TypeError, ValueError), match=message):
            optimizer.load_state_dict(saved)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups


@every_configuration(adamw_fails="AdamW accepts an infinite learning rate")
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_an_infinite_learning_rate_is_refused(configuration: Configuration, as_tensor: bool) -> None:
    """An infinite learning rate is refused, as a number and as a tensor."""
    lr = torch.tensor(float("inf")) if as_tensor else float("inf")
    with pytest.raises(ValueError, match="Invalid learning rate: .*inf"):
        configuration.optimizer(new_parameters(), lr=lr)


@every_configuration()
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_learning_rate_may_be_a_tensor_of_one_element(configuration: Configuration, shape: tuple) -> None:
    """A learning rate may be a tensor of one element, 0-D or 1-D, and steps as the number does."""
    by_tensor, by_number = new_parameters(dtype=torch.float64), new_parameters(dtype=torch.float64)
    lr = torch.full(shape, 0.03125)
    take_steps(configuration.optimizer(by_tensor, lr=lr), by_tensor, 5)
    take_steps(configuration.optimizer(by_number, lr=0.03125), by_number, 5)
    torch.testing.assert_close(by_tensor, by_number)
    assert torch.equal(lr, torch.full(shape, 0.03125)), "a step must not change it"


@every_configuration()
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_tensor_learning_rate_is_read_at_every_step(configuration: Configuration, shape: tuple) -> None:
    """A tensor learning rate is the group's own object, and changing it in place counts from the next step."""
    by_tensor, by_number = new_parameters(dtype=torch.float64), new_parameters(dtype=torch.float64)
    lr = torch.full(shape, 0.5)
    optimizer, control = configuration.optimizer(by_tensor, lr=lr), configuration.optimizer(by_number, lr=0.5)
    assert optimizer.param_groups[0]["lr"] is lr
    for step in range(6):
        take_steps(optimizer, by_tensor, 1, start=step)
        take_steps(control, by_number, 1, start=step)
        lr.mul_(0.5)
        control.param_groups[0]["lr"] *= 0.5
    torch.testing.assert_close(by_tensor, by_number)


@every_configuration()
def test_a_scheduler_changes_a_tensor_learning_rate_in_place(configuration: Configuration) -> None:
    """A scheduler changes a tensor learning rate in place, and the optimizer follows it."""
    by_tensor, by_number = new_parameters(dtype=torch.float64), new_parameters(dtype=torch.float64)
    lr = torch.tensor(0.5)
    optimizer, control = configuration.optimizer(by_tensor, lr=lr), configuration.optimizer(by_number, lr=0.5)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (optimizer, control)]
    for step in range(5):
        take_steps(optimizer, by_tensor, 1, start=step)
        take_steps(control, by_number, 1, start=step)
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.5**6
    torch.testing.assert_close(by_tensor, by_number)


@every_configuration()
def test_options_may_change_between_steps(configuration: Configuration) -> None:
    """Learning rate, betas, eps, weight decay and maximize may change between steps and count from the next."""
    changes = {"lr": 0.5, "betas": (0.5, 0.75), "eps": 0.25, "weight_decay": 0.5, "maximize": True}
    ends = {}
    for name, value in ({"": None} | changes).items():
        parameters = new_parameters(dtype=torch.float64)
        optimizer = configuration.optimizer(parameters)
        take_steps(optimizer, parameters, 4)
        if name:
            optimizer.param_groups[0][name] = value
        take_steps(optimizer, parameters, 1, start=4)
        ends[name] = snapshot(parameters)
    for name in changes:
        assert not any(torch.allclose(p, q, rtol=1e-6) for p, q in zip(ends[name], ends[""], strict=True)), name


@every_configuration()
def test_keys_that_frameworks_put_into_groups_are_left_alone(configuration: Configuration) -> None:
    """Keys that frameworks put into groups (`foreach`, `fused`, `initial_lr`, `is_expert`) are kept and harmless."""
    foreign = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
    foreign |= {"initial_lr": 0.1, "is_expert": True, "lr_scale": 2.0, "name": "decoder"}
    parameters, added, plain = new_parameters(), new_parameters(), new_parameters()
    optimizer = configuration.optimizer([{"params": parameters, **foreign}])
    optimizer.add_param_group({"params": added, **foreign})
    take_steps(optimizer, parameters, 3)
    take_steps(optimizer, added, 3)
    take_steps(configuration.optimizer(plain), plain, 3)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in optimizer.param_groups:
        assert {key: group[key] for key in foreign} == foreign
    assert same(added, plain)
