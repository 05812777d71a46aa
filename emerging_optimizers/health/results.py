"""What an examination measures: plain values, for one axis and for one parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class FactorHealth:
    """One axis of a preconditioned tensor. None stands for: not defined yet.

    Attributes:
        orthogonality: ``max |Q^T Q - I|``; None before the first refresh.
        residual: What of ``K`` is not diagonal in the basis, ``|offdiag(Q^T K Q)|_F / |K|_F``, from 0 (fresh) to 1.
            None before the first refresh and for a factor of zeros.
        effective_rank: ``exp(-sum p_i log p_i)`` for ``p`` the eigenvalues over their sum, from 1 to d (Roy and
            Vetterli, "The effective rank", EUSIPCO 2007). None for a factor of zeros.
        condition: Largest over smallest eigenvalue. The smallest is taken as no less than the working dtype's machine
            epsilon times the largest, which is where the rounding of ``K`` hides it: at most 8.4e6 in float32.
        dead_share: The share of the axis's indices along which the gradient has always been exactly zero.
        spectrum: The eigenvalues, largest first, not below 0; empty for a factor that is not finite.
    """

    axis: int
    size: int
    orthogonality: float | None
    residual: float | None
    effective_rank: float | None
    condition: float | None
    dead_share: float
    spectrum: tuple[float, ...]
    basis_dtype: str
    finite: bool


@dataclass(frozen=True)
class TensorHealth:
    """One parameter. None stands for: not known, or not defined yet.

    Attributes:
        shape: Of its moments: its own, or that of the piece which this process has of a tensor that gets AdamW.
        preconditioned: Whether it has factors; otherwise it gets plain AdamW, and fewer measurements.
        step: Steps done, skipped ones included.
        skipped_steps: Those in which the gradient could not be used.
        failed_refreshes: Those in which a decomposition failed for good and the last good basis stayed.
        frequency: The refresh frequency, steps; None where it is a callable that was not saved.
        age: Steps since the last refresh that was due; None before the first.
        direction_rms: Root mean square of the last update before the learning rate, as the moments that are kept now
            give it: an estimate where ``use_nesterov`` adds the gradient, which is gone. 1 is one learning rate per
            weight.
        update_rms: ``lr * direction_rms``, with the learning rate that the group has now.
        update_ratio: ``update_rms / weight_rms``; None for a weight of zeros.
        dead: Whether the second moment is zero everywhere: no usable gradient but zero has ever come.
    """

    name: str
    shape: tuple[int, ...]
    preconditioned: bool
    weight_dtype: str | None
    step: int
    skipped_steps: int
    failed_refreshes: int
    frequency: int | None
    age: int | None
    direction_rms: float | None
    update_rms: float | None
    weight_rms: float | None
    update_ratio: float | None
    learning_rate: float
    dead: bool
    finite: bool
    adaptive: bool
    factors: tuple[FactorHealth, ...]

    @property
    def usable_steps(self) -> int:
        """Steps whose gradient could be used."""
        return self.step - self.skipped_steps

    @property
    def periods(self) -> float | None:
        """The age of the basis in refresh periods, below 1 where refreshes happen when they are due."""
        return None if self.age is None or self.frequency is None else self.age / self.frequency

    def scalars(self) -> Iterator[tuple[str, float]]:
        """The measurements that change from step to step, as names like ``residual_0`` and numbers."""
        for key in ("direction_rms", "update_rms", "update_ratio", "age"):
            if (value := getattr(self, key)) is not None:
                yield key, float(value)
        for factor in self.factors:
            for key in ("orthogonality", "residual", "effective_rank", "condition", "dead_share"):
                if (value := getattr(factor, key)) is not None:
                    yield f"{key}_{factor.axis}", float(value)
