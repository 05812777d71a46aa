"""The refresh of a stack's eigenbases, and the moments carried into them (conventions: ``linalg``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import expm1, log
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.soap.linalg import (
    Stack,
    along,
    largest_diagonal,
    orthonormal_columns,
    project,
    project_back,
    rayleigh_quotients,
    sorted_eigenvectors,
    where_stacked,
)
from emerging_optimizers.soap.precision import fp32_matmul_precision


def refresh(s: Stack, axes: Sequence[int], o: Mapping[str, Any], finite: Tensor | None = None) -> None:
    """New eigenbases along ``axes``, and the moments carried into them.

    ``M`` is carried as a vector: out with the old bases, in with the new ones. ``V`` has no exact image. By
    rank, slot i belongs to the i-th largest eigendirection before and after. At the switch from Adam warm-up there is
    no rank, and the Kronecker estimate replaces it. Rotating ``V`` by the elementwise square of the rotation looks
    natural and trains worse than either.

    Args:
        s: The stack, changed in place.
        axes: Which bases; the first time those of all axes that have a factor.
        o: The options of the parameter group.
        finite: (B,), the tensors to change; None: all.
    """
    V, refreshed, new = s.V, None, {}
    failed = torch.zeros(len(s.M), dtype=torch.bool, device=s.M.device)
    for axis in axes:
        new[axis], order, renewed, stayed = new_bases(s.K[axis], s.Q[axis], s.based, o)
        if order is not None:
            V = V.gather(1 + axis, along(order, V, axis).expand_as(V))
        if renewed is not None:
            refreshed = renewed if refreshed is None else refreshed | renewed
        failed |= stayed
    # Only along the axes that were refreshed: the other bases would take it out and in again.
    old = {axis: s.bases[axis] for axis in axes if s.based}
    M = where_stacked(refreshed, project(project_back(s.M, old), new), s.M)
    if not s.based or o["second_moment_refresh"] == "kronecker":
        V = where_stacked(refreshed, kronecker_estimate(s.V, s.K, {**s.Q, **new}), V)
    V = raise_to_floor(V, M, s.step - 1, o["betas"])
    for target, tensor in ((s.M, M), (s.V, V), *((s.Q[axis], new[axis]) for axis in axes)):
        target.copy_(where_stacked(finite, tensor, target))
    s.failed += failed if finite is None else failed & finite


def first_bases(s: Stack, o: Mapping[str, Any], finite: Tensor | None = None) -> None:
    """The first eigenbases, of those tensors that have had a gradient other than zero.

    A zero factor has no eigenbasis: layers behind a zero-initialised one, and tensors whose first gradient was skipped,
    wait. A tensor's factors are zero together.
    """
    ready = next(iter(s.K.values())).flatten(1).any(1)
    if finite is not None:
        ready &= finite
    on_host = ready.cpu()  # eigh waits for the device anyway
    if bool(on_host.any()):
        refresh(s, list(s.K), o, None if bool(on_host.all()) else ready)
        s.refresh_step[on_host] = s.step
        s.based = True


def new_bases(
    K: Tensor, Q: Tensor, based: bool, o: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """New bases along one axis.

    By ``eigh`` the first time and with ``use_eigh``; otherwise the columns are sorted by Rayleigh quotient, and then
    ``Q <- qr(K Q).Q`` (SOAP, arXiv 2409.11321, algorithm 4).

    Args:
        K: The factors, (B, d, d).
        Q: The present bases, likewise; eigenbases only if ``based``.
        based: Whether this is not the first time.
        o: The options.

    Returns:
        The bases, (B, d, d); the order (B, d) in which ``V`` must be taken along this axis, None where it stays as it
        is (``eigh``: old and new bases are sorted); (B,), whether the adaptive criterion did not leave the basis alone,
        None: all are new; and (B,), whether a decomposition failed for good and the last good basis stayed.
    """
    if not based or (o["use_eigh"] and not o["use_adaptive_criteria"]):
        bases, failed = sorted_eigenvectors(K, Q)
        return bases, None, None, failed
    # One product serves the eigenvalues, the criterion and the power step. Full float32: in TensorFloat-32 the small
    # eigenvalues drown in the rounding of the large ones.
    with fp32_matmul_precision("highest"):
        KQ = K @ Q
        quotients = (Q * KQ).sum(-2)
    holds = None
    if o["use_adaptive_criteria"]:
        holds = basis_holds(K, quotients, o["adaptive_update_tolerance"])
        if bool(holds.all()):
            return Q, None, ~holds, ~holds
    order = None
    if o["use_eigh"]:
        bases, failed = sorted_eigenvectors(K, Q)
    else:
        order = quotients.argsort(dim=-1, descending=True, stable=True)
        columns = order.unsqueeze(-2).expand_as(Q)
        # Where this fails the old basis stays, in that order, to which V is permuted all the same.
        bases, failed = orthonormal_columns(KQ.gather(-1, columns), Q.gather(-1, columns))
        for _ in range(o["power_iter_steps"] - 1):
            with fp32_matmul_precision(o["qr_fp32_matmul_prec"]):
                KQ = K @ bases
            bases, failed_again = orthonormal_columns(KQ, bases)
            failed = failed | failed_again
    if holds is None:
        return bases, order, None, failed
    if order is not None:
        order = where_stacked(holds, torch.arange(K.shape[-1], device=K.device).expand_as(order), order)
    return where_stacked(holds, Q, bases), order, ~holds, failed & ~holds


def basis_holds(K: Tensor, quotients: Tensor, tolerance: float) -> Tensor:
    """Whether ``norm(diag(Q^T K Q)) >= (1 - tolerance) * frobenius(K)``, per matrix, (B,) (arXiv 2506.03595).

    The left side is the part of ``K`` that is diagonal in the basis; equality means that ``Q`` diagonalises ``K``.
    """
    # Without the scale, squares of small or large entries leave float32, and 0 >= 0 would hold for ever.
    scale = largest_diagonal(K)
    diagonal_part: Tensor = torch.linalg.vector_norm(quotients / scale.squeeze(-1), dim=-1)
    holds: Tensor = diagonal_part >= (1 - tolerance) * torch.linalg.matrix_norm(K / scale)
    return holds


def kronecker_estimate(V: Tensor, K: Mapping[int, Tensor], Q: Mapping[int, Tensor]) -> Tensor:
    """``V_ij <- sum(V) lam_i mu_j / sum(lam_i mu_j)`` with the factors' Rayleigh quotients in ``Q``, clamped at 0.

    An axis without a factor contributes the marginal of ``V`` along it. ``V`` itself stays where an axis has nothing to
    say (all zero).
    """
    axes = range(1, V.dim())
    estimate = V.sum(tuple(axes), keepdim=True)
    for axis in range(V.dim() - 1):
        if axis in K:
            weights = rayleigh_quotients(K[axis], Q[axis]).clamp_min(0)
        else:
            weights = V.sum([a for a in axes if a != 1 + axis])
        estimate = estimate * along(weights / weights.sum(-1, keepdim=True), V, axis)
    # A factor or moment of zeros gives 0 / 0.
    return where_stacked(estimate.isfinite().flatten(1).all(1), estimate, V)


def raise_to_floor(V: Tensor, M: Tensor, updates: int, betas: tuple[float, float]) -> Tensor:
    """``max(V, M**2 / c)``: the second moment, raised to the least that Adam could have beside this first moment.

    In one fixed basis ``M_i = sum_j (1-b1) b1**j g_(i-j)`` and ``V_i = sum_j (1-b2) b2**j g_(i-j)**2``, so by
    Cauchy-Schwarz ``M_i**2 <= c_i V_i`` with ``c_i = (1-b1)**2 / (1-b2) * sum_(j<i) (b1**2 / b2)**j``, and the next
    step preserves it. A change of basis breaks it: ``M`` is carried exactly and ``V`` only by rank, so that a slot can
    hold a large ``M`` over a ``V`` that is still zero, and the next step is ``M / eps``. With the published defaults
    that happens to tensors whose factors have low rank, in their first steps.

    ``updates``, ``i >= 0``, is how many updates the moments have seen, at most.

    Example:
        >>> raise_to_floor(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), 1, (0.9, 0.95))
        tensor([5., 5.])
    """
    beta1, beta2 = betas
    if updates == 0 or beta2 == 0:
        return V
    if beta1**2 / beta2 < 1e-300:  # also where the square underflows
        terms = 1.0
    else:
        log_ratio = log(beta1**2 / beta2)
        if updates * log_ratio > 700:  # exp overflows: c is so large that there is no floor to speak of
            return V
        terms = expm1(updates * log_ratio) / expm1(log_ratio) if log_ratio else float(updates)
    return torch.maximum(V, M.square() * ((1 - beta2) / ((1 - beta1) ** 2 * terms)))
