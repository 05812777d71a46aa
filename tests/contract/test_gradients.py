"""Gradients that are missing, late, zero, part of a graph, sparse or complex."""

import pytest
import torch

from tests.contract.configurations import Configuration, every_configuration
from tests.contract.models import SHAPES, Net, give_gradients, loss_of, new_parameters, same, seeded, snapshot

PRESENCE = {
    "late": lambda index, step: step >= 2 + index,
    "intermittent": lambda index, step: (step + index) % 3 != 1,
    "early only": lambda index, step: step < 3 + index,
    "never": lambda index, step: False,
}


@every_configuration()
@pytest.mark.parametrize("presence", PRESENCE)
def test_each_parameter_keeps_its_own_clock(configuration: Configuration, presence: str) -> None:
    """A parameter whose gradient is late or missing at times steps as in an optimizer that saw only its gradients."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    before = snapshot(parameters)
    seen: list[list[int]] = [[] for _ in parameters]
    for step in range(9):
        give_gradients(parameters, step)
        for index, p in enumerate(parameters):
            if PRESENCE[presence](index, step):
                seen[index].append(step)
            else:
                p.grad = None
        kept = snapshot(parameters)
        optimizer.step()
        for p, old in zip(parameters, kept, strict=True):
            assert p.grad is not None or torch.equal(p, old)
    for index, (p, steps) in enumerate(zip(parameters, seen, strict=True)):
        alone = new_parameters()[index]
        control = configuration.optimizer([alone])
        for step in steps:
            alone.grad = seeded(p.shape, 100 * step + index)
            control.step()
        assert torch.equal(p, alone)
        assert (p in optimizer.state) == bool(steps)
        assert not steps or int(optimizer.state[p]["step"]) == len(steps)
        assert steps or torch.equal(p, before[index])


@every_configuration()
@pytest.mark.parametrize("warm", [0, 5])
def test_zero_gradients_move_nothing_and_make_no_nan(configuration: Configuration, warm: int) -> None:
    """Zero gradients move no weight without weight decay, and make no NaN, also after and before other gradients."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters, weight_decay=0.0, betas=(0.0, 0.9))  # no momentum to coast on
    for step in range(warm):
        give_gradients(parameters, step)
        optimizer.step()
    before = snapshot(parameters)
    for _ in range(5):
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert same(parameters, before)
    for step in range(5):
        give_gradients(parameters, 50 + step)
        optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    values = [v for state in optimizer.state.values() for v in state.values()]
    assert all(v.isfinite().all() for v in values + parameters)


@every_configuration()
def test_a_gradient_may_be_part_of_a_graph(configuration: Configuration) -> None:
    """A gradient that is part of a graph (`create_graph=True`) is used like any other, and the graph not extended."""
    model, plain = Net(), Net()
    optimizer, control = configuration.optimizer(model.parameters()), configuration.optimizer(plain.parameters())
    for step in range(4):
        grads = torch.autograd.grad(loss_of(model, step), list(model.parameters()), create_graph=True)
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad
        control.zero_grad()
        loss_of(plain, step).backward()
        optimizer.step()
        control.step()
        assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    torch.testing.assert_close(snapshot(model.parameters()), snapshot(plain.parameters()))
    assert all(p.is_leaf and p.grad_fn is None for p in model.parameters())
    assert not any(v.requires_grad for state in optimizer.state.values() for v in state.values())


@every_configuration()
def test_one_tensor_may_be_the_gradient_of_two_parameters(configuration: Configuration) -> None:
    """One tensor may be the gradient of several parameters, and each steps as with a copy of it."""
    shared, own = new_parameters([(4, 3)] * 2), new_parameters([(4, 3)] * 2)
    optimizer, control = configuration.optimizer(shared), configuration.optimizer(own)
    for step in range(4):
        grad = seeded((4, 3), step)
        for p in shared:
            p.grad = grad
        for p in own:
            p.grad = grad.clone()
        optimizer.step()
        control.step()
    assert same(shared, own)


@every_configuration()
def test_a_sparse_gradient_raises(configuration: Configuration) -> None:
    """A sparse gradient raises a RuntimeError that says so."""
    (p,) = new_parameters([(4, 3)])
    p.grad = seeded((4, 3), 0).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        configuration.optimizer([p]).step()


@every_configuration(adamw_fails="AdamW has stepped the groups before by then, and does not say which parameter it is")
@pytest.mark.parametrize("named", [False, True])
def test_a_sparse_gradient_is_named_before_anything_moves(configuration: Configuration, named: bool) -> None:
    """The error about a sparse gradient names the parameter, and nothing in any group has changed."""
    parameters = new_parameters()
    first, second = parameters[:3], parameters[3:]
    groups = [{"params": [("a", first[0]), ("b", first[1]), ("c", first[2])]}, {"params": [("kernel", second[0])]}]
    optimizer = configuration.optimizer(groups if named else [{"params": first}, {"params": second}])
    give_gradients(parameters, 0)
    optimizer.step()
    before = snapshot(parameters)
    second[0].grad = second[0].grad.to_sparse()
    called = "parameter 'kernel'" if named else r"parameter 0 of its group, shape \(2, 3, 2, 2\)"
    with pytest.raises(RuntimeError, match="(?i)sparse gradients") as caught:
        optimizer.step()
    assert same(parameters, before)
    assert [int(optimizer.state[p]["step"]) for p in parameters] == [1] * 4
    assert caught.match(called)


@every_configuration()
def test_a_complex_gradient_is_supported_or_refused_by_name(configuration: Configuration) -> None:
    """A complex gradient is either supported, or refused with the parameter's name before anything moves."""
    weights = new_parameters() + [torch.nn.Parameter(torch.complex(seeded((4, 3), 0), seeded((4, 3), 1)))]
    names = [f"weight {index}" for index in range(len(weights))]
    optimizer = configuration.optimizer(zip(names, weights, strict=True))
    before = snapshot(weights)
    for p in weights:
        p.grad = torch.ones_like(p)
    if configuration.info.supports_complex:
        optimizer.step()
        assert not any(torch.equal(p, old) for p, old in zip(weights, before, strict=True))
        return
    with pytest.raises(RuntimeError, match="complex gradients, got one for parameter 'weight 4'"):
        optimizer.step()
    assert same(weights, before)
    assert len(optimizer.state) == 0


@every_configuration(adamw_fails="AdamW writes the NaN into the weight and its moments, for good")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nonfinite_gradient_spoils_nothing(configuration: Configuration, bad: float) -> None:
    """A NaN or Inf in a gradient leaves that tensor as it is, the others step, and training goes on."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    for step in range(3):
        give_gradients(parameters, step)
        optimizer.step()
    for index in range(len(SHAPES)):
        before = snapshot(parameters)
        give_gradients(parameters, 3 + index)
        parameters[index].grad.view(-1)[0] = bad
        optimizer.step()
        assert [torch.equal(p, old) for p, old in zip(parameters, before, strict=True)] == [
            other == index for other in range(len(SHAPES))
        ]
    give_gradients(parameters, 20)
    optimizer.step()
    values = [v for state in optimizer.state.values() for v in state.values()]
    assert all(v.isfinite().all() for v in values + parameters)
