"""Symmetric matrices kept as one triangle: d (d + 1) / 2 numbers instead of d^2, without an index of which goes where.

The lower triangle of a d x d matrix is folded into a rectangle, as LAPACK's "rectangular full packed" format does
(Gustavson et al., ACM TOMS 37(2), 2010). With h = ceil(d / 2), the first h columns keep their place, a row lower where
d is even; the triangle that is left, of the last d - h columns, is transposed into the free corner above them::

    d = 4      a . . .         f h          d = 5      a . . . .         a g h
               b c . .         a i                     b c . . .         b c i
               d e f .   ->    b c                     d e j . .   ->    d e j
               g j h i         d e                     k l m g .         k l m
                               g j                     n o p h i         n o p

So packing is a few copies of blocks. A table of indices would do it in one gather and take twice the memory that it
saves, for every d that occurs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_size(size: int) -> int:
    """The number of entries in one triangle of a matrix of this size, its diagonal included."""
    return size * (size + 1) // 2


def pack(matrices: Tensor, out: Tensor | None = None) -> Tensor:
    """The lower triangles of a stack of symmetric matrices.

    Args:
        matrices: (B, d, d). What is above the diagonal is not looked at.
        out: Where to write them, (B, d (d + 1) / 2), contiguous; None: a new tensor.

    Returns:
        (B, d (d + 1) / 2), in the dtype of ``matrices`` or of ``out``.
    """
    count, size = matrices.shape[:2]
    packed = matrices.new_empty(count, packed_size(size)) if out is None else out
    half, rest, offset = (size + 1) // 2, size // 2, 1 - size % 2
    rectangle = packed.view(count, size + offset, half)
    rectangle[:, offset:].copy_(matrices[:, :, :half])
    corner = rectangle[:, :rest, half - rest :]
    corner.copy_(torch.where(_upper(corner), matrices[:, half:, half:].mT, corner))
    return packed


def unpack(packed: Tensor, size: int) -> Tensor:
    """The symmetric matrices whose lower triangles :func:`pack` kept.

    Args:
        packed: (B, d (d + 1) / 2), contiguous.
        size: d.

    Returns:
        (B, d, d), exactly symmetric, a new tensor.
    """
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
