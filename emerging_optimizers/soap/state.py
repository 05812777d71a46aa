"""A parameter's state: which axes have a Kronecker factor, and which tensors it has, of what shape and dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: State that the host reads at every step and that is therefore on the CPU.
HOST_KEYS = ("step", "refresh_step")

#: What ``state_dtype`` may be besides None.
STATE_DTYPES = (torch.float32, torch.bfloat16)


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

    There are none for a 0-D or empty tensor, for a 1-D one unless ``precondition_1d``, and where every axis is longer
    than ``max_precond_dim``.

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

    Example:
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


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of arithmetic, and of state unless an option says otherwise: float64 if any tensor is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def new_state(held: Tensor, layout: Layout, pack_factors: bool, state_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state of a parameter before its first step. Its keys depend on the layout alone.

    ``step`` and ``refresh_step`` (the value of ``step`` after the last refresh that was due, 0 without a basis) are on
    the CPU, where the host reads them without waiting, and float64: a float32 counter stands still at 2**24, and with
    it the refreshes. ``Q_k`` is the identity until there is a basis. ``exp_avg_sq`` and the factors are never in
    ``state_dtype``: where no gradient comes they change by ``1 - beta`` of themselves in a step, and bfloat16 rounds a
    change of less than 0.2% away.

    Args:
        held: The parameter, or what this process has of it.
        layout: Its layout.
        pack_factors: Keep ``GG_k`` as one triangle, (d (d + 1) / 2,) instead of (d, d).
        state_dtype: Of ``exp_avg`` and ``Q_k``; None: the working dtype.
    """
    like: dict[str, Any] = {"dtype": working_dtype(held), "device": held.device}
    kept = {**like, "dtype": state_dtype or like["dtype"]}
    on_host: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    counter: dict[str, Any] = {"dtype": torch.int64, "device": held.device}
    state = {
        "step": torch.zeros((), **on_host),
        "exp_avg": torch.zeros(held.shape, **kept),
        "exp_avg_sq": torch.zeros(held.shape, **like),
        "skipped_steps": torch.zeros((), **counter),
    }
    if layout.axes:
        state["refresh_step"] = torch.zeros((), **on_host)
        state["failed_refreshes"] = torch.zeros((), **counter)
    for axis in layout.axes:
        size = layout.shape[axis]
        state[f"GG_{axis}"] = torch.zeros(packed_size(size) if pack_factors else (size, size), **like)
        state[f"Q_{axis}"] = torch.eye(size, **kept)
    return state


def meta_state(parameter: Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state that a parameter must have under these options, as meta tensors: keys, whole shapes and dtypes."""
    meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return new_state(meta, layout_for(parameter, options), options["pack_factors"], options["state_dtype"])


# Symmetric matrices as one triangle: d (d + 1) / 2 numbers, without an index of which goes where. The lower triangle is
# folded into a rectangle, as LAPACK's "rectangular full packed" format does (Gustavson et al., ACM TOMS 37(2), 2010).
# With h = ceil(d / 2), the first h columns keep their place, a row lower where d is even; the triangle that is left, of
# the last d - h columns, is transposed into the free corner above them:
#
#     d = 4      a . . .         f h          d = 5      a . . . .         a g h
#                b c . .         a i                     b c . . .         b c i
#                d e f .   ->    b c                     d e j . .   ->    d e j
#                g j h i         d e                     k l m g .         k l m
#                                g j                     n o p h i         n o p
#
# So packing is a few copies of blocks. A table of indices would take twice the memory that it saves.


def packed_size(size: int) -> int:
    """The number of entries in one triangle of a matrix of this size, its diagonal included."""
    return size * (size + 1) // 2


def pack(matrices: Tensor, out: Tensor | None = None) -> Tensor:
    """The lower triangles of symmetric matrices (B, d, d), as (B, d (d + 1) / 2), contiguous, in ``out`` if given."""
    count, size = matrices.shape[:2]
    packed = matrices.new_empty(count, packed_size(size)) if out is None else out
    half, rest, offset = (size + 1) // 2, size // 2, 1 - size % 2
    rectangle = packed.view(count, size + offset, half)
    rectangle[:, offset:].copy_(matrices[:, :, :half])
    corner = rectangle[:, :rest, half - rest :]
    corner.copy_(torch.where(_upper(corner), matrices[:, half:, half:].mT, corner))
    return packed


def unpack(packed: Tensor, size: int) -> Tensor:
    """The matrices (B, d, d), exactly symmetric, whose lower triangles :func:`pack` kept; a new tensor."""
    count = packed.shape[0]
    half, rest, offset = (size + 1) // 2, size // 2, 1 - size % 2
    rectangle = packed.view(count, size + offset, half)
    matrices = packed.new_empty(count, size, size)
    matrices[:, :, :half].copy_(rectangle[:, offset:])
    corner = rectangle[:, :rest, half - rest :]
    matrices[:, half:, half:].copy_(torch.where(_upper(corner), corner, corner.mT))
    top = matrices[:, :half, :half]
    top.copy_(torch.where(_upper(top), top.mT, top))
    matrices[:, :half, half:].copy_(matrices[:, half:, :half].mT)
    return matrices


def _upper(square: Tensor) -> Tensor:
    """True on and above the diagonal, (d, d), for a stack (B, d, d)."""
    return torch.ones(square.shape[1:], dtype=torch.bool, device=square.device).triu_()
