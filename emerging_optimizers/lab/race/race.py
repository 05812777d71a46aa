"""The race itself: every run from the same start, on the same batches, step by step side by side.

A run is an optimizer with one learning rate and one seed. The runs take turns, `eval_every` steps each, so that their
curves grow together and slow minutes of the machine fall on all of them alike.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from emerging_optimizers.lab.common import LabError
from emerging_optimizers.lab.race.optimizers import OPTIMIZERS, Contender, make_contender
from emerging_optimizers.lab.tasks import Task, make_task, settings_of

FORMAT = "soap-race-checkpoint/1"
WARMUP_STEPS = 10


@dataclass(frozen=True)
class Options:
    """Everything that determines a race's numbers, but the machine and the versions."""

    task: str
    text: str | None  # absolute path, for charlm
    learning_rates: dict[str, tuple[float, ...]]  # peaks, each a run of its own; in the order of the tables
    seeds: tuple[int, ...]
    steps: int | None  # None: the task's
    frequency: int
    threads: int

    @classmethod
    def restore(cls, saved: Any) -> Options:
        """Take options from a checkpoint: the values of `asdict`, after a check of every type."""
        wanted = {
            "task": lambda v: isinstance(v, str),
            "text": lambda v: v is None or isinstance(v, str),
            "learning_rates": lambda v: isinstance(v, dict) and v and all(_is_rates(*item) for item in v.items()),
            "seeds": lambda v: isinstance(v, tuple) and v and all(type(seed) is int for seed in v),
            "steps": lambda v: v is None or _is_positive(v),
            "frequency": _is_positive,
            "threads": _is_positive,
        }
        if not isinstance(saved, dict) or set(saved) != set(wanted) or not all(wanted[k](v) for k, v in saved.items()):
            raise LabError("the checkpoint's options are not those of a race; start a new race")
        return cls(**saved)

    def public(self) -> dict[str, Any]:
        """Return the options as results show them: the text by file name, as a path may name a person."""
        return {**asdict(self), "text": None if self.text is None else Path(self.text).name}


def _is_positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_rates(name: Any, rates: Any) -> bool:
    floats = isinstance(rates, tuple) and rates and all(type(rate) is float for rate in rates)
    return bool(floats) and name in OPTIMIZERS


@dataclass
class Record:
    """What is kept of a run: plain numbers, all finite."""

    optimizer: str
    lr: float
    seed: int
    parameters: int
    eval_steps: list[int]  # steps done when `validation` was measured, from 0
    validation: list[float]
    train_loss: list[float] = field(default_factory=list)  # of each step's batch, before the step
    step_seconds: list[float] = field(default_factory=list)  # without making the batch and validating
    optimizer_seconds: list[float] = field(default_factory=list)
    state_bytes: int = 0
    diverged: str | None = None  # why the run does not count


@dataclass
class Run:
    """One model in training."""

    task: Task
    model: nn.Module
    contender: Contender
    record: Record

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.record.train_loss)


def learning_rate_factor(step: int, steps: int) -> float:
    """Compute the schedule's factor at a step (0-based): a short linear warm-up, then linear to zero."""
    return min(1.0, (step + 1) / (WARMUP_STEPS + 1)) * (1.0 - step / steps)


class Race:
    """All runs of a race; LabError if the task or an optimizer cannot be set up."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.runs: list[Run] = []
        self._starts: dict[int, tuple[float, float]] = {}  # seed -> score of the start weights, loss of batch 0
        for seed in options.seeds:
            task = make_task(options.task, seed, {} if options.text is None else {"text": options.text})
            self.settings = settings_of(task)
            self.steps = options.steps or self.settings.steps
            torch.manual_seed(seed)
            start = task.model()
            self._starts[seed] = _score(task, start)
            for name, rates in options.learning_rates.items():
                self.runs += [self._run(task, start, name, lr, seed) for lr in rates]

    def _run(self, task: Task, start: nn.Module, name: str, lr: float, seed: int) -> Run:
        model = copy.deepcopy(start)
        contender = make_contender(name, model, lr, self.options.task, self.options.frequency)
        parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return Run(task, model, contender, Record(name, lr, seed, parameters, [0], [self._starts[seed][0]]))

    @property
    def finished(self) -> bool:
        """Whether every run has done its steps or has diverged."""
        return all(run.record.diverged or run.step == self.steps for run in self.runs)

    def play(self) -> Iterator[Run]:
        """Go on to the end, one step per item: the run that has just moved.

        Between two items everything is consistent: that is where to stop, save or draw. Playing again goes on.
        """
        every = self.settings.eval_every
        for goal in [*range(every, self.steps, every), self.steps]:
            for run in self.runs:
                while run.step < goal and not run.record.diverged:
                    self._advance(run)
                    if run.step == goal and not run.record.diverged:
                        self._evaluate(run)
                    yield run

    def _advance(self, run: Run) -> None:
        """Take one training step."""
        record, step = run.record, run.step
        batch = run.task.batch(step)
        # A model with dropout draws the same masks for every optimizer, and again after a resume.
        torch.manual_seed(record.seed * 1_000_003 + step + 500_000)  # far from the streams of `step_generator`
        run.model.train()
        run.contender.schedule(learning_rate_factor(step, self.steps))
        begin = perf_counter()
        loss = run.task.loss(run.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        middle = perf_counter()
        run.contender.step()
        run.contender.zero_grad()
        end = perf_counter()
        if not math.isfinite(value := loss.item()):
            record.diverged = f"training loss {value} at step {step + 1}"
            return
        record.train_loss.append(value)
        record.step_seconds.append(round(end - begin, 7))
        record.optimizer_seconds.append(round(end - middle, 7))

    def _evaluate(self, run: Run) -> None:
        """Score the run."""
        record = run.record
        run.model.eval()
        value = float(run.task.validate(run.model))
        record.state_bytes = run.contender.state_bytes()
        if not math.isfinite(value):
            record.diverged = f"{self.settings.metric} {value} at step {run.step}"
            return
        record.eval_steps.append(run.step)
        record.validation.append(value)
        if run.step == self.steps and value > record.validation[0]:
            record.diverged = f"ended at {value:.4g}, worse than its start at {record.validation[0]:.4g}"

    def state(self) -> dict[str, Any]:
        """Collect all that a later `restore` needs: tensors are shared with the runs, not copied."""
        runs = [
            {"record": asdict(r.record), "model": r.model.state_dict(), "optimizer": r.contender.state_dict()}
            for r in self.runs
        ]
        return {"format": FORMAT, "options": asdict(self.options), "starts": self._starts, "runs": runs}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Race:
        """Make the race that `state` was taken from, ready to go on bit for bit; LabError if the task has changed."""
        race = cls(saved_options(state))
        try:
            for seed, start in state["starts"].items():
                # Another machine may round differently; other data or another model is further away than that.
                if not all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(start, race._starts[seed], strict=True)):
                    raise LabError("the task or its text has changed since the race began; start a new race")
            for run, saved in zip(race.runs, state["runs"], strict=True):
                run.record = Record(**saved["record"])
                run.model.load_state_dict(saved["model"])
                run.contender.load_state_dict(saved["optimizer"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise LabError("the checkpoint does not fit the task's model and optimizers; start a new race") from error
        return race


def saved_options(state: dict[str, Any]) -> Options:
    """Read from a race's state what was to be raced; LabError if it is not a race's."""
    if state.get("format") != FORMAT:
        raise LabError(f"the checkpoint is not of the format {FORMAT}; start a new race")
    return Options.restore(state.get("options"))


def _score(task: Task, start: nn.Module) -> tuple[float, float]:
    """Score the start weights: what `validate` says, and the loss of the first batch."""
    model = copy.deepcopy(start)
    torch.manual_seed(0)  # for a model with dropout
    loss = task.loss(model, task.batch(0)).item()
    model.eval()
    score = float(task.validate(model))
    if not (math.isfinite(score) and math.isfinite(loss)):
        raise LabError(f"the task's start has the score {score} and the loss {loss}: both must be finite")
    return score, loss
