"""The inner Adam update, as one function on tensors.

Symbols: gradient ``G``, first moment ``M``, second moment ``V``, step ``i`` counted from 1. All tensors have one
shape and one dtype; SOAP calls this in the eigenbasis, where ``G`` is the projected gradient, and for a tensor
without a basis it is AdamW's own arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def adam_direction(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
    correct_bias: bool,
    use_nesterov: bool,
    finite: Tensor | None = None,
) -> Tensor:
    """Moves the two moments in place and returns the direction ``U = Mh / (sqrt(Vh) + eps)``.

    Adam, arXiv 1412.6980, algorithm 1; with ``use_nesterov`` the look-ahead of Dozat 2016.

    Args:
        grad: ``G``. Must be finite; where ``finite`` is false it must be zero.
        exp_avg: ``M``, updated in place.
        exp_avg_sq: ``V``, updated in place.
        step: ``i >= 1``, the number of this step.
        betas: Decay of ``M`` and of ``V``.
        eps: Added to the root of ``V``.
        correct_bias: Divide the moments by ``1 - beta**i``.
        use_nesterov: Use ``beta1 M / (1 - beta1**(i+1)) + (1 - beta1) G / (1 - beta1**i)`` for ``Mh``.
        finite: Boolean mask that broadcasts against ``grad``. Where it is false the moments stay as they are and
            the direction is zero. A mask, not a branch, so that a GPU need not be asked for it.

    Returns:
        The direction, a new tensor.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1 if finite is None else finite.to(grad.dtype) * (1 - beta1))
    if finite is None:
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    else:
        exp_avg_sq.lerp_(grad.square(), finite.to(grad.dtype) * (1 - beta2))

    correction1 = 1 - beta1**step if correct_bias else 1.0
    correction2 = 1 - beta2**step if correct_bias else 1.0
    if use_nesterov:
        next_correction1 = 1 - beta1 ** (step + 1) if correct_bias else 1.0
        numerator = (exp_avg * (beta1 / next_correction1)).add_(grad, alpha=(1 - beta1) / correction1)
        direction = numerator.div_((exp_avg_sq / correction2).sqrt_().add_(eps))
    else:
        # Both corrections in the denominator: a pass and a tensor less.
        denominator = exp_avg_sq.sqrt().mul_(correction1 / math.sqrt(correction2)).add_(eps * correction1)
        direction = torch.div(exp_avg, denominator, out=denominator)
    if finite is not None:
        # With eps = 0 an untouched entry is 0 / 0, so the mask must choose rather than multiply.
        direction = torch.where(finite, direction, 0.0)
    return direction


def raise_to_floor(exp_avg_sq: Tensor, exp_avg: Tensor, updates: int, betas: tuple[float, float]) -> Tensor:
    """``max(V, M**2 / c)``: the second moment, raised to the least that Adam could have beside this first moment.

    In one fixed basis ``M_i = sum_j (1-b1) b1**j g_(i-j)`` and ``V_i = sum_j (1-b2) b2**j g_(i-j)**2``, so by
    Cauchy-Schwarz ``M_i**2 <= c_i V_i`` with ``c_i = (1-b1)**2 / (1-b2) * sum_(j<i) (b1**2 / b2)**j``, and the next
    step preserves it. A change of basis breaks it: the first moment is carried exactly and the second only by rank, so
    that a slot can hold a large ``M`` over a ``V`` that is still zero, and the next step is ``M / eps``. With the
    published defaults that happens to tensors whose factors have low rank, in their first steps.

    Args:
        exp_avg_sq: ``V``.
        exp_avg: ``M``, of the same shape.
        updates: ``i >= 0``, how many updates the moments have seen.
        betas: ``(b1, b2)``.

    Returns:
        The raised second moment, a new tensor.

    Example:
        >>> raise_to_floor(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), 1, (0.9, 0.95))
        tensor([5., 5.])
    """
    beta1, beta2 = betas
    if updates == 0 or beta2 == 0:
        return exp_avg_sq
    if beta1**2 / beta2 < 1e-300:  # also where the square underflows
        terms = 1.0
    else:
        log_ratio = math.log(beta1**2 / beta2)
        if updates * log_ratio > 700:  # exp overflows: c is so large that there is no floor to speak of
            return exp_avg_sq
        terms = math.expm1(updates * log_ratio) / math.expm1(log_ratio) if log_ratio else float(updates)
    floor = exp_avg.square().mul_((1 - beta2) / ((1 - beta1) ** 2 * terms))
    return torch.maximum(exp_avg_sq, floor, out=floor)
