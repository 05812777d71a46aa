"""Orthonormal columns by Gram-Schmidt, for products ``K Q`` of bases that have hardly turned.

Such products have nearly orthogonal columns, and one pass of Gram-Schmidt by blocks is then nearly as good as
Householder's QR, with three quarters of the FLOPs, nearly all of them in large products
(``benchmarks/refresh_cost.py``). Columns of which a pass leaves little are taken out of the others again ("twice is
enough", Giraud et al., 2005). What comes of it is checked; the caller must have another way for matrices that fail.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from emerging_optimizers.precision import add_matrix_product_, matrix_product

#: So many columns, by the number of rows, are orthonormalised among themselves, by Cholesky QR; wider blocks are halved
#: (``benchmarks/panels.py``).
PANELS = {1: 32, 512: 64}

#: The most that one pass may magnify rounding in a column, which is the inverse of the share of the column that it
#: leaves. Above it the panel has another pass.
GROWTH = 12.0
PASSES = 5

#: Below this cosine between a column of ``K Q`` and that of ``Q``, one pass leaves so little of the column that it will
#: need another. Gram-Schmidt pays while no more than this share of the columns has turned so far.
COSINE, TURNED = 0.2, 0.125

#: Columns so much shorter than the longest (in units of the dtype's precision) are rounding, and as such point
#: anywhere: they seldom need another pass. No more than this share of the columns may be rounding.
ROUNDING, ROUNDED = 8.0, 0.5

#: How far from orthonormal a result may be: ``norm(Q^T Q - I)`` (Frobenius), in units of the dtype's precision and of
#: the square root of the number of rows. Householder's QR comes to about 8.
DEPARTURE = 128.0
PROBES = 4


def hardly_turned(quotients: Tensor, norms: Tensor) -> Tensor:
    """Whether few columns of ``K Q`` have turned far from those of ``Q``, (B,).

    Args:
        quotients: ``diag(Q^T K Q)``, (B, d).
        norms: Of the columns of ``K Q``, (B, d).
    """
    count = norms.shape[-1]
    rounded = norms <= ROUNDING * torch.finfo(norms.dtype).eps * norms.amax(-1, keepdim=True)
    turned = (quotients < COSINE * norms) & ~rounded
    usable = ((norms > 0) & norms.isfinite() & quotients.isfinite()).all(-1)
    return usable & (turned.sum(-1) <= TURNED * count) & (rounded.sum(-1) <= ROUNDED * count)


def orthonormalise_(stack: Tensor) -> Tensor:
    """Replaces each matrix by its orthonormal factor ``Q``, where ``R`` has a positive diagonal.

    Args:
        stack: (B, d, d), columns of unit length. Overwritten.

    Returns:
        Which are orthonormal, (B,); the others are of no use.
    """
    done = torch.ones(len(stack), dtype=torch.bool, device=stack.device)
    size = stack.shape[-1]
    panel = [width for rows, width in PANELS.items() if rows <= size][-1]
    _orthonormalise_block_(stack, 0, size, panel, done)
    return done & (_departure(stack) <= DEPARTURE * sqrt(size) * torch.finfo(stack.dtype).eps)


def _orthonormalise_block_(stack: Tensor, start: int, stop: int, panel: int, done: Tensor) -> None:
    """The columns from ``start`` to ``stop``, out of which the earlier ones have been taken."""
    if stop - start <= panel:
        _orthonormalise_panel_(stack, start, stop, done)
        return
    middle = start + -(-(stop - start) // (2 * panel)) * panel
    _orthonormalise_block_(stack, start, middle, panel, done)
    _take_out_(stack[..., start:middle], stack[..., middle:stop])
    _orthonormalise_block_(stack, middle, stop, panel, done)


def _orthonormalise_panel_(stack: Tensor, start: int, stop: int, done: Tensor) -> None:
    growth = _cholesky_qr_(stack[..., start:stop])
    if float(growth.max()) <= GROWTH:
        return
    again = ~(growth <= GROWTH)
    # One matrix at a time: each has other columns, and its result must not depend on the others.
    for index in (again.any(-1) & done).nonzero().flatten().tolist():
        done[index] = _another_pass_(stack[index : index + 1], start, stop, again[index])


def _another_pass_(matrix: Tensor, start: int, stop: int, again: Tensor) -> bool:
    """Takes these columns of a panel out of all others so far until that loses little of them, and whether it did."""
    panel = matrix[..., start:stop]
    for _ in range(PASSES - 1):
        columns = panel[..., again]
        _take_out_(matrix[..., :start], columns)
        _take_out_(panel[..., ~again], columns)
        growth = _cholesky_qr_(columns)
        panel[..., again] = columns
        again = again.masked_scatter(again, ~(growth <= GROWTH))
        if not bool(again.any()):
            return True
    return False


def _take_out_(earlier: Tensor, later: Tensor) -> None:
    """``later <- later - earlier earlier^T later``."""
    if earlier.shape[-1]:
        add_matrix_product_(later, earlier, matrix_product(earlier.mT, later), alpha=-1)


def _cholesky_qr_(panel: Tensor) -> Tensor:
    """Orthonormalises the columns of (B, r, c).

    Returns:
        By how much that magnified an error in each of them, (B, c). Infinite from the first one on that depends on
        those before it, as far as rounding shows; these stay as they are.
    """
    gram = matrix_product(panel.mT, panel)
    root, info = torch.linalg.cholesky_ex(gram, upper=True)
    failed = info.nonzero().flatten().tolist() if bool(info.any()) else []
    for index in failed:
        done = int(info[index]) - 1
        root[index, :, done:] = 0
        root[index].diagonal()[done:] = 1
    identity = torch.eye(panel.shape[-1], dtype=panel.dtype, device=panel.device)
    inverse = torch.linalg.solve_triangular(root, identity.expand_as(root), upper=True)
    panel.copy_(matrix_product(panel, inverse))
    growth: Tensor = torch.linalg.vector_norm(inverse, dim=-2)
    for index in failed:
        growth[index, int(info[index]) - 1 :] = torch.inf
    return growth


def _departure(stack: Tensor) -> Tensor:
    """About ``norm(Q^T Q - I)`` of each matrix, (B,): the mean square of what a few random vectors lose."""
    generator = torch.Generator(stack.device).manual_seed(0)
    probes = torch.randn(PROBES, stack.shape[-1], generator=generator, dtype=stack.dtype, device=stack.device)
    probes = probes.expand(len(stack), -1, -1)
    lost = matrix_product(matrix_product(probes, stack.mT), stack) - probes  # as rows, in 0.5 to 0.7 of the time
    departure: Tensor = torch.linalg.matrix_norm(lost) / sqrt(PROBES)
    return departure
