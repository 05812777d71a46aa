"""Eigenbases of stacks of Kronecker factors: exact decomposition and orthogonal iteration.

Conventions. A stack of factors ``K`` and of bases ``Q`` is (B, d, d); columns of ``Q`` are eigenvectors, the one with
the largest eigenvalue first. Arithmetic is in the dtype of ``K``, float32 or float64, and never at reduced
matmul precision except where an argument says so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.precision import fp32_matmul_precision
from emerging_optimizers.soap.decompositions import eigenvectors, orthonormal_columns
from emerging_optimizers.soap.kronecker import column_products

#: Diagonal shift before an eigendecomposition, relative to the largest diagonal entry.
EIGH_SHIFT = {torch.float32: 1e-7, torch.float64: 1e-15}


class RefreshedBases(NamedTuple):
    """What :func:`refresh_bases` returns for one axis of a stack.

    Attributes:
        bases: (B, d, d).
        order: (B, d), by which the second moment must be permuted along this axis; None where it stays (on the
            ``eigh`` path, where old and new bases are sorted).
        refreshed: (B,), false where the adaptive criterion left the basis alone.
        failed: (B,), whether a decomposition failed for good and the last good basis was kept.
    """

    bases: Tensor
    order: Tensor | None
    refreshed: Tensor
    failed: Tensor


def eigh_bases(factors: Tensor, last_good: Tensor | None = None, shift: float | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvectors by ``torch.linalg.eigh``, in descending order of eigenvalue.

    The factor is divided by its largest diagonal entry first. An absolute shift of 1e-7 would erase the float32
    digits of every factor much smaller than one, which is what gradients of 1e-4 make.

    Args:
        factors: ``K``, (B, d, d), symmetric.
        last_good: Bases (B, d, d) to keep where no decomposition succeeds; default: the identity.
        shift: Relative diagonal shift; default :data:`EIGH_SHIFT`.

    Returns:
        ``Q``, (B, d, d), for a diagonal factor exactly the permutation that sorts the diagonal; and whether the
        decomposition failed and ``last_good`` was kept, (B,).
    """
    size = factors.shape[-1]
    diagonal = factors.diagonal(dim1=-2, dim2=-1)
    identity = torch.eye(size, dtype=factors.dtype, device=factors.device)
    shifted = factors / _largest_diagonal(factors) + identity * (EIGH_SHIFT[factors.dtype] if shift is None else shift)
    bases, failed = eigenvectors(shifted, identity.expand_as(factors) if last_good is None else last_good)

    is_diagonal = factors.count_nonzero((-2, -1)) == diagonal.count_nonzero(-1)
    permutation = identity[:, torch.argsort(diagonal, dim=-1, descending=True, stable=True)].movedim(1, 0)
    return torch.where(is_diagonal.view(-1, 1, 1), permutation, bases), failed & ~is_diagonal


def _largest_diagonal(factors: Tensor) -> Tensor:
    """The largest diagonal entry of each matrix, (B, 1, 1), or 1 where it is 0: the scale to divide by."""
    largest = factors.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
    return torch.where(largest > 0, largest, 1.0).view(-1, 1, 1)


def orthogonal_iteration(
    factors: Tensor,
    bases: Tensor,
    products: Tensor,
    quotients: Tensor,
    power_iter_steps: int = 1,
    matmul_precision: str = "high",
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the columns by Rayleigh quotient, then runs ``Q <- qr(K Q).Q`` (SOAP, arXiv 2409.11321, algorithm 4).

    Args:
        factors: ``K``, (B, d, d).
        bases: ``Q``, the present orthonormal bases, (B, d, d).
        products: ``K Q``, (B, d, d).
        quotients: ``diag(Q^T K Q)``, (B, d).
        power_iter_steps: Number of power steps.
        matmul_precision: Precision of ``K Q`` from the second power step on.

    Returns:
        The new bases (B, d, d), the order (B, d) in which the old columns were taken, and whether a QR failed, (B,).
        Where the first one failed the bases are the old ones, in that order: what is aligned with the columns may be
        permuted all the same.
    """
    order = torch.argsort(quotients, dim=-1, descending=True, stable=True)
    columns = order.unsqueeze(-2)
    bases, failed = orthonormal_columns(
        torch.take_along_dim(products, columns, -1), torch.take_along_dim(bases, columns, -1)
    )
    for _ in range(power_iter_steps - 1):
        with fp32_matmul_precision(matmul_precision):
            products = factors @ bases
        bases, failed_again = orthonormal_columns(products, bases)
        failed = failed | failed_again
    return bases, order, failed


def basis_holds(factors: Tensor, quotients: Tensor, tolerance: float) -> Tensor:
    """Whether ``norm(diag(Q^T K Q)) >= (1 - tolerance) * frobenius(K)``, per matrix, (B,) (arXiv 2506.03595).

    The left side is the part of ``K`` that is diagonal in the basis; equality means that ``Q`` diagonalises ``K``.

    Args:
        factors: ``K``, (B, d, d).
        quotients: ``diag(Q^T K Q)``, (B, d).
        tolerance: The tolerance.
    """
    # Without the scale, squares of small or large entries leave float32, and 0 >= 0 would hold for ever.
    scale = _largest_diagonal(factors)
    diagonal_part: Tensor = torch.linalg.vector_norm(quotients / scale.squeeze(-1), dim=-1)
    whole: Tensor = torch.linalg.matrix_norm(factors / scale)
    return diagonal_part >= (1 - tolerance) * whole


def refresh_bases(
    factors: Tensor,
    bases: Tensor | None,
    *,
    use_eigh: bool = False,
    adaptive_tolerance: float | None = None,
    power_iter_steps: int = 1,
    matmul_precision: str = "high",
    shift: float | None = None,
) -> RefreshedBases:
    """New bases for one axis of a stack.

    Args:
        factors: ``K``, (B, d, d).
        bases: The present ``Q``; None for the first refresh, which always uses ``eigh``.
        use_eigh: Decompose instead of iterating.
        adaptive_tolerance: Leave a matrix alone where :func:`basis_holds` at this tolerance; None: never.
        power_iter_steps: See :func:`orthogonal_iteration`.
        matmul_precision: See :func:`orthogonal_iteration`.
        shift: See :func:`eigh_bases`.
    """
    count, size = factors.shape[:2]
    refreshed = torch.ones(count, dtype=torch.bool, device=factors.device)
    if bases is None or (use_eigh and adaptive_tolerance is None):
        new_bases, failed = eigh_bases(factors, last_good=bases, shift=shift)
        return RefreshedBases(new_bases, None, refreshed, failed)
    # One product serves the eigenvalues, the criterion and the power step. Full float32: in TensorFloat-32 the small
    # eigenvalues drown in the rounding of the large ones.
    with fp32_matmul_precision("highest"):
        products = factors @ bases
        quotients = column_products(bases, products)
    if adaptive_tolerance is not None:
        refreshed = ~basis_holds(factors, quotients, adaptive_tolerance)
        if not bool(refreshed.any()):
            return RefreshedBases(bases, None, refreshed, refreshed)
    order = None
    if use_eigh:
        new_bases, failed = eigh_bases(factors, last_good=bases, shift=shift)
    else:
        new_bases, order, failed = orthogonal_iteration(
            factors, bases, products, quotients, power_iter_steps, matmul_precision
        )
    if adaptive_tolerance is not None:
        new_bases = torch.where(refreshed.view(-1, 1, 1), new_bases, bases)
        failed = failed & refreshed
        if order is not None:
            unchanged = torch.arange(size, device=factors.device).expand(count, size)
            order = torch.where(refreshed.view(-1, 1), order, unchanged)
    return RefreshedBases(new_bases, order, refreshed, failed)
