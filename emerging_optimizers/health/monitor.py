"""Health followed through a run: numbers to a logger every N steps, and a warning in words where something is wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch.optim import Optimizer

from emerging_optimizers.health.diagnosis import Health
from emerging_optimizers.health.measure import examine
from emerging_optimizers.health.source import Names, entries

logger = logging.getLogger(__name__)


class ScalarWriter(Protocol):
    """What is needed of ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Writes one number."""


Log = Callable[[str, float, int], object]


class HealthMonitor:
    """Measures an optimizer every N steps, logs the numbers, and warns in words, once per kind and tensor.

    Call it after each ``optimizer.step()``, or give it to ``optimizer.register_step_post_hook``. Only a call that
    measures waits for the device. Numbers are called ``health/NAME/residual_0`` and the like, see :class:`TensorHealth`
    and :class:`FactorHealth`, and ``health/worst_residual``, ``health/findings`` and so on for all tensors together.

    Args:
        optimizer: A SOAP optimizer.
        every: Steps between measurements.
        log: Called as ``log(name, value, step)``, or a TensorBoard ``SummaryWriter``, or anything with its
            ``add_scalar``. None: only warnings.
        names: ``model.named_parameters()``, or a name per parameter in the optimizer's order; None: the optimizer's.

    Attributes:
        health: The last measurement; None before the first.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``every`` is below 1, the optimizer is not SOAP's, or ``names`` has another length.

    Example:
        >>> import torch
        >>> from emerging_optimizers.soap import SOAP
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = SOAP([("weight", weight)], lr=0.1)
        >>> monitor = HealthMonitor(optimizer, every=2, log=lambda name, value, step: print(name, value, step))
        >>> for _ in range(2):
        ...     weight.grad = torch.eye(2)
        ...     optimizer.step()
        ...     monitor()  # doctest: +ELLIPSIS
        health/weight/direction_rms ... 2
        ...
        health/findings 0.0 2
    """

    def __init__(
        self,
        optimizer: Optimizer,
        every: int = 100,
        log: Log | ScalarWriter | None = None,
        names: Names | None = None,
    ) -> None:
        given: object = optimizer
        if not isinstance(given, Optimizer):
            raise TypeError(f"optimizer must be a SOAP optimizer, got {type(given).__name__}")
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be an integer >= 1, got {every!r}")
        if every < 1:
            raise ValueError(f"every must be an integer >= 1, got {every}")
        writer = getattr(log, "add_scalar", None)
        if writer is None and log is not None and not callable(log):
            raise TypeError(f"log must be a callable (name, value, step) or have add_scalar, got {type(log).__name__}")
        # named_parameters() can be gone through only once.
        self._names: list[Any] | None = None if names is None else list(names)
        list(entries(optimizer, self._names, None))  # raises
        self.optimizer, self.every = optimizer, every
        self.health: Health | None = None
        self._log: Log | None = writer if writer is not None else log  # type: ignore[assignment]
        self._calls = 0
        self._told: set[tuple[str, str]] = set()

    def __call__(self, *_: object) -> None:
        """Counts a step, and measures where it is the N-th. Takes, and does not look at, what a hook is given."""
        self._calls += 1
        if self._calls < self.every:
            return
        self._calls = 0
        self.measure()

    def step(self) -> None:
        """The same as calling it."""
        self()

    def measure(self) -> Health:
        """Measures, logs and warns now, whatever the step."""
        health = self.health = examine(self.optimizer, names=self._names, exact_spectra=False)
        if self._log is not None:
            for name, value in _scalars(health):
                self._log(f"health/{name}", value, health.step)
        for finding in health.findings:
            if (finding.kind, finding.name) not in self._told:
                self._told.add((finding.kind, finding.name))
                logger.warning("step %d: %s Told once per tensor.", health.step, finding)
        return health


def _scalars(health: Health) -> Iterable[tuple[str, float]]:
    for tensor in health.tensors:
        yield from ((f"{tensor.name}/{key}", value) for key, value in tensor.scalars())
    factors = [factor for tensor in health.tensors for factor in tensor.factors]
    for key in ("residual", "orthogonality"):
        found = [value for factor in factors if (value := getattr(factor, key)) is not None]
        if found:
            yield f"worst_{key}", max(found)
    for key in ("skipped_steps", "failed_refreshes"):
        yield key, float(sum(getattr(tensor, key) for tensor in health.tensors))
    yield "findings", float(len(health.findings))
