"""Schedules of the refresh frequency, for ``SOAP(..., precondition_frequency=schedule)``.

A schedule is a callable from the step ``t`` (int, 0 for the first step) to a frequency ``f(t)`` (int >= 1).
SOAP refreshes its eigenbases at step ``t`` when ``t % f(t) == 0``. Any function of that form will do. Those
here can also be printed (the repr evaluates to an equal schedule), compared, hashed and pickled. SOAP does not save
them in its ``state_dict``: give the resumed optimizer the same schedule.

Only the current ``f`` decides: nothing counts the steps since the last refresh. While ``f`` changes, the
refreshes are the steps that their own frequency happens to divide, which may be fewer than ``f`` suggests.
At its worst, ``f`` grows as fast as ``t`` and stays just ahead of it:

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
from dataclasses import dataclass

__all__ = ["ConstantFrequency", "CosineFrequency", "LinearFrequency", "StepFrequency"]


@dataclass(frozen=True, slots=True)
class ConstantFrequency:
    """The same frequency at every step; equal in effect to passing the integer.

    Args:
        frequency: Steps from one refresh to the next, at least 1.

    Raises:
        TypeError: If ``frequency`` is not an int.
        ValueError: If ``frequency`` is below 1.

    Example:
        >>> ConstantFrequency(10)
        ConstantFrequency(frequency=10)
        >>> ConstantFrequency(10)(12345)
        10
    """

    frequency: int

    def __post_init__(self) -> None:
        _require_int("frequency", self.frequency, minimum=1)

    def __call__(self, t: int) -> int:
        """Return the frequency at step ``t``."""
        _require_step(t)
        return self.frequency


@dataclass(frozen=True, slots=True)
class LinearFrequency:
    """A straight line from ``start`` at step 0 to ``end`` at step ``steps``, rounded; ``end`` from there on.

    Args:
        start: Frequency at step 0, at least 1.
        end: Frequency from step ``steps`` on, at least 1; may be below ``start``.
        steps: Length of the change in steps, at least 1.

    Raises:
        TypeError: If an argument is not an int.
        ValueError: If an argument is below 1.

    Example:
        >>> schedule = LinearFrequency(start=1, end=10, steps=900)
        >>> [schedule(t) for t in (0, 300, 600, 900, 5000)]
        [1, 4, 7, 10, 10]
    """

    start: int
    end: int
    steps: int

    def __post_init__(self) -> None:
        for name in ("start", "end", "steps"):
            _require_int(name, getattr(self, name), minimum=1)

    def __call__(self, t: int) -> int:
        """Return the frequency at step ``t``."""
        _require_step(t)
        return _interpolate(self.start, self.end, min(t, self.steps) / self.steps)


@dataclass(frozen=True, slots=True)
class CosineFrequency:
    """As :class:`LinearFrequency`, along half a cosine: slow at both ends, fastest in the middle.

    Args:
        start: Frequency at step 0, at least 1.
        end: Frequency from step ``steps`` on, at least 1; may be below ``start``.
        steps: Length of the change in steps, at least 1.

    Raises:
        TypeError: If an argument is not an int.
        ValueError: If an argument is below 1.

    Example:
        >>> schedule = CosineFrequency(start=1, end=13, steps=900)
        >>> [schedule(t) for t in (0, 300, 450, 600, 900, 5000)]
        [1, 4, 7, 10, 13, 13]
    """

    start: int
    end: int
    steps: int

    def __post_init__(self) -> None:
        for name in ("start", "end", "steps"):
            _require_int(name, getattr(self, name), minimum=1)

    def __call__(self, t: int) -> int:
        """Return the frequency at step ``t``."""
        _require_step(t)
        progress = (1.0 - math.cos(math.pi * min(t, self.steps) / self.steps)) / 2.0
        return _interpolate(self.start, self.end, progress)


@dataclass(frozen=True, slots=True, init=False)
class StepFrequency:
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
        _require_int("start", start, minimum=1)
        pairs = milestones.items() if isinstance(milestones, Mapping) else milestones
        try:
            ordered = tuple((step, frequency) for step, frequency in pairs)
        except (TypeError, ValueError):
            raise TypeError(
                f"milestones: got {milestones!r}, wanted a mapping or pairs of step and frequency"
            ) from None
        for step, frequency in ordered:
            _require_int("milestones: step", step, minimum=1)
            _require_int(f"milestones: frequency from step {step}", frequency, minimum=1)
        if len({step for step, _ in ordered}) < len(ordered):
            raise ValueError(f"milestones: got {milestones!r}, wanted each step once")
        object.__setattr__(self, "start", start)  # frozen
        object.__setattr__(self, "milestones", tuple(sorted(ordered)))

    def __call__(self, t: int) -> int:
        """Return the frequency at step ``t``."""
        _require_step(t)
        current = self.start
        for step, frequency in self.milestones:
            if t < step:
                break
            current = frequency
        return current


def _interpolate(start: int, end: int, progress: float) -> int:
    # Halves round up: to the even neighbour, as round() has it, the frequencies would last unequally long.
    # The inner rounding lifts what only its last bits put below a half, so that all math libraries agree.
    return math.floor(round(start + (end - start) * progress, 9) + 0.5)


def _require_int(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, wanted an int of at least {minimum}")
    if value < minimum:
        raise ValueError(f"{name}: got {value!r}, wanted an int of at least {minimum}")


def _require_step(t: int) -> None:
    if t < 0:
        raise ValueError(f"t: got {t!r}, wanted a step of at least 0")
