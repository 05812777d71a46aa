"""Shape checks of the documented list functions: the error names the argument, what it got and what it wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensor(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is a dense floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be dense (torch.strided), got {value.layout}")


def check_square(name: str, matrices: Sequence[Tensor]) -> None:
    """Raises unless every element is a square matrix or an empty tensor (an axis without a factor)."""
    if not isinstance(matrices, list | tuple):
        raise TypeError(f"{name} must be a list of Tensors, got {type(matrices).__name__}")
    for k, matrix in enumerate(matrices):
        check_tensor(f"{name}[{k}]", matrix)
        if matrix.numel() and (matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]):
            raise ValueError(f"{name}[{k}] must be a square matrix or empty, got shape {tuple(matrix.shape)}")


def check_matches(
    name: str, matrices: Sequence[Tensor], shape: Sequence[int], shape_of: str, optional: bool = True
) -> None:
    """Raises unless ``matrices`` has one square matrix of the right size, or an empty tensor, per axis of ``shape``."""
    check_square(name, matrices)
    if len(matrices) != len(shape):
        raise ValueError(
            f"{name} must have one entry per axis of {shape_of}: got {len(matrices)} for shape {tuple(shape)}"
        )
    for k, (matrix, size) in enumerate(zip(matrices, shape, strict=True)):
        if matrix.numel() == 0 and (optional or size == 0):
            continue
        if tuple(matrix.shape) != (size, size):
            raise ValueError(
                f"{name}[{k}] must have shape {(size, size)} for axis {k} of {shape_of}, got {tuple(matrix.shape)}"
            )


def check_pairs(name: str, matrices: Sequence[Tensor], other_name: str, others: Sequence[Tensor]) -> None:
    """Raises unless two lists have the same length and shapes."""
    check_square(name, matrices)
    if len(matrices) != len(others):
        raise ValueError(f"{name} must be as long as {other_name} ({len(others)}), got {len(matrices)}")
    for k, (matrix, other) in enumerate(zip(matrices, others, strict=True)):
        if matrix.shape != other.shape:
            raise ValueError(
                f"{name}[{k}] must have the shape of {other_name}[{k}], {tuple(other.shape)}, got {tuple(matrix.shape)}"
            )


def check_number(name: str, value: object, low: float, high: float, wanted: str) -> None:
    """Raises TypeError unless ``value`` is a real number, ValueError unless ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {wanted}, got {value}")


def adaptive_tolerance_of(use_adaptive_criteria: bool, adaptive_update_tolerance: float | None) -> float | None:
    """The tolerance of the adaptive criterion, or None where it is off; raises where it is on without a tolerance."""
    if not use_adaptive_criteria:
        return None
    if adaptive_update_tolerance is None:
        raise ValueError("adaptive_update_tolerance must be a number >= 0 when use_adaptive_criteria is set, got None")
    check_number("adaptive_update_tolerance", adaptive_update_tolerance, 0, 1, "between 0 and 1")
    return adaptive_update_tolerance


def check_power_iter_steps(value: object) -> None:
    """Raises unless ``value`` is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"power_iter_steps must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"power_iter_steps must be at least 1, got {value}")
