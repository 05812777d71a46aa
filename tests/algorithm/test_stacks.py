"""Stacks: the same results as one parameter at a time, with state tensors that are views and never copied to step."""

import copy
import gc
import io
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from emerging_optimizers.soap import SOAP, stacks
from tests.algorithm.test_soap import MODES, new_model, train

SHAPES = [(6, 4), (6, 4), (4, 6), (6, 4), (5,), (), (5,), (3, 2, 2), (3, 2, 2), (6, 4), (0, 4), (1, 7)]


def new_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(parameters: list[nn.Parameter], step: int, missing: Callable[[int], bool] = lambda i: False) -> None:
    for i, p in enumerate(parameters):
        gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        p.grad = None if missing(i) else gradient.to(p.dtype)


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[SOAP], None]:
    """Steps an optimizer whose every stack holds one parameter."""

    def step(optimizer: SOAP) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(stacks, "MOST_ELEMENTS", 0)
            optimizer.step()
        assert all(len(stack.members) == 1 for group in optimizer._stacks for stack in group)

    return step


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_a_stack_equals_its_parameters_one_by_one(mode: str, dtype: torch.dtype, one_by_one: Callable) -> None:
    options = {"lr": 0.01, "weight_decay": 0.1, **MODES[mode], "eps": 1e-4}
    if mode in ("raise", "propagate"):
        options["nonfinite"] = "skip"
    together, alone = new_parameters(dtype), new_parameters(dtype)
    optimizer, control = SOAP(together, **options), SOAP(alone, **options)
    for step in range(14):
        # Parameters 3, 4 and 8 start late, 1 and 6 miss steps, 9 and 5 have gradients that cannot be used.
        for parameters in (together, alone):
            set_gradients(
                parameters, step, lambda i, t=step: (i in (3, 4, 8) and t < 3) or (i in (1, 6) and t % 4 == 2)
            )
            if step in (0, 5, 6):
                parameters[9].grad[0, 0] = float("nan")
                parameters[5].grad.fill_(float("inf"))
        optimizer.step()
        one_by_one(control)
        tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-3}
        for p, q in zip(together, alone, strict=True):
            torch.testing.assert_close(p, q, **tolerance)
    assert max(len(stack.members) for stack in optimizer._stacks[0]) >= 4
    counters = ("step", "refresh_step", "skipped_steps")
    for p, q in zip(together, alone, strict=True):
        for key in counters:
            assert optimizer.state[p].get(key) == control.state[q].get(key), key
    assert [int(optimizer.state[p]["skipped_steps"]) for p in together] == [0, 0, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0]


def pointers(optimizer: SOAP) -> dict[tuple[int, str], int]:
    return {
        (i, key): value.data_ptr()
        for i, p in enumerate(optimizer.param_groups[0]["params"])
        for key, value in optimizer.state.get(p, {}).items()
    }


@pytest.mark.parametrize("mode", ["default", "kl", "eigh", "kronecker", "1-D"])
def test_no_state_is_moved_by_a_step(mode: str) -> None:
    parameters = new_parameters()
    optimizer = SOAP(parameters, lr=0.1, **MODES[mode])
    set_gradients(parameters, 0)
    optimizer.step()
    optimizer.state[parameters[0]]["somebody's own"] = torch.zeros(3)
    before = pointers(optimizer)
    for step in range(1, 6):
        set_gradients(parameters, step, lambda i, t=step: i % 5 == t)
        optimizer.step()
    assert pointers(optimizer) == before


def test_a_late_starter_moves_only_the_stack_that_it_joins() -> None:
    parameters = new_parameters()
    optimizer = SOAP(parameters, lr=0.1)
    set_gradients(parameters, 0, lambda i: i == 3)
    optimizer.step()
    before, values = pointers(optimizer), copy.deepcopy(optimizer.state[parameters[0]])
    moved = set()
    for step in range(1, 3):
        set_gradients(parameters, step)
        for p in parameters[:1]:
            p.grad = None
        optimizer.step()
        moved |= {i for (i, key), pointer in pointers(optimizer).items() if before.get((i, key), pointer) != pointer}
    # Of the same shape as parameter 3; the first of them had no gradient, but it moves along unchanged.
    assert moved == {0, 1, 9}
    assert all(torch.equal(optimizer.state[parameters[0]][key], value) for key, value in values.items())


REPLACEMENTS: dict[str, tuple[Callable, Callable]] = {
    # What somebody does to a state, and the same done in place.
    "another tensor": (
        lambda state: state.update(exp_avg=state["exp_avg"].clone() * 2),
        lambda state: state["exp_avg"].mul_(2),
    ),
    "another factor": (
        lambda state: state.update(GG_0=state["GG_0"].clone() * 2),
        lambda state: state["GG_0"].mul_(2),
    ),
    "another counter": (
        lambda state: state.update(step=torch.tensor(40.0)),
        lambda state: state["step"].fill_(40),
    ),
    "other data of a factor": (
        lambda state: setattr(state["GG_0"], "data", state["GG_0"].clone() * 2),
        lambda state: state["GG_0"].mul_(2),
    ),
    "other data": (
        lambda state: setattr(state["exp_avg"], "data", state["exp_avg"].clone() * 2),
        lambda state: state["exp_avg"].mul_(2),
    ),
}


@pytest.mark.parametrize("how", REPLACEMENTS)
def test_tensors_that_somebody_puts_into_the_state_are_used(how: str) -> None:
    trained = []
    for change in REPLACEMENTS[how]:
        parameters = new_parameters(torch.float64)
        optimizer = SOAP(parameters, lr=0.1, eps=1e-4)
        for step in range(6):
            set_gradients(parameters, step)
            if step == 3:
                change(optimizer.state[parameters[1]])
            optimizer.step()
        trained.append((parameters, optimizer))
    untouched = new_parameters(torch.float64)
    control = SOAP(untouched, lr=0.1, eps=1e-4)
    for step in range(6):
        set_gradients(untouched, step)
        control.step()
    (parameters, optimizer), (others, in_place) = trained
    for p, q in zip(parameters, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
        for key, value in optimizer.state[p].items():
            torch.testing.assert_close(value, in_place.state[q][key], rtol=1e-8, atol=1e-10)
    assert not torch.equal(parameters[1], untouched[1])


@pytest.mark.parametrize("how", ["cleared", "another dict", "all dicts"])
def test_a_state_dict_that_somebody_replaces_is_the_state(how: str) -> None:
    """What a framework puts in place of a parameter's state, or takes away, is what the next step goes on with."""
    parameters, others = new_parameters(), new_parameters()
    optimizer, control = SOAP(parameters, lr=0.1), SOAP(others, lr=0.1)
    for both in ((parameters, optimizer), (others, control)):
        set_gradients(both[0], 0)
        both[1].step()
    if how == "cleared":
        optimizer.state.clear()
        control = SOAP(others, lr=0.1)
    else:
        chosen = parameters if how == "all dicts" else parameters[1:2]
        for p in chosen:
            optimizer.state[p] = {key: value.clone() for key, value in optimizer.state[p].items()}
    for both in ((parameters, optimizer), (others, control)):
        set_gradients(both[0], 1)
        both[1].step()
    for p, q in zip(parameters, others, strict=True):
        torch.testing.assert_close(p, q)
        for key, value in control.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key], value)


def test_saved_files_are_not_larger_than_the_state() -> None:
    parameters = new_parameters()
    optimizer = SOAP(parameters, lr=0.1)
    set_gradients(parameters, 0)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    alone = SOAP(parameters, lr=0.1)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state.update({key: value.clone() for key, value in state.items()})
    alone_file = io.BytesIO()
    torch.save(saved, alone_file)
    assert file.getbuffer().nbytes <= alone_file.getbuffer().nbytes
    alone.load_state_dict(saved)


def test_a_stack_is_cut_where_it_would_grow_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "MOST_ELEMENTS", 80)
    parameters = [nn.Parameter(torch.ones(6, 4)) for _ in range(5)] + [nn.Parameter(torch.ones(100))]
    parameters += [nn.Parameter(torch.ones(30)) for _ in range(3)]
    optimizer = SOAP(parameters, lr=0.1)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    # A (6, 6) factor is the largest part of the first five.
    assert [len(stack.members) for stack in optimizer._stacks[0]] == [2, 2, 1, 1, 2, 1]


@pytest.mark.parametrize("change", ["add", "remove", "reorder"])
def test_the_parameters_of_a_group_may_change(change: str) -> None:
    model = new_model()
    *first, last = model.parameters()
    optimizer = SOAP(first if change == "add" else [*first, last], lr=1e-2)
    train(optimizer, model, 3)
    group = optimizer.param_groups[0]
    before = last.detach().clone()
    if change == "add":
        group["params"].append(last)
    elif change == "remove":
        group["params"].pop()
    else:
        group["params"].reverse()
    train(optimizer, model, 3, start=3)
    assert torch.equal(last, before) == (change == "remove")
    assert [int(optimizer.state[p]["step"]) for p in first] == [6] * len(first)


# --- what a cached stack must not outlive --------------------------------------------------------------------------


def test_a_model_that_changes_its_dtype_goes_on_in_it() -> None:
    model = new_model()
    optimizer = SOAP(model.parameters(), lr=1e-2)
    train(optimizer, model, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        other = copy.deepcopy(model)
        resumed = SOAP(other.parameters(), lr=1e-2)
        resumed.load_state_dict(optimizer.state_dict())
        assert train(optimizer, model, 3, start=3) == train(resumed, other, 3, start=3)
        assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {dtype}
    assert all(state["exp_avg"].dtype == torch.float32 for state in saved["state"].values())


def test_loading_and_clearing_free_the_old_state() -> None:
    model = new_model()
    optimizer = SOAP(model.parameters(), lr=1e-2)
    train(optimizer, model, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    old = weakref.ref(optimizer._stacks[0][0])
    optimizer.load_state_dict(saved)
    gc.collect()
    assert old() is None


def test_the_old_stacks_are_freed_one_by_one_as_new_ones_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [nn.Parameter(torch.ones(4 + i, 3)) for i in range(4) for _ in range(2)]
    groups = [{"params": parameters[2 * i : 2 * i + 2]} for i in range(4)]
    optimizer = SOAP(groups, lr=0.1)
    for p in parameters[::2]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    old = [weakref.ref(group[0]) for group in optimizer._stacks]
    alive: list[int] = []
    real = stacks.StackedState.__init__

    def watch(self: stacks.StackedState, *arguments: object) -> None:
        alive.append(sum(reference() is not None for reference in old))
        real(self, *arguments)

    monkeypatch.setattr(stacks.StackedState, "__init__", watch)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert alive == [3, 2, 1, 0]


@pytest.mark.parametrize("change", [{"max_precond_dim": 3}, {"merge_dims": True}, "shape"])
def test_what_no_longer_fits_is_refused_also_without_a_gradient(change: object) -> None:
    waiting, moving = nn.Parameter(torch.ones(2, 3, 4)), nn.Parameter(torch.ones(3))
    optimizer = SOAP([{"params": [waiting]}, {"params": [moving]}], lr=0.1)
    for p in (waiting, moving):
        p.grad = torch.ones_like(p)
    optimizer.step()
    waiting.grad, before = None, moving.detach().clone()
    if change == "shape":
        waiting.data = torch.ones(2, 3, 5)
    else:
        optimizer.param_groups[0].update(change)
    with pytest.raises(RuntimeError, match="parameter 0 of its group.* cannot change after the first step"):
        optimizer.step()
    assert torch.equal(moving, before)


@pytest.mark.parametrize("gradient", [False, True])
def test_somebody_elses_entry_is_no_state(gradient: bool) -> None:
    parameters = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))]
    optimizer = SOAP(parameters, lr=0.1)
    optimizer.state[parameters[0]]["ema"] = torch.zeros(3, 4)
    for p in parameters[: 2 if gradient else None]:
        p.grad = torch.ones_like(p)
    if not gradient:
        parameters[0].grad = None
    optimizer.step()
    assert ("step" in optimizer.state[parameters[0]]) == gradient
    assert torch.equal(optimizer.state[parameters[0]]["ema"], torch.zeros(3, 4))


def test_a_replaced_tensor_of_another_shape_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(3, 4))
    optimizer = SOAP([parameter], lr=0.1)
    parameter.grad = torch.ones(3, 4)
    optimizer.step()
    optimizer.state[parameter]["Q_0"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"state\['Q_0'\] must have shape \(3, 3\), got \(1,\)"):
        optimizer.step()
