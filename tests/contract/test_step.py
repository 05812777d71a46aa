"""One step: the closure, the grad mode, what a step may touch, and that it goes in the right direction."""

import inspect

import pytest
import torch
from torch import Tensor, nn

from tests.contract.configurations import Configuration, every_configuration, every_input
from tests.contract.models import (
    Net,
    give_gradients,
    loss_of,
    new_parameters,
    same,
    seeded,
    snapshot,
    take_steps,
    train,
)


@every_configuration()
@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad])
def test_a_closure_is_called_once_with_gradients_enabled(configuration: Configuration, how: str, outside: type) -> None:
    """A closure is called exactly once, with gradients enabled, and `step` returns its loss."""
    model, twin = Net(), Net()
    optimizer, control = configuration.optimizer(model.parameters()), configuration.optimizer(twin.parameters())
    losses: list[Tensor] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        losses.append(loss_of(model, len(losses)))
        losses[-1].backward()
        return losses[-1]

    for step in range(4):
        with outside():
            returned = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
            assert torch.is_grad_enabled() == (outside is torch.enable_grad)
        assert len(losses) == step + 1
        assert returned is losses[-1]
    assert [loss.item() for loss in losses] == train(control, twin, 4)
    assert same(model.parameters(), twin.parameters())


@every_configuration()
def test_without_a_closure_step_returns_none(configuration: Configuration) -> None:
    """Without a closure `step` returns None, also where no parameter has a gradient."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    before = snapshot(parameters)
    assert optimizer.step() is None
    assert same(parameters, before)
    assert len(optimizer.state) == 0
    give_gradients(parameters, 0)
    assert optimizer.step() is None
    assert "closure" in inspect.signature(optimizer.step).parameters


@every_configuration()
def test_an_error_in_the_closure_comes_out_and_nothing_moves(configuration: Configuration) -> None:
    """An error in the closure comes out of `step`, nothing has moved, and the next step works."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    take_steps(optimizer, parameters, 2)
    before = snapshot(parameters)

    def closure() -> float:
        raise ZeroDivisionError("in the model")

    with torch.no_grad(), pytest.raises(ZeroDivisionError, match="in the model"):
        optimizer.step(closure)
    assert same(parameters, before)
    take_steps(optimizer, parameters, 1, start=2)
    assert [int(optimizer.state[p]["step"]) for p in parameters] == [3] * 4


@every_configuration()
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_grad_mode_around_a_step_does_not_matter(configuration: Configuration, mode: type) -> None:
    """A step does the same under `no_grad`, `enable_grad` and `inference_mode`, and leaves no graph behind."""
    parameters, control = new_parameters(), new_parameters()
    optimizer = configuration.optimizer(parameters)
    with mode():
        for step in range(5):
            for p, q in zip(parameters, control, strict=True):
                p.grad = seeded(p.shape, 100 * step + p.ndim)
                q.grad = p.grad.clone()
            optimizer.step()
    plain = configuration.optimizer(control)
    for step in range(5):
        for q in control:
            q.grad = seeded(q.shape, 100 * step + q.ndim)
        plain.step()
    assert same(parameters, control)
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in parameters)
    assert not any(v.requires_grad for state in optimizer.state.values() for v in state.values())


@every_input()
def test_gradients_are_never_modified(configuration: Configuration) -> None:
    """A step never modifies a gradient, not even its version, whatever the weight decay, also with maximize."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    for step in range(5):
        give_gradients(parameters, step)
        grads, before = [p.grad for p in parameters], snapshot(p.grad for p in parameters)
        versions = [grad._version for grad in grads]
        optimizer.step()
        assert same(grads, before)
        assert [grad._version for grad in grads] == versions
        assert all(p.grad is grad for p, grad in zip(parameters, grads, strict=True))


@every_configuration()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_parameter_stays_what_it_is(configuration: Configuration, dtype: torch.dtype) -> None:
    """A parameter keeps its identity, memory, dtype, device, attributes and `requires_grad`."""
    parameters = new_parameters(dtype=dtype)
    for p in parameters:
        p.tag = "mine"
    optimizer = configuration.optimizer(parameters)
    kept = [(id(p), p.data_ptr(), p.dtype, p.device, p.stride(), p.requires_grad, p.is_leaf) for p in parameters]
    before, versions = snapshot(parameters), [p._version for p in parameters]
    take_steps(optimizer, parameters, 5)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert kept == [(id(p), p.data_ptr(), p.dtype, p.device, p.stride(), p.requires_grad, p.is_leaf) for p in held]
    assert all(p.tag == "mine" and type(p) is nn.Parameter for p in parameters)
    assert not any(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert all(p._version > old for p, old in zip(parameters, versions, strict=True)), "autograd must notice"


@every_configuration()
def test_changing_weights_in_place_is_noticed_by_autograd(configuration: Configuration) -> None:
    """A backward pass through weights that a step has changed since is an error, as torch's own check wants."""
    model = Net()
    optimizer = configuration.optimizer(model.parameters())
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_configuration()
def test_frozen_parameters_are_left_alone(configuration: Configuration) -> None:
    """Parameters with `requires_grad=False` are left alone, and start when they are unfrozen."""
    model = Net()
    model.hidden.requires_grad_(False)
    optimizer = configuration.optimizer(model.parameters())
    before = snapshot(model.hidden.parameters())
    train(optimizer, model, 3)
    assert same(model.hidden.parameters(), before)
    assert not any(p in optimizer.state for p in model.hidden.parameters())
    model.hidden.requires_grad_(True)
    train(optimizer, model, 3, start=3)
    assert not any(torch.equal(p, old) for p, old in zip(model.hidden.parameters(), before, strict=True))


@every_configuration()
def test_two_runs_are_equal_bit_for_bit(configuration: Configuration) -> None:
    """Two runs from the same start are equal bit for bit, weights, losses and state."""
    models = [Net(), Net()]
    optimizers = [configuration.optimizer(model.parameters()) for model in models]
    losses = [train(optimizer, model, 10) for optimizer, model in zip(optimizers, models, strict=True)]
    assert losses[0] == losses[1]
    assert same(models[0].parameters(), models[1].parameters())
    for state, other in zip(*(optimizer.state.values() for optimizer in optimizers), strict=True):
        assert same(state.values(), other.values())


@every_configuration()
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("schedule", ["none", "harness"])
def test_a_step_goes_in_the_right_direction(configuration: Configuration, maximize: bool, schedule: str) -> None:
    """A least-squares loss falls, and its negative rises with `maximize`, also under the harness's schedulers."""
    inputs, targets = seeded((64, 4), 1), seeded((64, 3), 2)
    weight, bias = new_parameters([(3, 4), (3,)])
    optimizer = configuration.optimizer(
        [{"params": [weight]}, {"params": [bias], "lr": 0.02}], lr=0.05, maximize=maximize
    )
    makers = [maker for makers in configuration.info.scheduler_inputs for maker in makers]
    schedulers = [maker(optimizer) for maker in makers] if schedule == "harness" else []
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (inputs @ weight.T + bias - targets).square().mean()
        (-loss if maximize else loss).backward()
        optimizer.step()
        losses.append(loss.item())
        for scheduler in schedulers:
            takes_loss = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([losses[-1]] if takes_loss else []))
    assert losses[-1] < 0.6 * losses[0]


@every_configuration()
def test_maximize_is_minimizing_the_negative(configuration: Configuration) -> None:
    """`maximize=True` does bit for bit what the negated gradient does without it."""
    up, down = new_parameters(), new_parameters()
    optimizers = configuration.optimizer(up, maximize=True), configuration.optimizer(down)
    for step in range(5):
        give_gradients(up, step)
        for p, q in zip(up, down, strict=True):
            q.grad = -p.grad
        for optimizer in optimizers:
            optimizer.step()
    assert same(up, down)


@every_configuration()
def test_groups_have_their_own_options_in_a_step(configuration: Configuration) -> None:
    """Learning rate, weight decay and betas of each group act on its own parameters alone."""
    options = [{"lr": 0.5, "weight_decay": 0.5}, {"lr": 0.01, "betas": (0.5, 0.75)}, {"eps": 0.1}]
    together = [new_parameters(dtype=torch.float64) for _ in options]
    groups = [{"params": ps, **own} for ps, own in zip(together, options, strict=True)]
    optimizer = configuration.optimizer(groups)
    for step in range(5):
        for parameters in together:
            give_gradients(parameters, step)
        optimizer.step()
    for parameters, own in zip(together, options, strict=True):
        alone = new_parameters(dtype=torch.float64)
        take_steps(configuration.optimizer(alone, **own), alone, 5)
        assert same(parameters, alone)


@every_configuration()
def test_decoupled_weight_decay_shrinks_each_groups_weights(configuration: Configuration) -> None:
    """Weight decay is decoupled: it shrinks a group's weights by 1 - lr * weight_decay, the others' not at all."""
    decayed, kept = new_parameters(), new_parameters()
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": kept, "weight_decay": 0.0}]
    optimizer = configuration.optimizer(groups, lr=0.25)
    before = snapshot(decayed)
    for _ in range(3):
        for p in decayed + kept:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert same(kept, before)
    torch.testing.assert_close(snapshot(decayed), [old * (1 - 0.25 * 0.5) ** 3 for old in before])


@every_configuration()
def test_a_learning_rate_of_zero_moves_nothing(configuration: Configuration) -> None:
    """A learning rate of zero moves no weight, while the state goes on."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters, lr=0.0, weight_decay=0.1)
    before = snapshot(parameters)
    take_steps(optimizer, parameters, 4)
    assert same(parameters, before)
    assert all(int(optimizer.state[p]["step"]) == 4 and optimizer.state[p]["exp_avg"].any() for p in parameters)
