"""Loading: copies, dtypes, hooks, names, states of another time, and states that do not fit."""

import copy

import pytest
import torch

from tests.contract.configurations import Configuration, every_configuration
from tests.contract.models import SHAPES, new_parameters, same, seeded, snapshot, take_steps
from tests.contract.test_state_dicts import assert_equal, saved_bytes, tensors_in

NO_SHAPES = "AdamW's load_state_dict looks at no shape, key or type"


def trained(configuration: Configuration, steps: int = 3, **options: object) -> tuple[list, torch.optim.Optimizer]:
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters, **options)
    take_steps(optimizer, parameters, steps)
    return parameters, optimizer


@every_configuration(adamw_fails="AdamW takes over the state dict's tensors where dtype and device fit")
def test_loading_copies(configuration: Configuration) -> None:
    """A loaded optimizer shares no tensor with the state dict, so steps do not change the checkpoint."""
    _, optimizer = trained(configuration)
    parameters = new_parameters()
    fresh, saved = configuration.optimizer(parameters), copy.deepcopy(optimizer.state_dict())
    before = saved_bytes(saved)
    fresh.load_state_dict(saved)
    take_steps(fresh, parameters, 2, start=3)
    assert not {v.data_ptr() for v in tensors_in(saved)} & {v.data_ptr() for v in tensors_in(fresh.state_dict())}
    assert saved_bytes(saved) == before


@every_configuration()
def test_loading_does_not_change_the_dict_that_it_is_given(configuration: Configuration) -> None:
    """Loading does not change the dict that it is given, also where it brings less than the optimizer has."""
    _, optimizer = trained(configuration)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["maximize"]
    before = saved_bytes(saved)
    configuration.optimizer(zip("abcd", new_parameters(), strict=True)).load_state_dict(saved)
    assert saved_bytes(saved) == before


@every_configuration(adamw_fails="torch casts floating-point state to the parameter's dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_state_of_a_16_bit_parameter_is_kept(configuration: Configuration, dtype: torch.dtype) -> None:
    """State that is float32 while its parameter has 16 bits is loaded as float32, bit for bit."""
    parameters = new_parameters(dtype=dtype)
    optimizer = configuration.optimizer(parameters)
    take_steps(optimizer, parameters, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():  # as if AdamW's had been in float32 too
        for key, value in state.items():
            state[key] = value.float() + 1e-5 if key.startswith("exp_avg") else value
    fresh = configuration.optimizer(new_parameters(dtype=dtype))
    fresh.load_state_dict(saved)
    assert_equal(fresh.state_dict(), saved)


@every_configuration()
def test_loading_hooks_run_once_and_may_change_what_is_loaded(configuration: Configuration) -> None:
    """Hooks before and after loading run once per load, and the former may change what is loaded."""
    _, optimizer = trained(configuration)
    saved, calls = copy.deepcopy(optimizer.state_dict()), []

    def halve(one: torch.optim.Optimizer, state_dict: dict) -> dict:
        calls.append("pre")
        assert one is fresh
        state = {i: {**s, "exp_avg": s["exp_avg"] / 2} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    def after(one: torch.optim.Optimizer) -> None:
        calls.append("post")
        assert len(one.state) == len(SHAPES)

    fresh = configuration.optimizer(new_parameters())
    handles = [fresh.register_load_state_dict_pre_hook(halve), fresh.register_load_state_dict_post_hook(after)]
    fresh.register_load_state_dict_post_hook(lambda one: calls.append("first"), prepend=True)
    fresh.load_state_dict(saved)
    assert calls == ["pre", "first", "post"]
    for i, state in fresh.state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], saved["state"][i]["exp_avg"] / 2)
    for handle in handles:
        handle.remove()
    fresh.load_state_dict(saved)
    assert calls == ["pre", "first", "post", "first"]
    assert_equal(fresh.state_dict(), saved)


@every_configuration()
def test_a_post_hook_may_change_the_loaded_state(configuration: Configuration) -> None:
    """A hook after loading sees the state that was loaded, and what it writes there stays."""
    _, optimizer = trained(configuration)
    parameters = new_parameters()
    fresh = configuration.optimizer(parameters)

    def reset(one: torch.optim.Optimizer) -> None:
        assert torch.equal(one.state[parameters[2]]["exp_avg"], optimizer.state_dict()["state"][2]["exp_avg"])
        one.state[parameters[2]]["exp_avg"].zero_()
        one.param_groups[0]["lr"] = 0.75

    fresh.register_load_state_dict_post_hook(reset)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not fresh.state[parameters[2]]["exp_avg"].any()
    assert fresh.param_groups[0]["lr"] == 0.75


@every_configuration()
def test_a_step_that_is_a_number_is_accepted(configuration: Configuration) -> None:
    """A saved `step` that is a number, as in old checkpoints, is accepted, and training goes on alike."""
    parameters, optimizer = trained(configuration)
    others = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    fresh = configuration.optimizer(others)
    fresh.load_state_dict(saved)
    take_steps(optimizer, parameters, 3, start=3)
    take_steps(fresh, others, 3, start=3)
    assert same(parameters, others)
    assert all(isinstance(state["step"], torch.Tensor) for state in fresh.state.values())


@every_configuration()
def test_a_state_from_before_an_option_existed_is_accepted(configuration: Configuration) -> None:
    """A state dict from before an option existed is accepted, and the optimizer steps."""
    _, optimizer = trained(configuration)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["maximize"]
    parameters = new_parameters()
    fresh = configuration.optimizer(parameters)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["maximize"] is False
    take_steps(fresh, parameters, 2, start=3)


@every_configuration(adamw_fails="AdamW takes the option's first default instead, and lacks most options for good")
def test_an_option_that_the_state_lacks_keeps_the_optimizers_value(configuration: Configuration) -> None:
    """An option that a saved state does not have keeps the optimizer's own value, whichever option it is."""
    _, optimizer = trained(configuration)
    own = {"maximize": True, "weight_decay": 0.25, "eps": 1e-6, "betas": (0.5, 0.75), "lr": 0.5}
    for option, value in own.items():
        saved = copy.deepcopy(optimizer.state_dict())
        del saved["param_groups"][0][option]
        fresh = configuration.optimizer(new_parameters(), **{option: value})
        fresh.load_state_dict(saved)
        assert fresh.param_groups[0].get(option) == value


@every_configuration()
def test_saved_options_replace_the_optimizers(configuration: Configuration) -> None:
    """Saved options replace the optimizer's own, group by group, and unknown keys come along."""
    first, second = new_parameters(), new_parameters()
    optimizer = configuration.optimizer([{"params": first, "lr": 0.5, "tag": "encoder"}, {"params": second}])
    fresh = configuration.optimizer([{"params": new_parameters()}, {"params": new_parameters(), "lr": 0.75}])
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in fresh.param_groups] == [0.5, 0.01]
    assert [group.get("tag") for group in fresh.param_groups] == ["encoder", None]


@every_configuration()
def test_a_state_without_entries_resets_the_optimizer(configuration: Configuration) -> None:
    """A state dict without state, of an optimizer that never stepped, resets the optimizer."""
    parameters, optimizer = trained(configuration)
    optimizer.load_state_dict(configuration.optimizer(new_parameters(), lr=0.25).state_dict())
    assert len(optimizer.state) == 0
    assert optimizer.param_groups[0]["lr"] == 0.25
    others = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    take_steps(optimizer, parameters, 4)
    take_steps(configuration.optimizer(others, lr=0.25), others, 4)
    assert same(parameters, others)


@every_configuration()
@pytest.mark.parametrize("saved_names", [True, False])
@pytest.mark.parametrize("own_names", [True, False])
def test_names_do_not_decide_what_is_loaded(configuration: Configuration, saved_names: bool, own_names: bool) -> None:
    """Parameters are matched by their order, whatever their names; saved names replace the optimizer's."""

    def build(names: str, given: bool) -> torch.optim.Optimizer:
        params = new_parameters()
        return configuration.optimizer(zip(names, params, strict=True) if given else params)

    optimizer = build("abcd", saved_names)
    take_steps(optimizer, optimizer.param_groups[0]["params"], 3)
    saved, fresh = copy.deepcopy(optimizer.state_dict()), build("wxyz", own_names)
    fresh.load_state_dict(saved)
    for key, state in fresh.state_dict()["state"].items():
        assert same(state.values(), saved["state"][key].values())
    wanted = list("abcd") if saved_names else list("wxyz") if own_names else None
    assert fresh.param_groups[0].get("param_names") == wanted
    take_steps(fresh, fresh.param_groups[0]["params"], 2, start=3)


@every_configuration()
def test_a_group_may_be_added_after_loading(configuration: Configuration) -> None:
    """A group may be added after loading; it has the optimizer's defaults, and what both have is loaded again."""
    parameters, optimizer = trained(configuration, lr=0.25)
    fresh = configuration.optimizer(new_parameters(), lr=0.125)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    extra = new_parameters()
    fresh.add_param_group({"params": extra})
    assert [group["lr"] for group in fresh.param_groups] == [0.25, 0.125]
    take_steps(fresh, extra, 2)
    twin = configuration.optimizer([{"params": new_parameters()}, {"params": new_parameters()}])
    twin.load_state_dict(copy.deepcopy(fresh.state_dict()))
    assert_equal(twin.state_dict(), fresh.state_dict())


@every_configuration()
def test_another_number_of_groups_or_parameters_is_refused(configuration: Configuration) -> None:
    """A state of another number of groups or parameters is refused, and nothing has changed."""
    _, optimizer = trained(configuration)
    before = saved_bytes(optimizer.state_dict())
    two_groups = configuration.optimizer([{"params": new_parameters()}, {"params": new_parameters()}])
    fewer = configuration.optimizer(new_parameters()[:3])
    for other in (two_groups, fewer):
        with pytest.raises(ValueError, match="loaded state dict"):
            optimizer.load_state_dict(other.state_dict())
    assert saved_bytes(optimizer.state_dict()) == before


SPOIL = {
    "shape": lambda state: state.update(exp_avg_sq=torch.zeros(5, 7)),
    "missing": lambda state: state.pop("exp_avg"),
    "type": lambda state: state.update(exp_avg="a string"),
}


@every_configuration(adamw_fails=NO_SHAPES)
@pytest.mark.parametrize("how", SPOIL)
@pytest.mark.parametrize("named", [False, True])
def test_a_state_that_does_not_fit_is_refused_by_name_and_whole(
    configuration: Configuration, how: str, named: bool
) -> None:
    """A state of a wrong shape, key or type is refused with the first such parameter's name, and nothing is loaded."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(zip("abcd", parameters, strict=True) if named else parameters, lr=0.25)
    take_steps(optimizer, parameters, 3)
    before, weights = saved_bytes(optimizer.state_dict()), snapshot(parameters)
    saved = copy.deepcopy(trained(configuration, steps=5)[1].state_dict())
    SPOIL[how](saved["state"][2])
    SPOIL[how](saved["state"][3])
    called = "parameter 'c'" if named else r"parameter 2 of its group, shape \(4, 3\)"
    with pytest.raises((TypeError, ValueError), match=called):
        optimizer.load_state_dict(saved)
    assert saved_bytes(optimizer.state_dict()) == before
    assert same(parameters, weights)


@every_configuration(adamw_fails=NO_SHAPES)
def test_a_state_of_a_model_of_other_sizes_is_refused(configuration: Configuration) -> None:
    """The state of a model whose layers have other sizes is refused when it is loaded, not at the next step."""
    shapes = [tuple(size + 1 for size in shape) for shape in SHAPES]
    others = new_parameters(shapes)
    optimizer = configuration.optimizer(others)
    for p in others:
        p.grad = seeded(p.shape, 0)
    optimizer.step()
    with pytest.raises(ValueError, match=r"must have shape \(5,\), got \(6,\)"):
        configuration.optimizer(new_parameters()).load_state_dict(optimizer.state_dict())
