"""What a race is asked to do, read from the words of the command line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emerging_optimizers.lab.errors import LabError
from emerging_optimizers.lab.optimizers import OPTIMIZERS, tuned_rate


@dataclass(frozen=True)
class Options:
    """Everything that determines a race's numbers, but the machine and the versions.

    Attributes:
        task: built-in name or ``package.module:TaskClass``.
        text: absolute path of the text for `charlm`, None for the built-in one.
        learning_rates: optimizer -> peak learning rates, each a run of its own; in the order of the tables.
        seeds: each seed gives start weights and batches, the same for every optimizer.
        steps: optimizer steps per run; None takes the task's.
        frequency: steps between SOAP's refreshes of the eigenbases.
        threads: torch's intra-op threads.
    """

    task: str
    text: str | None
    learning_rates: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    steps: int | None
    frequency: int
    threads: int

    @classmethod
    def restore(cls, saved: Any) -> Options:
        """Take options from a checkpoint: the values of `asdict`, after a check of every type.

        Raises:
            LabError: they are not what a race saves.
        """
        wanted = {
            "task": lambda v: isinstance(v, str),
            "text": lambda v: v is None or isinstance(v, str),
            "learning_rates": lambda v: isinstance(v, dict) and v and all(map(_is_rates, v.items())),
            "seeds": lambda v: isinstance(v, tuple) and v and all(type(seed) is int for seed in v),
            "steps": lambda v: v is None or _is_positive(v),
            "frequency": _is_positive,
            "threads": _is_positive,
        }
        if not isinstance(saved, dict) or set(saved) != set(wanted) or not all(wanted[k](v) for k, v in saved.items()):
            raise LabError("the checkpoint's options are not those of a race; start a new race")
        return cls(**saved)

    def task_options(self) -> dict[str, Any]:
        """Return the keyword arguments of the task's constructor, besides the seed."""
        return {} if self.text is None else {"text": self.text}

    def public(self) -> dict[str, Any]:
        """Return the options as results show them: the text by file name, as a path may name a person."""
        return {**asdict(self), "text": None if self.text is None else Path(self.text).name}


def _is_positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_rates(item: tuple[Any, Any]) -> bool:
    name, rates = item
    floats = isinstance(rates, tuple) and len(rates) > 0 and all(type(rate) is float for rate in rates)
    return floats and name in OPTIMIZERS


def read_optimizers(names: str) -> tuple[str, ...]:
    """Read ``a,b,c``.

    Raises:
        LabError: a name is unknown or there twice.
    """
    chosen = tuple(name.strip() for name in names.split(","))
    for name in chosen:
        _check_optimizer(name, "--optimizers")
    if len(set(chosen)) < len(chosen):
        raise LabError(f"--optimizers {names}: an optimizer is there twice; name each once")
    return chosen


def read_seeds(text: str) -> tuple[int, ...]:
    """Read ``0,1,2``.

    Raises:
        LabError: not a list of different whole numbers from 0 to 2**31 - 1.
    """
    try:
        seeds = tuple(int(word) for word in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**31 for seed in seeds):
        raise LabError(f"--seeds {text}: expected different whole numbers below 2**31, for example --seeds 0,1,2")
    return seeds


def read_learning_rates(words: Sequence[str], optimizers: Sequence[str], task: str) -> dict[str, tuple[float, ...]]:
    """Read ``["soap=6e-3,3e-3", ...]``; an optimizer that is not mentioned gets its rate from the committed sweep.

    Raises:
        LabError: a word is malformed, or names an optimizer that does not race.
    """
    given: dict[str, tuple[float, ...]] = {}
    for word in words:
        name, _, values = word.partition("=")
        try:
            rates = tuple(float(value) for value in values.split(","))
        except ValueError:
            rates = ()
        if not rates or not all(rate > 0 and math.isfinite(rate) for rate in rates):
            raise LabError(f"--lr {word}: expected optimizer=rate[,rate...], for example --lr soap=6e-3,3e-3")
        _check_optimizer(name, "--lr")
        if name not in optimizers:
            raise LabError(f"--lr {word}: {name} does not race; add it with --optimizers {','.join(optimizers)},{name}")
        if name in given or len(set(rates)) < len(rates):
            raise LabError(f"--lr {word}: give {name}'s rates once, all different: --lr {name}=6e-3,3e-3")
        given[name] = rates
    return {name: given.get(name) or (tuned_rate(task, name),) for name in optimizers}


def _check_optimizer(name: str, option: str) -> None:
    if name in OPTIMIZERS:
        return
    close = difflib.get_close_matches(name, OPTIMIZERS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise LabError(f"{option}: unknown optimizer {name!r}: {hint}choose from {', '.join(OPTIMIZERS)}")
