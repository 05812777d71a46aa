"""Eigenbases of stacks of Kronecker factors: exact decomposition and orthogonal iteration.

Conventions. A stack of factors ``K`` and of bases ``Q`` is (B, d, d); columns of ``Q`` are eigenvectors, the one with
the largest eigenvalue first. Arithmetic is in the dtype of ``K``, float32 or float64, and never at reduced
matmul precision except where an argument says so.
"""

from __future__ import annotations

import logging
from collections import Counter

import torch
from torch import Tensor

from emerging_optimizers.precision import fp32_matmul_precision

logger = logging.getLogger(__name__)

#: Diagonal shift before an eigendecomposition, relative to the largest diagonal entry.
EIGH_SHIFT = {torch.float32: 1e-7, torch.float64: 1e-15}

#: How often ``eigh`` needed help in this process: "float64", "cpu", and "kept" (no decomposition succeeded and the
#: last good basis stayed). Each matrix counts under the last thing that was tried for it.
eigh_fallbacks: Counter[str] = Counter()


def eigh_bases(factors: Tensor, last_good: Tensor | None = None, shift: float | None = None) -> Tensor:
    """Eigenvectors by ``torch.linalg.eigh``, in descending order of eigenvalue.

    The factor is divided by its largest diagonal entry first. An absolute shift of 1e-7 would erase the float32
    digits of every factor much smaller than one, which is what gradients of 1e-4 make.

    Args:
        factors: ``K``, (B, d, d), symmetric.
        last_good: Bases (B, d, d) to keep where no decomposition succeeds; default: the identity.
        shift: Relative diagonal shift; default :data:`EIGH_SHIFT`.

    Returns:
        ``Q``, (B, d, d). For a diagonal factor exactly the permutation that sorts the diagonal.
    """
    size = factors.shape[-1]
    diagonal = factors.diagonal(dim1=-2, dim2=-1)
    identity = torch.eye(size, dtype=factors.dtype, device=factors.device)
    shifted = factors / _largest_diagonal(factors) + identity * (EIGH_SHIFT[factors.dtype] if shift is None else shift)
    bases = _eigenvectors(shifted, identity.expand_as(factors) if last_good is None else last_good)

    is_diagonal = factors.count_nonzero((-2, -1)) == diagonal.count_nonzero(-1)
    permutation = identity[:, torch.argsort(diagonal, dim=-1, descending=True, stable=True)].movedim(1, 0)
    return torch.where(is_diagonal.view(-1, 1, 1), permutation, bases)


def _largest_diagonal(factors: Tensor) -> Tensor:
    """The largest diagonal entry of each matrix, (B, 1, 1), or 1 where it is 0: the scale to divide by."""
    largest = factors.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
    return torch.where(largest > 0, largest, 1.0).view(-1, 1, 1)


def _eigenvectors(matrices: Tensor, last_good: Tensor) -> Tensor:
    """Descending eigenvectors of the stack; a matrix that fails is retried alone, and never stops the run."""
    vectors = _try_eigh(matrices)
    if vectors is not None:
        return vectors
    return torch.stack([_eigenvectors_of_one(m, good) for m, good in zip(matrices, last_good, strict=True)])


def _eigenvectors_of_one(matrix: Tensor, last_good: Tensor) -> Tensor:
    attempts = {
        "": matrix,
        "float64": matrix.double(),
        "cpu": matrix.double().cpu(),
    }
    for name, attempt in attempts.items():
        vectors = _try_eigh(attempt)
        if vectors is not None:
            if name:
                _report_fallback(name, matrix)
            return vectors.to(matrix)
    _report_fallback("kept", matrix)
    return last_good


def _try_eigh(matrices: Tensor) -> Tensor | None:
    """Descending eigenvectors, or None where the decomposition failed or returned something that is not finite."""
    try:
        vectors: Tensor = torch.linalg.eigh(matrices).eigenvectors.flip(-1)
    except RuntimeError:  # torch.linalg.LinAlgError, and the errors of the libraries beneath it
        return None
    return vectors if bool(vectors.isfinite().all()) else None


def _report_fallback(name: str, matrix: Tensor) -> None:
    eigh_fallbacks[name] += 1
    if eigh_fallbacks[name] == 1:
        outcome = {
            "float64": "succeeded in float64",
            "cpu": "succeeded in float64 on the CPU",
            "kept": "failed in float64 and on the CPU too; the last good basis stays",
        }[name]
        logger.warning(
            "eigh of a %d x %d Kronecker factor on %s failed and %s. Further cases are counted, not logged.",
            *matrix.shape,
            matrix.device,
            outcome,
        )


def orthogonal_iteration(
    factors: Tensor, products: Tensor, quotients: Tensor, power_iter_steps: int = 1, matmul_precision: str = "high"
) -> tuple[Tensor, Tensor]:
    """Sorts the columns by Rayleigh quotient, then runs ``Q <- qr(K Q).Q`` (SOAP, arXiv 2409.11321, algorithm 4).

    Args:
        factors: ``K``, (B, d, d).
        products: ``K Q`` for the present, orthonormal bases, (B, d, d).
        quotients: ``diag(Q^T K Q)``, (B, d).
        power_iter_steps: Number of power steps.
        matmul_precision: Precision of ``K Q`` from the second power step on.

    Returns:
        The new bases (B, d, d), and the order (B, d) in which the old columns were taken.
    """
    order = torch.argsort(quotients, dim=-1, descending=True, stable=True)
    bases = _orthonormalize(products.gather(-1, order.unsqueeze(-2).expand_as(products)))
    for _ in range(power_iter_steps - 1):
        with fp32_matmul_precision(matmul_precision):
            products = torch.bmm(factors, bases)
        bases = _orthonormalize(products)
    return bases, order


def _orthonormalize(matrices: Tensor) -> Tensor:
    """``Q`` of the Householder QR of each matrix. ``torch.linalg.qr`` would also spend time on ``R``."""
    orthonormal: Tensor = torch.linalg.householder_product(*torch.geqrf(matrices))
    return orthonormal


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
) -> tuple[Tensor, Tensor | None, Tensor]:
    """New bases for one axis of a stack.

    Args:
        factors: ``K``, (B, d, d).
        bases: The present ``Q``; None for the first refresh, which always uses ``eigh``.
        use_eigh: Decompose instead of iterating.
        adaptive_tolerance: Leave a matrix alone where :func:`basis_holds` at this tolerance; None: never.
        power_iter_steps: See :func:`orthogonal_iteration`.
        matmul_precision: See :func:`orthogonal_iteration`.
        shift: See :func:`eigh_bases`.

    Returns:
        The bases (B, d, d); the order (B, d) by which the second moment must be permuted along this axis, None where
        it stays (on the ``eigh`` path, where both bases are sorted); and whether each matrix was refreshed, (B,).
    """
    count, size = factors.shape[:2]
    refreshed = torch.ones(count, dtype=torch.bool, device=factors.device)
    if bases is None:
        return eigh_bases(factors, shift=shift), None, refreshed
    if use_eigh and adaptive_tolerance is None:
        return eigh_bases(factors, last_good=bases, shift=shift), None, refreshed
    # One product serves the eigenvalues, the criterion and the power step. Full float32: in TensorFloat-32 the small
    # eigenvalues drown in the rounding of the large ones.
    with fp32_matmul_precision("highest"):
        products = torch.bmm(factors, bases)
    quotients = (bases * products).sum(-2)
    if adaptive_tolerance is not None:
        refreshed = ~basis_holds(factors, quotients, adaptive_tolerance)
        if not bool(refreshed.any()):
            return bases, None, refreshed
    order = None
    if use_eigh:
        new_bases = eigh_bases(factors, last_good=bases, shift=shift)
    else:
        new_bases, order = orthogonal_iteration(factors, products, quotients, power_iter_steps, matmul_precision)
    if adaptive_tolerance is not None:
        new_bases = torch.where(refreshed.view(-1, 1, 1), new_bases, bases)
        if order is not None:
            unchanged = torch.arange(size, device=factors.device).expand(count, size)
            order = torch.where(refreshed.view(-1, 1), order, unchanged)
    return new_bases, order, refreshed
