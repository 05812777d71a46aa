"""A basis refresh as a whole: new eigenbases, and Adam's moments carried into them. On stacks (see ``kronecker``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.soap.eigenbasis import refresh_bases
from emerging_optimizers.soap.kronecker import project, project_back, rayleigh_quotients

SECOND_MOMENT_REFRESHES = ("rank", "kronecker")


class Refreshed(NamedTuple):
    """What a refresh returns, as new tensors.

    Attributes:
        bases: ``Q_k`` per axis, (B, d_k, d_k), None where it has no factor.
        exp_avg: ``M``, (B, d_1, .., d_N).
        exp_avg_sq: ``V``, likewise.
        failed: (B,), whether a decomposition failed for good on any axis, where the last good basis was kept.
    """

    bases: list[Tensor | None]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    failed: Tensor


def refresh_eigenbasis_and_moments(
    factors: Sequence[Tensor | None],
    bases: Sequence[Tensor | None] | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    axes: Sequence[int] | None = None,
    use_eigh: bool = False,
    adaptive_tolerance: float | None = None,
    power_iter_steps: int = 1,
    second_moment_refresh: str = "rank",
    matmul_precision: str = "high",
) -> Refreshed:
    """Refreshes the bases of a stack of tensors and moves the moments with them.

    The first moment is a vector and is carried exactly: out with the old bases, in with the new ones. The second
    moment has no exact image. By rank, slot i belongs to the i-th largest eigendirection before and after. At the
    switch from Adam warm-up there is no rank, and :func:`kronecker_second_moment` replaces it. Rotating the second
    moment by the elementwise square of the rotation looks natural and trains worse than either.

    Args:
        factors: ``K_k`` per axis, (B, d_k, d_k) or None.
        bases: ``Q_k`` per axis; None for the first refresh, where the moments are in the original space.
        exp_avg: ``M``, (B, d_1, .., d_N), in the present bases.
        exp_avg_sq: ``V``, likewise.
        axes: The axes whose basis is refreshed; None: all that have a factor.
        use_eigh: Decompose instead of iterating.
        adaptive_tolerance: Leave a factor's basis alone where it holds at this tolerance; None: never.
        power_iter_steps: Power steps of the orthogonal iteration.
        second_moment_refresh: "rank" or "kronecker".
        matmul_precision: Precision of the later power steps; see ``eigenbasis.orthogonal_iteration``.

    Returns:
        The new bases and moments.
    """
    new_bases: list[Tensor | None] = []
    any_refreshed = torch.zeros(exp_avg.shape[0], dtype=torch.bool, device=exp_avg.device)
    any_failed = torch.zeros_like(any_refreshed)
    if all(factor is None for factor in factors):
        return Refreshed([None for _ in factors], exp_avg, exp_avg_sq, any_failed)
    permuted = exp_avg_sq
    turned = [factor is not None and (axes is None or axis in axes) for axis, factor in enumerate(factors)]
    for axis, factor in enumerate(factors):
        if factor is None or not turned[axis]:
            new_bases.append(None if bases is None else bases[axis])
            continue
        axis_result = refresh_bases(
            factor,
            None if bases is None else bases[axis],
            use_eigh=use_eigh,
            adaptive_tolerance=adaptive_tolerance,
            power_iter_steps=power_iter_steps,
            matmul_precision=matmul_precision,
        )
        new_bases.append(axis_result.bases)
        if axis_result.order is not None:
            permuted = _in_order(permuted, axis, axis_result.order)
        any_refreshed |= axis_result.refreshed
        any_failed |= axis_result.failed

    # Only along the axes that were refreshed: the other bases would take it out and in again.
    carried = exp_avg if bases is None else project_back(exp_avg, _where(turned, bases))
    carried = project(carried, _where(turned, new_bases))
    new_exp_avg = carried
    if adaptive_tolerance is not None:
        new_exp_avg = torch.where(along_stack(any_refreshed, exp_avg), carried, exp_avg)
    if bases is None or second_moment_refresh == "kronecker":
        estimate = kronecker_second_moment(exp_avg_sq, factors, new_bases)
        permuted = torch.where(along_stack(any_refreshed, exp_avg), estimate, permuted)
    return Refreshed(new_bases, new_exp_avg, permuted, any_failed)


def kronecker_second_moment(
    exp_avg_sq: Tensor, factors: Sequence[Tensor | None], bases: Sequence[Tensor | None]
) -> Tensor:
    """The Kronecker estimate of the second moment, with the total of the present one.

    ``V_ij <- sum(V) lam_i mu_j / sum(lam_i mu_j)``, where ``lam`` and ``mu`` are the factors' Rayleigh quotients in
    ``bases``, clamped at 0. An axis without a factor contributes the present marginal of ``V`` along it.

    Args:
        exp_avg_sq: ``V``, (B, d_1, .., d_N).
        factors: ``K_k`` per axis or None.
        bases: ``Q_k`` per axis or None, already refreshed.

    Returns:
        The estimate, like ``exp_avg_sq``; ``exp_avg_sq`` itself where an axis has nothing to say (all zero).
    """
    axes = range(1, exp_avg_sq.dim())
    total = exp_avg_sq.sum(tuple(axes), keepdim=True)
    estimate = total
    for axis, (factor, basis) in enumerate(zip(factors, bases, strict=True)):
        if factor is not None and basis is not None:
            weights = rayleigh_quotients(factor, basis).clamp_min(0)
        else:
            others = [a for a in axes if a != 1 + axis]
            weights = exp_avg_sq.sum(others) if others else exp_avg_sq
        share = weights / weights.sum(-1, keepdim=True)
        estimate = estimate * _along(share, axis, exp_avg_sq)
    # A factor or moment of zeros gives 0 / 0.
    usable = estimate.isfinite().flatten(1).all(1)
    return torch.where(along_stack(usable, exp_avg_sq), estimate, exp_avg_sq)


def _where(chosen: Sequence[bool], bases: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [basis if take else None for take, basis in zip(chosen, bases, strict=True)]


def _in_order(stack: Tensor, axis: int, order: Tensor) -> Tensor:
    """``stack`` (B, d_1, .., d_N) with its slices along ``axis`` in the order (B, d_axis)."""
    return torch.take_along_dim(stack, _along(order, axis, stack), 1 + axis)


def _along(values: Tensor, axis: int, like: Tensor) -> Tensor:
    """(B, d_axis) shaped so that it broadcasts against (B, d_1, .., d_N)."""
    shape = [1] * like.dim()
    shape[0], shape[1 + axis] = values.shape
    return values.reshape(shape)


def along_stack(values: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped so that it broadcasts against (B, d_1, .., d_N)."""
    return values.view(-1, *[1] * (like.dim() - 1))
