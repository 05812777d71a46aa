"""Three ways to decay weights, as a mixin for any ``torch.optim.Optimizer``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

WEIGHT_DECAY_METHODS = ("decoupled", "independent", "l2")


class WeightDecayMixin:
    """Weight decay that reads ``lr``, ``weight_decay`` and ``weight_decay_method`` from a parameter group.

    ========================  ==========================================  =====================================
    ``weight_decay_method``   what happens                                 source
    ========================  ==========================================  =====================================
    ``"decoupled"``           ``W <- W - lr * weight_decay * W``           AdamW, arXiv 1711.05101, algorithm 2
    ``"independent"``         ``W <- W - weight_decay * W``                the same without the learning rate
    ``"l2"``                  ``G <- G + weight_decay * W``                gradient of the regularised loss
    ========================  ==========================================  =====================================

    A learning rate of 0 decays nothing, also with "independent": frameworks take such a step to make an optimizer
    create its state.

    An optimizer calls :meth:`validate_weight_decay` where it validates a group, :meth:`regularized_grad` before
    it uses a gradient and :meth:`decay_weight_` before it applies an update. Each does nothing where the group's
    method is another one, so both are called without asking which method is set.

    Example:
        >>> weight, group = torch.ones(1), {"lr": 0.5, "weight_decay": 0.1, "weight_decay_method": "decoupled"}
        >>> grad = WeightDecayMixin.regularized_grad(torch.zeros(1), weight, group)
        >>> WeightDecayMixin.decay_weight_(weight, group)
        >>> grad, weight
        (tensor([0.]), tensor([0.9500]))
    """

    @staticmethod
    def validate_weight_decay(weight_decay: float, weight_decay_method: str) -> None:
        """Checks the two options.

        Raises:
            TypeError: ``weight_decay`` is not a number.
            ValueError: ``weight_decay`` is negative or not finite, or ``weight_decay_method`` is unknown.
        """
        if isinstance(weight_decay, bool) or not isinstance(weight_decay, int | float):
            raise TypeError(f"Invalid weight_decay value: {weight_decay!r} (wanted a number >= 0)")
        if not 0 <= weight_decay <= sys.float_info.max:  # no float holds an integer larger than that
            raise ValueError(f"Invalid weight_decay value: {weight_decay} (wanted a finite number >= 0)")
        known: object = weight_decay_method
        if not isinstance(known, str) or known not in WEIGHT_DECAY_METHODS:
            raise ValueError(
                f"Invalid weight_decay_method: {weight_decay_method!r} (wanted one of {WEIGHT_DECAY_METHODS})"
            )

    @staticmethod
    def regularized_grad(grad: Tensor, weight: Tensor, group: Mapping[str, Any]) -> Tensor:
        """The gradient that the optimizer should use: ``G + weight_decay * W`` for "l2", else ``grad`` itself.

        Args:
            grad: ``G``. Never modified.
            weight: ``W``, of ``grad``'s shape.
            group: The parameter group.
        """
        if group["weight_decay_method"] == "l2" and group["weight_decay"] != 0:
            penalty: Tensor = group["weight_decay"] * weight
            return grad + penalty
        return grad

    @staticmethod
    def decay_weight_(weight: Tensor, group: Mapping[str, Any], finite: Tensor | None = None) -> None:
        """Shrinks ``weight`` in place for "decoupled" and "independent"; does nothing for "l2".

        Args:
            weight: ``W``.
            group: The parameter group; its ``lr`` may be a number or a tensor of one element.
            finite: 0-D boolean tensor on the weight's device; where it is false the weight stays as it is.
        """
        working = weight.to(torch.promote_types(weight.dtype, torch.float32))
        WeightDecayMixin.decay_weights_([working], group, None if finite is None else finite.to(working.dtype).view(1))
        if working is not weight:
            weight.copy_(working)

    @staticmethod
    def decay_weights_(weights: list[Tensor], group: Mapping[str, Any], moves: Tensor | None = None) -> None:
        """:meth:`decay_weight_` for B weights of one dtype, float32 or float64, on one device at once.

        Args:
            weights: ``W``, each changed in place.
            group: The parameter group.
            moves: (B,), in the weights' dtype; 1, or 0 where a weight stays as it is. None: all move.
        """
        if group["weight_decay_method"] == "l2" or group["weight_decay"] == 0:
            return
        rate = _decay_rate(group, weights[0])
        torch._foreach_mul_(weights, 1 - rate if moves is None else list((1 - rate * moves).unbind()))


def _decay_rate(group: Mapping[str, Any], like: Tensor) -> float | Tensor:
    """The fraction that "decoupled" or "independent" decay takes off a weight."""
    lr = scalar_lr(group["lr"], like)
    scale = lr
    if group["weight_decay_method"] == "independent":
        scale = (lr != 0).to(like.dtype) if isinstance(lr, Tensor) else float(lr != 0)
    rate: float | Tensor = group["weight_decay"] * scale
    return rate


def scalar_lr(lr: float | Tensor, like: Tensor) -> float | Tensor:
    """A learning rate that multiplies ``like``: a number as it is, a tensor of one element as a 0-D tensor.

    A tensor on the CPU stays there: torch takes it as it is, and copying it to a GPU would wait for the copy.
    """
    if not isinstance(lr, Tensor):
        return lr
    scalar = lr.reshape(()).to(like.dtype)
    return scalar if scalar.device.type == "cpu" else scalar.to(like.device)
