"""State dicts: what they hold, and that saving and loading them is the identity."""

import copy
import io
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.configurations import Configuration, every_configuration
from tests.contract.models import Net, new_parameters, same, seeded, snapshot, take_steps, train


def saved_bytes(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def through_a_file(value: Any) -> Any:
    return torch.load(io.BytesIO(saved_bytes(value)), weights_only=True)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


def assert_equal(one: dict, other: dict) -> None:
    """Whether two state dicts are equal: keys, options, values and dtypes, bit for bit."""
    assert one["state"].keys() == other["state"].keys()
    for key, state in one["state"].items():
        assert list(state) == list(other["state"][key])
        for name, value in state.items():
            loaded = other["state"][key][name]
            assert (value.dtype, value.device, value.shape) == (loaded.dtype, loaded.device, loaded.shape)
            assert torch.equal(value, loaded), (key, name)
    assert len(one["param_groups"]) == len(other["param_groups"])
    for group, loaded_group in zip(one["param_groups"], other["param_groups"], strict=True):
        assert group == loaded_group


@every_configuration()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_state_dict_is_a_fixed_point_of_loading(configuration: Configuration, dtype: torch.dtype, steps: int) -> None:
    """Loading a state dict into a fresh optimizer, through a file read with `weights_only`, gives it back unchanged."""
    parameters = new_parameters(dtype=dtype)
    optimizer = configuration.optimizer(parameters, lr=0.02)
    take_steps(optimizer, parameters, steps)
    saved = through_a_file(optimizer.state_dict())
    assert_equal(optimizer.state_dict(), saved)
    fresh = configuration.optimizer(new_parameters(dtype=dtype))
    fresh.load_state_dict(saved)
    assert_equal(fresh.state_dict(), saved)
    assert_equal(optimizer.state_dict(), saved)


@every_configuration()
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_training_resumes_bit_for_bit(configuration: Configuration, steps: int) -> None:
    """Training resumes bit for bit from a file, from every phase of it."""
    model, other = Net(), Net(seed=50)
    optimizer = configuration.optimizer(model.parameters())
    train(optimizer, model, steps)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = configuration.optimizer(other.parameters())
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert train(optimizer, model, 6, start=steps) == train(resumed, other, 6, start=steps)
    assert same(model.parameters(), other.parameters())


@every_configuration()
def test_saving_is_deterministic_and_changes_nothing(configuration: Configuration) -> None:
    """Saving twice gives the same bytes, and saving in the middle does not change the training."""
    model, plain = Net(), Net()
    optimizer, control = configuration.optimizer(model.parameters()), configuration.optimizer(plain.parameters())
    losses = []
    for step in range(5):
        assert saved_bytes(optimizer.state_dict()) == saved_bytes(optimizer.state_dict())
        losses += train(optimizer, model, 1, start=step)
    assert losses == train(control, plain, 5)
    assert saved_bytes(optimizer.state_dict()) == saved_bytes(control.state_dict())


@every_configuration()
def test_a_state_dict_has_torchs_structure(configuration: Configuration) -> None:
    """A state dict has integer ids, one flat dict of tensors per parameter, plain options, and no parameter."""
    parameters = new_parameters()
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    optimizer = configuration.optimizer(groups)
    take_steps(optimizer, parameters, 3)
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert [group["params"] for group in saved["param_groups"]] == [[0], [1, 2, 3]]
    assert set(saved["state"]) == {0, 1, 2, 3}
    assert all(isinstance(value, Tensor) for state in saved["state"].values() for value in state.values())
    plain = (bool, int, float, str, tuple, list, type(None))
    assert all(isinstance(value, plain) for group in saved["param_groups"] for value in group.values())
    own = {p.untyped_storage().data_ptr() for p in parameters} | {
        p.grad.untyped_storage().data_ptr() for p in parameters
    }
    assert not own & {value.untyped_storage().data_ptr() for value in tensors_in(saved)}
    assert not any(value.requires_grad or isinstance(value, torch.nn.Parameter) for value in tensors_in(saved))


@every_configuration()
def test_a_file_is_as_large_as_what_is_in_it(configuration: Configuration) -> None:
    """No two tensors of the state overlap, and a file of a state dict holds their bytes and no others."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    take_steps(optimizer, parameters, 4)
    values = [v for v in tensors_in(optimizer.state_dict()["state"]) if v.numel()]
    places = sorted((v.data_ptr(), v.data_ptr() + v.numel() * v.element_size()) for v in values)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in values}
    assert sum(storages.values()) == sum(end - start for start, end in places)


@every_configuration()
def test_a_parameter_without_gradient_has_no_saved_state(configuration: Configuration) -> None:
    """A parameter that never had a gradient has no entry, and gets none by loading."""
    parameters, others = new_parameters(), new_parameters()
    optimizer, fresh = configuration.optimizer(parameters), configuration.optimizer(others)
    take_steps(optimizer, parameters[::2], 3)
    saved = through_a_file(optimizer.state_dict())
    assert set(saved["state"]) == {0, 2}
    fresh.load_state_dict(saved)
    assert set(fresh.state) == {others[0], others[2]}
    for step in range(3, 6):
        for p, q in zip(parameters, others, strict=True):
            p.grad = seeded(p.shape, 100 * step + p.ndim)
            q.grad = p.grad.clone()
        optimizer.step()
        fresh.step()
    assert_equal(optimizer.state_dict(), fresh.state_dict())


@every_configuration()
def test_state_dict_hooks_run_and_may_replace_the_result(configuration: Configuration) -> None:
    """Hooks before and after `state_dict` run once, in order, and the latter may replace the result."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    take_steps(optimizer, parameters, 2)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda one: calls.append("pre"))
    optimizer.register_state_dict_pre_hook(lambda one: calls.append("first"), prepend=True)

    def add_note(one: torch.optim.Optimizer, state_dict: dict) -> dict:
        calls.append("post")
        return {**state_dict, "note": "mine"}

    handle = optimizer.register_state_dict_post_hook(add_note)
    assert optimizer.state_dict()["note"] == "mine"
    assert calls == ["first", "pre", "post"]
    handle.remove()
    assert "note" not in optimizer.state_dict()


@every_configuration()
def test_a_tensor_learning_rate_is_saved_and_loaded(configuration: Configuration) -> None:
    """A tensor learning rate is saved as one, loaded as a copy, and goes on being read."""
    parameters, others = new_parameters(), new_parameters()
    lr = torch.tensor(0.125)
    optimizer = configuration.optimizer(parameters, lr=lr)
    take_steps(optimizer, parameters, 3)
    for p, q in zip(parameters, others, strict=True):
        q.data.copy_(p.data)
    saved = optimizer.state_dict()
    fresh = configuration.optimizer(others, lr=torch.tensor(0.5))
    fresh.load_state_dict({"state": copy.deepcopy(saved["state"]), "param_groups": saved["param_groups"]})
    assert torch.equal(fresh.param_groups[0]["lr"], lr)
    fresh.param_groups[0]["lr"].mul_(2)
    assert lr.item() == 0.125
    lr.mul_(2)
    take_steps(optimizer, parameters, 3, start=3)
    take_steps(fresh, others, 3, start=3)
    assert same(parameters, others)


@every_configuration()
def test_a_deep_copied_state_dict_is_a_checkpoint_in_memory(configuration: Configuration) -> None:
    """A deep copy of the state dict rewinds the optimizer: the same steps again give the same weights."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    take_steps(optimizer, parameters, 3)
    weights, saved = snapshot(parameters), copy.deepcopy(optimizer.state_dict())
    take_steps(optimizer, parameters, 3, start=3)
    ends = snapshot(parameters)
    for p, old in zip(parameters, weights, strict=True):
        p.data.copy_(old)
    optimizer.load_state_dict(saved)
    take_steps(optimizer, parameters, 3, start=3)
    assert same(parameters, ends)
