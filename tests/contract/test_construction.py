"""Construction: parameters, names, groups, and what is refused."""

import inspect
import re
import warnings

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerErrorEnum, OptimizerInfo

from tests.contract.configurations import Configuration, error_cases, every_configuration, every_input
from tests.contract.models import Net, loss_of, new_parameters, snapshot, take_steps, train


@pytest.mark.parametrize(("info", "error"), list(error_cases()))
def test_what_torchs_harness_says_must_be_refused_is_refused(info: OptimizerInfo, error: ErrorOptimizerInput) -> None:
    """Everything that `torch.testing`'s harness lists as a construction error is one, in its words."""
    one = error.optimizer_error_input
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    params = new_parameters() if one.params is None else one.params
    kwargs = {"lr": 0.01, **one.kwargs}
    if error.error_type is UserWarning:
        with pytest.warns(UserWarning, match=error.error_regex):
            info.optim_cls(params, **kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            info.optim_cls(params, **kwargs)


@every_input()
def test_every_input_of_the_harness_trains_a_model(configuration: Configuration) -> None:
    """Every configuration that the harness lists moves the loss of a small network in its direction."""
    model = Net()
    optimizer = configuration.optimizer(model.parameters())
    before, loss = snapshot(model.parameters()), loss_of(model, 99).item()
    train(optimizer, model, 12)
    falls = loss_of(model, 99).item() < loss
    assert falls != configuration.input.kwargs.get("maximize", False)
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@every_configuration()
def test_params_given_as_a_set_an_empty_list_or_a_tensor_are_refused(configuration: Configuration) -> None:
    """Parameters given as a tensor, a set or an empty list are refused."""
    (p,) = new_parameters([(2, 2)])
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        configuration.optimizer([])
    with pytest.raises(TypeError, match="iterable of Tensors or dicts, but got"):
        configuration.optimizer(p)
    with pytest.raises(TypeError, match="ordered collections"):
        configuration.optimizer([{"params": {p}}])


@every_configuration()
def test_what_is_no_leaf_tensor_is_refused(configuration: Configuration) -> None:
    """What is not a tensor, or not a leaf of the graph, is refused."""
    with pytest.raises(TypeError, match="optimizer can only optimize Tensors"):
        configuration.optimizer([1.0])
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        configuration.optimizer([new_parameters([(2, 2)])[0] * 2])


@every_configuration()
def test_duplicate_parameters_warn_within_a_group_and_fail_across_groups(configuration: Configuration) -> None:
    """A parameter twice in a group is a warning, and in two groups an error."""
    p, q = new_parameters([(2, 2), (2, 2)])
    with pytest.warns(UserWarning, match="parameter group with duplicate parameters"):
        configuration.optimizer([p, p])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        configuration.optimizer([{"params": [p, q]}, {"params": [p]}])


@every_configuration()
def test_parameters_may_come_as_generator_tensor_in_a_group_or_plain_tensors(configuration: Configuration) -> None:
    """Parameters may be a generator, a single tensor of a group, or tensors that are no `nn.Parameter`."""
    p, q = new_parameters([(2, 3), (3, 2)])
    leaf = torch.ones(3, 3, requires_grad=True)
    optimizer = configuration.optimizer(x for x in (p, q))
    optimizer.add_param_group({"params": leaf})
    assert [[id(x) for x in group["params"]] for group in optimizer.param_groups] == [[id(p), id(q)], [id(leaf)]]
    before = snapshot([p, q, leaf])
    take_steps(optimizer, [p, q, leaf], 2)
    assert not any(torch.equal(x, old) for x, old in zip([p, q, leaf], before, strict=True))


@every_configuration()
def test_named_parameters_give_param_names(configuration: Configuration) -> None:
    """Named parameters, in a list or in groups, give `param_names`, and train as unnamed ones do."""
    named, unnamed = Net(), Net()
    optimizer = configuration.optimizer(named.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in named.named_parameters()]
    assert train(optimizer, named, 4) == train(configuration.optimizer(unnamed.parameters()), unnamed, 4)
    groups = [{"params": named.conv.named_parameters()}, {"params": list(named.head.named_parameters())}]
    assert [g["param_names"] for g in configuration.optimizer(groups).param_groups] == [["weight", "bias"]] * 2


@every_configuration()
def test_names_are_for_all_parameters_or_none(configuration: Configuration) -> None:
    """Names for some of a group's parameters, or for some of the groups, are refused."""
    p, q = new_parameters([(2, 2), (2, 2)])
    with pytest.raises(ValueError, match="Some param names are missing"):
        configuration.optimizer([("p", p), q])
    for first, second in ((("p", p), q), (p, ("q", q))):
        with pytest.raises(ValueError, match="all optimizer param groups should be with/without names"):
            configuration.optimizer([{"params": [first]}, {"params": [second]}])


@every_configuration()
def test_a_group_gets_the_defaults_for_what_it_does_not_set(configuration: Configuration) -> None:
    """A group has its own options and the optimizer's for the rest, and groups do not share them."""
    p, q, r = new_parameters([(2, 2)] * 3)
    optimizer = configuration.optimizer([{"params": [p], "lr": 0.5}, {"params": [q]}], lr=0.25, eps=1e-6)
    optimizer.add_param_group({"params": [r], "betas": (0.5, 0.6)})
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.25, 0.25]
    assert [g["betas"] for g in optimizer.param_groups][2] == (0.5, 0.6)
    assert [g["eps"] for g in optimizer.param_groups] == [1e-6] * 3
    optimizer.param_groups[1]["lr"] = 7.0
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 7.0, 0.25]
    assert optimizer.defaults["lr"] == 0.25


@every_configuration()
def test_a_refused_group_leaves_the_optimizer_as_it_was(configuration: Configuration) -> None:
    """A parameter group that is refused leaves the optimizer as it was."""
    p, q = new_parameters([(2, 2), (2, 2)])
    optimizer = configuration.optimizer([p])
    for bad in ({"params": [p]}, {"params": [("q", q)]}, {"params": ["q"]}):
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group(bad)
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([q])
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == 1
    take_steps(optimizer, [p], 2)


@every_configuration()
def test_a_group_may_be_added_in_the_middle_of_training(configuration: Configuration) -> None:
    """A group added in the middle of training starts at its own step one."""
    p, q, alone = new_parameters([(4, 3), (4, 3), (4, 3)])
    q.data.copy_(alone.data)
    optimizer, control = configuration.optimizer([p]), configuration.optimizer([alone])
    take_steps(optimizer, [p], 3)
    optimizer.add_param_group({"params": [q]})
    for step in range(5):
        take_steps(control, [alone], 1, start=step)
        p.grad, q.grad = torch.ones_like(p), alone.grad.clone()
        optimizer.step()
    assert torch.equal(q, alone)
    assert [int(optimizer.state[x]["step"]) for x in (p, q)] == [8, 5]


@every_configuration()
def test_every_option_is_in_the_groups_and_none_on_the_optimizer(configuration: Configuration) -> None:
    """Every argument of the constructor is in `defaults` and in every group, and none is an attribute.

    Except for the process group, which is not about how to train.
    """
    options = set(inspect.signature(configuration.info.optim_cls).parameters) - {"params", "process_group"}
    optimizer = configuration.optimizer(new_parameters())
    assert options <= set(optimizer.defaults)
    assert options <= set(optimizer.param_groups[0])
    assert not options & set(vars(optimizer))


@every_configuration()
def test_repr_shows_the_class_and_every_option_of_every_group(configuration: Configuration) -> None:
    """The repr names the class and shows every option of every group, and no tensor data."""
    p, q = new_parameters([(2, 2), (2, 2)])
    optimizer = configuration.optimizer([{"params": [p], "lr": 0.125}, {"params": [q], "lr": 0.0625}])
    for _ in range(2):  # before and after state exists
        text = repr(optimizer)
        assert text.startswith(configuration.info.name + " (")
        assert "lr: 0.125" in text.split("Parameter Group 1")[0]
        assert "lr: 0.0625" in text.split("Parameter Group 1")[1]
        shown = re.findall(r"^    (\w+): ", text, flags=re.MULTILINE)
        assert set(shown) == set(optimizer.param_groups[0]) - {"params"}
        assert "tensor(" not in text.lower()
        take_steps(optimizer, [p, q], 1)


@every_configuration()
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_drops_or_zeroes_gradients(configuration: Configuration, set_to_none: bool) -> None:
    """`zero_grad` drops gradients, or zeroes them in place with `set_to_none=False`."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    take_steps(optimizer, parameters, 2)
    grads = [p.grad for p in parameters]
    optimizer.zero_grad(set_to_none=set_to_none)
    if set_to_none:
        assert all(p.grad is None for p in parameters)
        assert all(grad.any() for grad in grads)
    else:
        assert all(p.grad is grad and not grad.any() for p, grad in zip(parameters, grads, strict=True))


@every_configuration()
def test_construction_moves_nothing_and_warns_of_nothing(configuration: Configuration) -> None:
    """Construction allocates no state, moves no weight and leaves the random state alone."""
    parameters = new_parameters()
    before, rng = snapshot(parameters), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = configuration.optimizer(parameters)
    assert len(optimizer.state) == 0
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    take_steps(optimizer, parameters, 5)
    assert torch.equal(torch.get_rng_state(), rng)


@every_configuration()
def test_it_is_a_torch_optimizer(configuration: Configuration) -> None:
    """It is a `torch.optim.Optimizer` whose `state` and `param_groups` are torch's own containers."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    assert isinstance(optimizer, torch.optim.Optimizer)
    take_steps(optimizer, parameters, 1)
    assert list(optimizer.state) == parameters
    assert all(isinstance(p, nn.Parameter) for p in optimizer.state)
    assert all(
        isinstance(value, torch.Tensor) and not value.requires_grad
        for state in optimizer.state.values()
        for value in state.values()
    )
