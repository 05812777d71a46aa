"""Hooks around a step, the profiler's label, and subclasses."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.contract.configurations import Configuration, every_configuration
from tests.contract.models import give_gradients, new_parameters, same, snapshot, take_steps

TWICE = "torch wraps the step of every class that an optimizer was made of, so hooks run once per level"


def hook_calls(optimizer: Optimizer) -> list[str]:
    """Registers a hook of each kind, on this optimizer; the list fills as they run."""
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    return calls


@contextmanager
def global_hook_calls() -> Iterator[list[str]]:
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def subclass(base: type[Optimizer]) -> type[Optimizer]:
    class Sub(base):
        def step(self, closure=None):
            return super().step(closure)

    return Sub


def labels_of(steps: list[Optimizer]) -> Counter[str]:
    """How often each label that begins with "Optimizer." appears while the optimizers take a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
    # The raw events, as in an exported trace: profile.events() merges a label with the same one right inside of it.
    names = [event.name() for event in profile.profiler.kineto_results.events()]
    return Counter(name for name in names if name.startswith("Optimizer."))


@every_configuration()
def test_step_hooks_run_once_per_step_around_it(configuration: Configuration) -> None:
    """Pre and post hooks run once per step, before and after the weights change, until they are removed."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    seen: list[tuple[str, list[torch.Tensor]]] = []

    def note(name: str):
        def hook(one: Optimizer, args: tuple, kwargs: dict) -> None:
            assert one is optimizer
            seen.append((name, snapshot(parameters)))

        return hook

    handles = [optimizer.register_step_pre_hook(note("pre")), optimizer.register_step_post_hook(note("post"))]
    give_gradients(parameters, 0)
    before = snapshot(parameters)
    optimizer.step()
    (_, at_pre), (_, at_post) = seen
    assert same(at_pre, before)
    assert same(at_post, parameters)
    assert not any(torch.equal(a, b) for a, b in zip(at_pre, at_post, strict=True))
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert [name for name, _ in seen] == ["pre", "post"] * 2


@every_configuration()
def test_global_hooks_run_once_per_step_of_every_optimizer(configuration: Configuration) -> None:
    """Hooks that are registered for all optimizers run once per step, outside of the optimizer's own."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    calls = hook_calls(optimizer)
    with global_hook_calls() as global_calls:
        own = optimizer.register_step_pre_hook(lambda *_: global_calls.append("own"))
        take_steps(optimizer, parameters, 2)
        own.remove()
    assert global_calls == ["global pre", "own", "global post"] * 2
    assert calls == ["pre", "post"] * 2
    take_steps(optimizer, parameters, 1)
    assert len(global_calls) == 6


@every_configuration()
def test_a_pre_hook_may_change_the_arguments(configuration: Configuration) -> None:
    """A pre hook may replace the arguments of `step`, and one that returns something else is an error."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    give_gradients(parameters, 0)
    handle = optimizer.register_step_pre_hook(lambda one, args, kwargs: ((one, lambda: 5.0), {}))
    assert optimizer.step(lambda: 3.0) == 5.0
    assert optimizer.step() == 5.0
    handle.remove()
    assert optimizer.step(closure=lambda: 3.0) == 3.0
    optimizer.register_step_pre_hook(lambda *_: 7)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


@every_configuration()
def test_gradients_made_in_a_pre_hook_are_used(configuration: Configuration) -> None:
    """A pre hook may clip or replace gradients, and the step uses what it left."""
    parameters, control = new_parameters(), new_parameters()
    optimizer, plain = configuration.optimizer(parameters), configuration.optimizer(control)
    optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(parameters, 0.5) and None)
    for step in range(4):
        give_gradients(parameters, step)
        give_gradients(control, step)
        torch.nn.utils.clip_grad_norm_(control, 0.5)
        optimizer.step()
        plain.step()
    assert same(parameters, control)


@every_configuration()
def test_an_error_in_a_step_leaves_hooks_working(configuration: Configuration) -> None:
    """After a step that raised, hooks run once per step again."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    calls = hook_calls(optimizer)

    def closure() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    calls.clear()
    take_steps(optimizer, parameters, 2)
    assert calls == ["pre", "post"] * 2


@every_configuration()
def test_two_optimizers_do_not_share_hooks(configuration: Configuration) -> None:
    """Hooks belong to one optimizer, also while another one steps inside of its hook or closure."""
    first, second = new_parameters(), new_parameters()
    outer, inner = configuration.optimizer(first), configuration.optimizer(second)
    give_gradients(first + second, 0)
    outer_calls, inner_calls = hook_calls(outer), hook_calls(inner)
    before = snapshot(second)
    outer.register_step_post_hook(lambda *_: inner.step() and None)
    outer.step(lambda: inner.step() or 1.0)
    assert (outer_calls, inner_calls) == (["pre", "post"], ["pre", "post"] * 2)
    assert not any(torch.equal(p, old) for p, old in zip(second, before, strict=True))


@every_configuration()
@pytest.mark.parametrize("levels", [1, 2])
def test_hooks_of_a_subclass_without_its_own_step_run_once(configuration: Configuration, levels: int) -> None:
    """Hooks run once per step for a subclass that inherits `step`."""
    cls = configuration.info.optim_cls
    for _ in range(levels):
        cls = type("Inherits", (cls,), {})
    parameters = new_parameters()
    configuration.optimizer(new_parameters())
    optimizer = cls(parameters, **{"lr": 0.01, **configuration.input.kwargs})
    calls = hook_calls(optimizer)
    take_steps(optimizer, parameters, 2)
    assert calls == ["pre", "post"] * 2


@every_configuration(adamw_fails=TWICE)
@pytest.mark.parametrize("levels", [1, 2])
def test_hooks_of_a_subclass_that_calls_super_run_once(configuration: Configuration, levels: int) -> None:
    """Hooks, own and global, run once per step for a subclass whose `step` calls `super().step()`."""
    parameters, control = new_parameters(), new_parameters()
    plain = configuration.optimizer(control)  # torch wraps the base class's step now
    cls = configuration.info.optim_cls
    for _ in range(levels):
        cls = subclass(cls)
        optimizer = cls(parameters, **{"lr": 0.01, **configuration.input.kwargs})
    calls = hook_calls(optimizer)
    with global_hook_calls() as global_calls:
        take_steps(optimizer, parameters, 2)
    assert calls == ["pre", "post"] * 2
    assert global_calls == ["global pre", "global post"] * 2
    take_steps(plain, control, 2)
    assert same(parameters, control)


@every_configuration()
def test_the_profiler_shows_each_step_once(configuration: Configuration) -> None:
    """The profiler shows each step, and each `zero_grad`, once, under the name of the class."""
    parameters = new_parameters()
    optimizer = configuration.optimizer(parameters)
    give_gradients(parameters, 0)
    name = configuration.info.name
    assert labels_of([optimizer]) == {f"Optimizer.step#{name}.step": 1, f"Optimizer.zero_grad#{name}.zero_grad": 1}


@every_configuration(adamw_fails=TWICE)
def test_the_profiler_shows_a_subclasss_step_once(configuration: Configuration) -> None:
    """The profiler shows a step of a subclass that calls `super().step()` once, under the subclass's name."""
    configuration.optimizer(new_parameters())
    parameters = new_parameters()
    optimizer = subclass(configuration.info.optim_cls)(parameters, **{"lr": 0.01, **configuration.input.kwargs})
    give_gradients(parameters, 0)
    assert labels_of([optimizer])["Optimizer.step#Sub.step"] == 1
