"""The tasks of a race: what one is, and how a name on the command line becomes one.

Built in: ``charlm``, ``digits``, ``pinn``. A task of one's own is a class with the four methods of :class:`Task`, named
as ``--task package.module:TaskClass``, which Python must find, in the current folder or elsewhere. It is constructed as
``TaskClass(seed=0)``, once per seed, and need not inherit from anything here; ``docs/race.md`` has one.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from emerging_optimizers.lab.common import LabError, printable
from emerging_optimizers.plan.sources import search_hint, spelling_hint

BUILT_IN = {
    "charlm": "emerging_optimizers.lab.tasks.charlm:CharLM",
    "digits": "emerging_optimizers.lab.tasks.digits:Digits",
    "pinn": "emerging_optimizers.lab.tasks.pinn:Burgers",
}
METHODS = ("model", "batch", "loss", "validate")


class Task(Protocol):
    """A model, its batches and its score. Everything random in it follows from the seed it was constructed with."""

    def model(self) -> nn.Module:
        """Make a fresh model. torch's global generator has been seeded with the task's seed just before the call."""

    def batch(self, step: int) -> Any:
        """Make the batch of one step (0-based): a pure function of the seed and the step, so that a race can resume."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Compute the training loss: a 0-D tensor to call ``backward`` on."""

    def validate(self, model: nn.Module) -> float:
        """Score the model on data or conditions that it is not trained on. Lower is better; no side effects."""


class Settings(NamedTuple):
    """What a task says about itself, through attributes of the same names.

    Attributes:
        name: shown in tables, pictures and the report.
        metric: what ``validate`` returns, with its unit.
        steps: optimizer steps of a whole race.
        eval_every: steps between two calls of ``validate``.
    """

    name: str
    metric: str = "validation loss"
    steps: int = 300
    eval_every: int = 10


def settings_of(task: Task) -> Settings:
    """Read a task's settings, its words made printable; an attribute it does not have takes the default."""
    given = {field: getattr(task, field) for field in Settings._fields if hasattr(task, field)}
    settings = Settings(**{"name": type(task).__name__, **given})
    return settings._replace(name=printable(settings.name), metric=printable(settings.metric))


def step_generator(seed: int, step: int) -> torch.Generator:
    """Make a generator that is a pure function of (seed, step), for a task's ``batch``."""
    # torch's CPU generator looks at the low 32 bits of its seed alone, so the two numbers have to share those: there is
    # room for a million steps before one seed's streams run into the next one's.
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**32)


def task_class(name: str) -> Callable[..., Task]:
    """Find a task's class by a built-in name or ``package.module:TaskClass``; LabError if it lacks a method."""
    if ":" not in name and name not in BUILT_IN:
        close = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise LabError(f"unknown task {name!r}: {hint}choose {', '.join(BUILT_IN)} or package.module:TaskClass")
    module_name, _, attribute = BUILT_IN.get(name, name).partition(":")
    if spelling := spelling_hint(module_name, attribute):
        raise LabError(f"task {name!r}: {spelling}")
    if name not in BUILT_IN and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises while it is imported
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        where = search_hint(module_name, error)
        raise LabError(f"task {name!r}: importing {module_name!r} failed ({reason}){where}") from error
    found = getattr(module, attribute, None)
    if not isinstance(found, type):
        raise LabError(f"task {name!r}: module {module_name!r} has no class {attribute!r}")
    missing = [method for method in METHODS if not callable(getattr(found, method, None))]
    if missing:
        raise LabError(f"task {name!r} lacks the method(s) {', '.join(missing)}; a task has {', '.join(METHODS)}")
    return cast(Callable[..., Task], found)


def make_task(name: str, seed: int, options: dict[str, Any]) -> Task:
    """Construct a task for one seed, as ``TaskClass(seed=..., **options)``."""
    constructor = task_class(name)
    try:
        return constructor(seed=seed, **options)
    except TypeError as error:
        raise LabError(f"task {name!r} cannot be constructed with seed={seed}: {error}") from error
