"""Learning rate schedulers: each equals setting its values by hand, and those that cycle momentum change the betas."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch.optim import Optimizer, lr_scheduler

from tests.contract.configurations import Configuration, every_configuration
from tests.contract.models import new_parameters, same, take_steps

SCHEDULERS: dict[str, Callable[[Optimizer], lr_scheduler.LRScheduler]] = {
    "OneCycleLR": lambda one: lr_scheduler.OneCycleLR(one, max_lr=[0.1, 0.2], total_steps=10),
    "CyclicLR": lambda one: lr_scheduler.CyclicLR(one, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "CosineAnnealingLR": lambda one: lr_scheduler.CosineAnnealingLR(one, T_max=8),
    "CosineAnnealingWarmRestarts": lambda one: lr_scheduler.CosineAnnealingWarmRestarts(one, T_0=3),
    "LambdaLR per group": lambda one: lr_scheduler.LambdaLR(one, [lambda t: 0.9**t, lambda t: 1.0 + t]),
    "MultiStepLR": lambda one: lr_scheduler.MultiStepLR(one, [2, 4], gamma=0.5),
    "PolynomialLR": lambda one: lr_scheduler.PolynomialLR(one, total_iters=8),
    "SequentialLR": lambda one: lr_scheduler.SequentialLR(
        one,
        [lr_scheduler.LinearLR(one, 0.1, 1.0, total_iters=3), lr_scheduler.ExponentialLR(one, 0.5)],
        milestones=[3],
    ),
    "ChainedScheduler": lambda one: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(one, 0.5, total_iters=2), lr_scheduler.StepLR(one, 3)]
    ),
}
STEPS = 7


def groups(parameters: list) -> list[dict]:
    return [{"params": parameters[:2], "lr": 0.05}, {"params": parameters[2:], "lr": 0.02}]


@every_configuration()
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_equals_setting_its_values_by_hand(configuration: Configuration, name: str) -> None:
    """Under each of torch's schedulers training equals setting the values that it sets by hand."""
    parameters, control = new_parameters(), new_parameters()
    optimizer, plain = (
        configuration.optimizer(groups(parameters), weight_decay=0.0),
        configuration.optimizer(groups(control), weight_decay=0.0),
    )
    scheduler = SCHEDULERS[name](optimizer)
    rates = []
    for step in range(STEPS):
        for group, scheduled in zip(plain.param_groups, optimizer.param_groups, strict=True):
            group["lr"], group["betas"] = scheduled["lr"], tuple(scheduled["betas"])
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        take_steps(optimizer, parameters, 1, start=step)
        take_steps(plain, control, 1, start=step)
        scheduler.step()
    assert len(set(rates)) > 1
    assert same(parameters, control)
    unscheduled = new_parameters()
    take_steps(configuration.optimizer(groups(unscheduled), weight_decay=0.0), unscheduled, STEPS)
    assert not any(torch.equal(p, q) for p, q in zip(parameters, unscheduled, strict=True))


@every_configuration()
@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_momentum_is_cycled_through_the_betas(configuration: Configuration, name: str) -> None:
    """OneCycleLR and CyclicLR cycle momentum through `betas`, against the learning rate."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(groups(parameters))
    beta2 = optimizer.defaults["betas"][1]
    scheduler = SCHEDULERS[name](optimizer)
    seen = []
    for step in range(STEPS):
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
        take_steps(optimizer, parameters, 1, start=step)
        scheduler.step()
    by_rate = [betas[0] for _, betas in sorted(seen)]
    assert by_rate == sorted(by_rate, reverse=True)
    assert max(by_rate) > min(by_rate) + 0.05
    assert all(betas[1] == beta2 for _, betas in seen)


@every_configuration()
def test_reduce_on_plateau_lowers_every_group(configuration: Configuration) -> None:
    """ReduceLROnPlateau lowers the rate of every group when the loss stands still, and training goes on."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(groups(parameters))
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    for step in range(4):
        take_steps(optimizer, parameters, 1, start=step)
        scheduler.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.01]


@every_configuration()
@pytest.mark.parametrize("name", ["OneCycleLR", "SequentialLR"])
def test_optimizer_and_scheduler_resume_together(configuration: Configuration, name: str) -> None:
    """Optimizer and scheduler resume together from their state dicts, bit for bit."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(groups(parameters))
    scheduler = SCHEDULERS[name](optimizer)

    def go(one: Optimizer, its: lr_scheduler.LRScheduler, params: list, start: int) -> None:
        for step in range(start, start + 4):
            take_steps(one, params, 1, start=step)
            its.step()

    go(optimizer, scheduler, parameters, 0)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    others = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    fresh = configuration.optimizer(groups(others))
    resumed = SCHEDULERS[name](fresh)
    resumed.load_state_dict(saved[1])
    fresh.load_state_dict(saved[0])
    go(optimizer, scheduler, parameters, 4)
    go(fresh, resumed, others, 4)
    assert same(parameters, others)
    assert [g["lr"] for g in fresh.param_groups] == [g["lr"] for g in optimizer.param_groups]


@every_configuration()
def test_a_scheduler_notices_the_optimizers_steps(configuration: Configuration) -> None:
    """A scheduler that is stepped before the optimizer warns, and after it does not."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step\(\)"):
        scheduler.step()
    second = configuration.optimizer(new_parameters())
    later = lr_scheduler.ExponentialLR(second, 0.5)
    take_steps(second, new_parameters(), 1)
    later.step()  # a warning is an error here
