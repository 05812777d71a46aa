"""What a task is: four methods, and four optional attributes that describe it.

A task of one's own is a class with these methods, named on the command line as ``--task package.module:TaskClass``.
It is constructed as ``TaskClass(seed=0)``, once per seed, and need not inherit from anything here::

    class Regression:
        name, metric, steps, eval_every = "regression", "mean squared error", 200, 10

        def __init__(self, seed: int) -> None:
            self.seed = seed

        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

        def batch(self, step: int) -> Tensor:
            return torch.randn(64, 8, generator=step_generator(self.seed, step))

        def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
            return (model(batch) - batch.sin().sum(1, keepdim=True)).square().mean()

        def validate(self, model: nn.Module) -> float:
            with torch.no_grad():
                return self.loss(model, self.batch(-1)).item()
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from emerging_optimizers.lab.printable import printable

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
