"""Kronecker factors and projections, on stacks of tensors.

Conventions. Every tensor has a leading stack dimension ``B``: a gradient stack ``G`` is (B, d_1, .., d_N), a
factor ``K_k`` and a basis ``Q_k`` are (B, d_k, d_k). Axis numbers count the gradient's own axes from 0 and do not
include the stack. A list of factors or bases has one entry per axis, ``None`` where the axis has none: its basis is
the identity. Columns of ``Q_k`` are eigenvectors. Nothing here knows the optimizer; nothing reads a device value on
the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from emerging_optimizers.precision import fp32_matmul_precision


def unfold(stack: Tensor, axis: int) -> Tensor:
    """The matricisation of every tensor of the stack along ``axis``: (B, d_axis, product of the other axes)."""
    return stack.movedim(1 + axis, 1).flatten(2) if stack.dim() > 2 else stack.unsqueeze(2)


def project(stack: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """Contracts axis k with the columns of ``Q_k`` for every k: ``Q_1^T G Q_2`` for a matrix."""
    return _contract(stack, bases)


def project_back(stack: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """The inverse of :func:`project` for orthonormal bases: ``Q_1 G Q_2^T`` for a matrix."""
    return _contract(stack, [None if basis is None else basis.mT for basis in bases])


def _contract(stack: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Contracts every axis with the rows of its matrix, if it has one."""
    if stack.dim() != 3:
        return _contract_in_turn(stack, matrices)
    left, right = matrices
    # The smaller one first: what comes between is then read in the larger product, the way it was written.
    if left is not None and (right is None or left.shape[-1] <= right.shape[-1]):
        stack = left.mT @ stack
        return stack if right is None else stack @ right
    if right is not None:
        stack = stack @ right
    return stack if left is None else left.mT @ stack


def _contract_in_turn(stack: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Contracts the first axis with each matrix in turn and puts it at the end, so that N turns restore the order."""
    for matrix in matrices:
        if matrix is None:
            stack = stack.movedim(1, -1)
            continue
        rest = stack.shape[2:]
        columns = stack.reshape(stack.shape[0], stack.shape[1], -1)
        stack = (columns.mT @ matrix).reshape(stack.shape[0], *rest, matrix.shape[-1])
    return stack


def update_factors(factors: Sequence[Tensor | None], grad: Tensor, beta: float, finite: Tensor | None = None) -> None:
    """``K_k <- beta K_k + (1 - beta) unfold_k(G) unfold_k(G)^T``, in place (SOAP, arXiv 2409.11321, algorithm 3).

    Args:
        factors: ``K_k`` per axis.
        grad: ``G``, zero where ``finite`` is false.
        beta: The decay.
        finite: Boolean (B,); a factor stays as it is where it is false.
    """
    for axis, factor in enumerate(factors):
        if factor is not None:
            _decay_and_add_gram_(factor, unfold(grad, axis), beta, finite)


def update_factors_kl(
    factors: Sequence[Tensor | None],
    grad: Tensor,
    beta: float,
    bases: Sequence[Tensor | None] | None,
    eps: float,
    eigval_exp: float = -1.0,
    finite: Tensor | None = None,
) -> None:
    """KL-Shampoo's factors (arXiv 2509.03378), in place: every other axis is whitened before the Gram product.

    ``K_k <- beta K_k + (1 - beta) unfold_k(G) (x_{j != k} S_j) unfold_k(G)^T`` with
    ``S_j = Q_j diag(max(lam_j, eps)**eigval_exp) Q_j^T / d_j`` and ``lam_j = diag(Q_j^T K_j Q_j)``, all read before
    any factor moves. ``G S G^T`` is formed as ``H H^T`` with ``H = G S**(1/2)``, which keeps the factor positive
    semi-definite in floating point. Where an entry of that product would overflow, which takes a gradient that is far
    outside of its history, the factor stays as it is.

    Args:
        factors: ``K_k`` per axis. An axis without one takes part with ``S_j = I / d_j``.
        grad: ``G``, zero where ``finite`` is false.
        beta: The decay.
        bases: ``Q_k`` per axis. ``None``: there is no basis or no history yet, ``S_j = I / d_j`` for every axis.
        eps: The smallest eigenvalue used.
        eigval_exp: The exponent of the eigenvalues.
        finite: Boolean (B,); a factor stays as it is where it is false.
    """
    roots: list[Tensor | None] = []
    for axis, factor in enumerate(factors):
        basis = None if bases is None else bases[axis]
        if factor is None or basis is None:
            roots.append(None)
        else:
            # eps may round to 0 in float32.
            eigenvalues = rayleigh_quotients(factor, basis).clamp_min(max(eps, torch.finfo(factor.dtype).tiny))
            roots.append(basis * eigenvalues.pow(eigval_exp / 2).unsqueeze(-2))

    whitened = []
    for axis, factor in enumerate(factors):
        if factor is not None:
            others = [None if k == axis else root for k, root in enumerate(roots)]
            scale = sqrt(grad[0].numel() / grad.shape[1 + axis])
            whitened.append(unfold(_contract(grad, others), axis) / scale)
    for factor in factors:
        if factor is not None:
            matrix = whitened.pop(0)
            bounded = torch.linalg.vector_norm(matrix, dim=(-2, -1)) < sqrt(torch.finfo(matrix.dtype).max)
            matrix = torch.where(bounded.view(-1, 1, 1), matrix, 0.0)
            _decay_and_add_gram_(factor, matrix, beta, bounded if finite is None else bounded & finite)


def rayleigh_quotients(factor: Tensor, basis: Tensor) -> Tensor:
    """``diag(Q^T K Q)`` as (B, d), the eigenvalues of ``K`` where ``Q`` is its eigenbasis.

    Always in full float32: in TensorFloat-32 the small eigenvalues drown in the rounding of the large ones.
    """
    with fp32_matmul_precision("highest"):
        return column_products(basis, factor @ basis)


def column_products(left: Tensor, right: Tensor) -> Tensor:
    """The inner product of each column with the other's, (B, d), of (B, d, d)."""
    return (left * right).sum(-2)


def _decay_and_add_gram_(factor: Tensor, matrix: Tensor, beta: float, finite: Tensor | None) -> None:
    """``factor <- beta factor + (1 - beta) matrix matrix^T`` for (B, d, d) and (B, d, r), where ``finite`` is true."""
    weight: float | Tensor = 1 - beta
    if finite is not None:
        weight = weight * finite.to(factor.dtype).view(-1, 1, 1)
    factor.lerp_(matrix @ matrix.mT, weight)
