"""From a parameter's shape to the shape that SOAP works on and the axes it preconditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """How one tensor is treated.

    Attributes:
        shape: The working shape: the parameter's own, or with adjacent axes folded.
        axes: The axes of ``shape`` that have a Kronecker factor and an eigenbasis. Empty: plain AdamW.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]


@lru_cache(maxsize=4096)
def layout_of(shape: tuple[int, ...], max_precond_dim: int, precondition_1d: bool, merge_dims: bool) -> Layout:
    """Decides the working shape and the preconditioned axes of a parameter.

    Args:
        shape: The parameter's shape.
        max_precond_dim: An axis longer than this has no factor.
        precondition_1d: Whether a tensor of one axis is preconditioned.
        merge_dims: Whether adjacent axes are folded (:func:`merge_axes`).

    Returns:
        The layout. ``axes`` is empty for a 0-D or empty tensor, for a 1-D one unless ``precondition_1d``, and
        where every axis is longer than ``max_precond_dim``.

    Example:
        >>> layout_of((64, 32, 3, 3), 10000, False, True)
        Layout(shape=(64, 288), axes=(0, 1))
        >>> layout_of((50257, 768), 10000, False, False)
        Layout(shape=(50257, 768), axes=(1,))
        >>> layout_of((768,), 10000, False, False)
        Layout(shape=(768,), axes=())
    """
    working = merge_axes(shape, max_precond_dim) if merge_dims else shape
    if prod(working) == 0 or len(working) == 0 or (len(working) == 1 and not precondition_1d):
        return Layout(working, ())
    return Layout(working, tuple(k for k, size in enumerate(working) if size <= max_precond_dim))


def layout_for(parameter: Tensor, group: Mapping[str, Any]) -> Layout:
    """:func:`layout_of` for a parameter and the options of its group."""
    return layout_of(tuple(parameter.shape), group["max_precond_dim"], group["precondition_1d"], group["merge_dims"])


def merge_axes(shape: Sequence[int], max_precond_dim: int) -> tuple[int, ...]:
    """Folds adjacent axes while their product stays within ``max_precond_dim``, keeping at least two.

    Folding starts at the last axis, so a convolution (out, in, kh, kw) becomes (out, in * kh * kw): the matrix by
    which it multiplies its patches. Folding from the first axis would mix output with input channels, and folding
    to a single axis would turn a small convolution into a vector, which is not preconditioned at all.

    Args:
        shape: The parameter's shape.
        max_precond_dim: The largest product of folded axes.

    Returns:
        The folded shape; ``shape`` itself where there are fewer than three axes.

    Example:
        >>> merge_axes((16, 8, 3, 3), 10000)
        (16, 72)
        >>> merge_axes((16, 8, 3, 3), 50)
        (16, 8, 9)
    """
    folded = list(shape)
    axis = len(folded) - 1
    while axis >= 1 and len(folded) > 2:
        if folded[axis - 1] * folded[axis] <= max_precond_dim:
            folded[axis - 1 : axis + 1] = [folded[axis - 1] * folded[axis]]
        axis -= 1
    return tuple(folded)
