"""Eigenbases of a list of Kronecker factors: the documented functions of one tensor.

Each takes a list with one factor per axis, as :func:`~emerging_optimizers.soap.soap.init_kronecker_factors` makes
it; an empty tensor stands for an axis without a factor and yields an empty basis. The arithmetic is that of
``emerging_optimizers.soap.eigenbasis``, on a stack of one and outside of ``torch.autocast``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emerging_optimizers.precision import without_autocast
from emerging_optimizers.soap.checks import (
    adaptive_tolerance_of,
    check_matches,
    check_number,
    check_pairs,
    check_power_iter_steps,
    check_square,
    check_tensor,
)
from emerging_optimizers.soap.eigenbasis import refresh_bases
from emerging_optimizers.soap.state import working_dtype


@without_autocast()
@torch.no_grad()
def get_eigenbasis_eigh(
    kronecker_factor_list: list[Tensor],
    convert_to_float: bool = True,
    eigenbasis_list: list[Tensor] | None = None,
    use_adaptive_criteria: bool = False,
    adaptive_update_tolerance: float | None = None,
    eps: float | None = None,
) -> list[Tensor]:
    """Eigenvectors of every factor by eigendecomposition, columns in descending order of eigenvalue.

    Never fails on a matrix that ``torch.linalg.eigh`` rejects: it is retried in float64, then on the CPU, and then
    the old basis (or the identity) is kept; one warning is logged and ``emerging_optimizers.soap.incidents`` counts.

    Source: the exact decomposition of SOAP, arXiv 2409.11321, algorithm 3; the criterion is that of arXiv 2506.03595.

    Args:
        kronecker_factor_list: One symmetric (d_k, d_k) factor per axis, or an empty tensor. Only the lower triangle
            is read.
        convert_to_float: Return float32. Otherwise bases have their factor's dtype.
        eigenbasis_list: The present bases, needed for the adaptive criterion and kept where no decomposition succeeds.
        use_adaptive_criteria: Return the old basis ``Q`` of a factor ``K`` where
            ``norm(diag(Q^T K Q)) >= (1 - adaptive_update_tolerance) * frobenius(K)``.
        adaptive_update_tolerance: The tolerance of that criterion, in [0, 1].
        eps: Shift of the diagonal before decomposition, relative to the factor's largest diagonal entry. Default
            1e-7 for float32 (and lower) and 1e-15 for float64.

    Returns:
        One orthonormal (d_k, d_k) basis per axis; for a diagonal factor exactly a permutation of the identity.

    Raises:
        TypeError: An argument is not a list of floating-point tensors.
        ValueError: A factor is not square, a list has the wrong length, or the tolerance is missing.

    Example:
        >>> get_eigenbasis_eigh([torch.diag(torch.tensor([1.0, 3.0, 2.0]))])[0]
        tensor([[0., 0., 1.],
                [1., 0., 0.],
                [0., 1., 0.]])
    """
    check_square("kronecker_factor_list", kronecker_factor_list)
    tolerance = adaptive_tolerance_of(use_adaptive_criteria, adaptive_update_tolerance)
    if tolerance is not None and eigenbasis_list is None:
        raise ValueError("eigenbasis_list must be given when use_adaptive_criteria is set, got None")
    if eigenbasis_list is not None:
        check_pairs("eigenbasis_list", eigenbasis_list, "kronecker_factor_list", kronecker_factor_list)
    if eps is not None:
        check_number("eps", eps, 0, torch.finfo(torch.float32).max, "finite and at least 0")
    bases = []
    for k, factor in enumerate(kronecker_factor_list):
        old = None if eigenbasis_list is None else eigenbasis_list[k]
        basis, _ = _refresh_one(factor, old, use_eigh=True, adaptive_tolerance=tolerance, shift=eps)
        bases.append(basis.to(torch.float32 if convert_to_float else factor.dtype))
    return bases


@without_autocast()
@torch.no_grad()
def get_eigenbasis_qr(
    kronecker_factor_list: list[Tensor],
    eigenbasis_list: list[Tensor],
    exp_avg_sq: Tensor,
    convert_to_float: bool = True,
    use_adaptive_criteria: bool = False,
    adaptive_update_tolerance: float | None = None,
    power_iter_steps: int = 1,
) -> tuple[list[Tensor], Tensor]:
    """One round of orthogonal iteration for every factor.

    ``lam = diag(Q^T K Q)``; the columns of ``Q``, and ``exp_avg_sq`` along that axis, are sorted by descending
    ``lam``; then ``power_iter_steps`` times ``Q <- qr(K Q).Q``.

    Source: SOAP, arXiv 2409.11321, algorithm 4; the criterion is that of arXiv 2506.03595.

    Args:
        kronecker_factor_list: One symmetric (d_k, d_k) factor per axis, or an empty tensor.
        eigenbasis_list: The present orthonormal bases, shaped like the factors.
        exp_avg_sq: Adam's second moment in these bases, (d_1, .., d_N). Not modified.
        convert_to_float: Return float32 bases. Otherwise bases have their factor's dtype.
        use_adaptive_criteria: Leave a basis, and ``exp_avg_sq`` along its axis, alone where
            ``norm(lam) >= (1 - adaptive_update_tolerance) * frobenius(K)``.
        adaptive_update_tolerance: The tolerance of that criterion, in [0, 1].
        power_iter_steps: Number of power steps, at least 1.

    Returns:
        The bases and the re-ordered second moment.

    Raises:
        TypeError: An argument is not a (list of) floating-point tensor(s), or ``power_iter_steps`` no integer.
        ValueError: Shapes or lengths disagree, or an option is out of range.

    Example:
        >>> factor = torch.diag(torch.tensor([1.0, 2.0]))
        >>> (basis,), exp_avg_sq = get_eigenbasis_qr([factor], [torch.eye(2)], torch.tensor([0.1, 0.2]))
        >>> basis.abs(), exp_avg_sq
        (tensor([[0., 1.],
                [1., 0.]]), tensor([0.2000, 0.1000]))
    """
    check_square("kronecker_factor_list", kronecker_factor_list)
    check_pairs("eigenbasis_list", eigenbasis_list, "kronecker_factor_list", kronecker_factor_list)
    check_tensor("exp_avg_sq", exp_avg_sq)
    check_matches("kronecker_factor_list", kronecker_factor_list, exp_avg_sq.shape, "exp_avg_sq")
    check_power_iter_steps(power_iter_steps)
    tolerance = adaptive_tolerance_of(use_adaptive_criteria, adaptive_update_tolerance)
    bases = []
    for k, (factor, old) in enumerate(zip(kronecker_factor_list, eigenbasis_list, strict=True)):
        basis, order = _refresh_one(
            factor, old, use_eigh=False, adaptive_tolerance=tolerance, power_iter_steps=power_iter_steps
        )
        bases.append(basis.to(torch.float32 if convert_to_float else factor.dtype))
        if order is not None:
            exp_avg_sq = exp_avg_sq.index_select(k, order)
    return bases, exp_avg_sq


def _refresh_one(
    factor: Tensor,
    old: Tensor | None,
    *,
    use_eigh: bool,
    adaptive_tolerance: float | None,
    power_iter_steps: int = 1,
    shift: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The basis of one factor, empty for an empty one, and the order of its columns, None where nothing moves."""
    if factor.numel() == 0:
        return factor, None
    dtype = working_dtype(factor)
    refreshed = refresh_bases(
        factor.to(dtype).unsqueeze(0),
        None if old is None else old.to(dtype).unsqueeze(0),
        use_eigh=use_eigh,
        adaptive_tolerance=adaptive_tolerance,
        power_iter_steps=power_iter_steps,
        shift=shift,
    )
    return refreshed.bases[0].contiguous(), None if refreshed.order is None else refreshed.order[0]
