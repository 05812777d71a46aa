"""Schedules of the refresh frequency, for ``SOAP(..., precondition_frequency=schedule)``.

A schedule is a callable from the step ``t`` (int, 0 for the first step) to a frequency ``f(t)`` (int >= 1).
SOAP refreshes its eigenbases at step ``t`` when ``t % f(t) == 0``. Any function of that form will do. Those
here can also be printed (the repr evaluates to an equal schedule), compared, hashed and pickled. SOAP does not save
them in its ``state_dict``: give the resumed optimizer the same schedule.

Only the current ``f`` decides, so that a changing one may refresh less often than it suggests. At its worst it grows
as fast as ``t`` and stays just ahead of it:

>>> schedule = LinearFrequency(start=2, end=12, steps=10)
>>> [t for t in range(40) if t % schedule(t) == 0]
[0, 12, 24, 36]

Steps between frequencies that divide one another avoid this, and so does a change that is slow against ``f``:

>>> schedule = StepFrequency(start=2, milestones={8: 4, 16: 12})
>>> [t for t in range(40) if t % schedule(t) == 0]
[0, 2, 4, 6, 8, 12, 24, 36]
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["ConstantFrequency", "CosineFrequency", "LinearFrequency", "StepFrequency"]


@dataclass(frozen=True, slots=True)
class _Schedule:
    """A frequency at every step, from fields that are integers of at least 1."""

    def __post_init__(self) -> None:
        for field in fields(self):
            _require_int(field.name, getattr(self, field.name))

    def __call__(self, t: int) -> int:
        """Return the frequency at step ``t``."""
        if t < 0:
            raise ValueError(f"t: got {t!r}, wanted a step of at least 0")
        return self._at(t)

    def _at(self, t: int) -> int:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class ConstantFrequency(_Schedule):
    """The same frequency at every step; equal in effect to passing the integer.

    Args:
        frequency: Steps from one refresh to the next, at least 1.

    Example:
        >>> ConstantFrequency(10)(12345)
        10
    """

    frequency: int

    def _at(self, t: int) -> int:
        return self.frequency


@dataclass(frozen=True, slots=True)
class LinearFrequency(_Schedule):
    """A straight line from ``start`` at step 0 to ``end`` at step ``steps``, rounded; ``end`` from there on.

    Args:
        start: Frequency at step 0, at least 1.
        end: Frequency from step ``steps`` on, at least 1; may be below ``start``.
        steps: Length of the change in steps, at least 1.

    Example:
        >>> schedule = LinearFrequency(start=1, end=10, steps=900)
        >>> [schedule(t) for t in (0, 300, 600, 900, 5000)]
        [1, 4, 7, 10, 10]
    """

    start: int
    end: int
    steps: int

    def _at(self, t: int) -> int:
        progress = self._progress(min(t, self.steps) / self.steps)
        # Halves round up: to the even neighbour, as round() has it, the frequencies would last unequally long.
        # The inner rounding lifts what only its last bits put below a half, so that all math libraries agree.
        return math.floor(round(self.start + (self.end - self.start) * progress, 9) + 0.5)

    def _progress(self, share: float) -> float:
        return share


@dataclass(frozen=True, slots=True)
class CosineFrequency(LinearFrequency):
    """As :class:`LinearFrequency`, along half a cosine: slow at both ends, fastest in the middle.

    Example:
        >>> schedule = CosineFrequency(start=1, end=13, steps=900)
        >>> [schedule(t) for t in (0, 300, 450, 600, 900, 5000)]
        [1, 4, 7, 10, 13, 13]
    """

    def _progress(self, share: float) -> float:
        return (1.0 - math.cos(math.pi * share)) / 2.0


@dataclass(frozen=True, slots=True, init=False)
class StepFrequency(_Schedule):
    """``start`` until the first milestone, then each milestone's frequency from its step on.

    Args:
        start: Frequency before the first milestone, at least 1.
        milestones: Step (at least 1) to frequency (at least 1), as a mapping or as pairs, in any order. Kept
            as a tuple of pairs sorted by step.

    Raises:
        TypeError: If a number is not an int, or ``milestones`` neither a mapping nor pairs.
        ValueError: If a number is below 1, or two milestones share a step.

    Example:
        >>> schedule = StepFrequency(1, {100: 10, 1000: 50})
        >>> schedule
        StepFrequency(start=1, milestones=((100, 10), (1000, 50)))
        >>> [schedule(t) for t in (0, 99, 100, 999, 1000)]
        [1, 1, 10, 10, 50]
    """

    start: int
    milestones: tuple[tuple[int, int], ...]

    def __init__(self, start: int, milestones: Mapping[int, int] | Iterable[tuple[int, int]]) -> None:
        pairs = milestones.items() if isinstance(milestones, Mapping) else milestones
        try:
            ordered = tuple((step, frequency) for step, frequency in pairs)
        except (TypeError, ValueError):
            raise TypeError(
                f"milestones: got {milestones!r}, wanted a mapping or pairs of step and frequency"
            ) from None
        _require_int("start", start)
        for step, frequency in ordered:
            _require_int("milestones: step", step)
            _require_int(f"milestones: frequency from step {step}", frequency)
        if len(dict(ordered)) < len(ordered):
            raise ValueError(f"milestones: got {milestones!r}, wanted each step once")
        object.__setattr__(self, "start", start)  # frozen
        object.__setattr__(self, "milestones", tuple(sorted(ordered)))

    def _at(self, t: int) -> int:
        reached = [frequency for step, frequency in self.milestones if step <= t]
        return reached[-1] if reached else self.start


def _require_int(name: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 1:
        raise (ValueError if whole else TypeError)(f"{name}: got {value!r}, wanted an int of at least 1")
