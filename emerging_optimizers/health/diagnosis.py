"""From measurements to words: what is wrong with a tensor's state, and what to try.

Every threshold is a constant here, with the reason or the measurement that it rests on. The measurements are those of
``docs/health.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from emerging_optimizers.health.results import FactorHealth, TensorHealth

#: The largest ``max |Q^T Q - I|`` by the dtype of the bases. float32: seen up to 1.8e-6 in the races; the reliability
#: suite allows 1e-5 on extreme gradients and 1e-4 after 20,000 refreshes. bfloat16: columns whose entries are each
#: rounded by half a unit in the last place, 2**-8, are off by at most 2**-7 = 0.008; seen up to 0.0056. float64: as
#: far above its rounding as float32's limit.
ORTHOGONALITY = {"float64": 1e-11, "float32": 1e-4, "bfloat16": 0.02}

#: Measured at every tenth step, just before a refresh: after their first 100 steps 14 races at frequency 10 (digits and
#: pinn: two seeds of plain, "kronecker" and KL; charlm: plain and KL) were never above 0.52, and two at frequency 50
#: never above 0.57. With the refresh frozen after the first step, seven races had a matrix at 0.90 or more in every 50
#: steps from then on. An axis of two directions cannot exceed 0.71 while its factor has rank one.
STALE_RESIDUAL = 0.7

#: Younger states are not asked: healthy races are at up to 0.99 in their first 50 steps and 0.83 in the next, because
#: the first basis was that of a single gradient.
SETTLED_STEPS = 100

#: Ages above so many refresh periods. An age is below one period, and below two where a refresh met a skipped gradient.
OVERDUE_PERIODS = 2.0

#: Before so many steps a zero gradient or a large update may be the start: behind a zero-initialised layer the first
#: gradients are zero, and a zero-initialised weight is for n steps only n updates large.
YOUNG_STEPS = 20

#: Of a matrix. Without gradients ``M / sqrt(V)`` shrinks by 0.92 a step at the default betas, so it is there 145 steps
#: after the last one. In four races of digits and pinn no matrix was below 0.016. Vectors are not asked: the bias of
#: attention keys has no gradient but rounding, by the softmax's invariance, and was at 3e-4.
STOPPED_DIRECTION = 1e-5

#: The largest RMS that ``M / sqrt(V)`` can have is 1.2 at the default betas and 7.3 at (0.9, 0.999), by Cauchy and
#: Schwarz; in the races it was at most 1.02.
LARGEST_DIRECTION = 10.0

#: A step as large as the weight forgets the weight. In the races at most 0.14 (charlm, step 10), and 0.054 later than
#: step 20.
LARGEST_UPDATE_RATIO = 1.0

#: An update below so many machine epsilons of the weight: a weight moves if it changes by a quarter to half of one, so
#: that here only weights far below the root mean square still move. Only weights of 16 bits are asked: there it lasts,
#: while float32 gets there when a schedule ends at 0.
LOST_UPDATE = 1 / 16
MACHINE_EPSILON = {"bfloat16": torch.finfo(torch.bfloat16).eps, "float16": torch.finfo(torch.float16).eps}

#: A few skipped steps cost a few steps. More than one in a hundred is a cause that lasts.
SKIPPED_SHARE = 0.01
SKIPPED_STEPS = 3

#: The severity of what has no measure, and the largest.
FAR_BEYOND = 1e6


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with one tensor.

    Attributes:
        kind: Which of the problems, as "stale basis".
        name: The tensor.
        what: What is wrong, with the figure.
        advice: What to try.
        severity: How far beyond its threshold, from 1 to 1e6.
    """

    kind: str
    name: str
    what: str
    advice: str
    severity: float

    def __str__(self) -> str:
        return f"{self.name}: {self.kind}: {self.what} {self.advice}"


def diagnose(tensor: TensorHealth) -> Iterator[Finding]:
    """What is wrong with a tensor, if anything."""
    if not tensor.finite:
        yield Finding(
            "state not finite",
            tensor.name,
            "NaN or Inf in the moments, factors or bases.",
            'Go back to an earlier checkpoint. Leave nonfinite="skip" on; if it was on, the file or the memory is bad.',
            FAR_BEYOND,
        )
        return
    usable_steps = tensor.step - tensor.skipped_steps
    if tensor.skipped_steps >= SKIPPED_STEPS and tensor.skipped_steps > SKIPPED_SHARE * tensor.step:
        yield Finding(
            "skipped steps",
            tensor.name,
            f"{tensor.skipped_steps} of {tensor.step} gradients had NaN or Inf or overflowed, and were not used.",
            "Lower the learning rate, clip gradients, or look for a log or a division near 0 in the loss; with float16 "
            "use a GradScaler.",
            tensor.skipped_steps / (SKIPPED_SHARE * tensor.step),
        )
    if tensor.dead:
        if usable_steps >= YOUNG_STEPS:
            yield Finding(
                "dead gradient",
                tensor.name,
                f"every gradient of {usable_steps} steps was zero: nothing is learnt here.",
                "Look for a detached or unused branch, a dead activation or a zero-initialised layer in front of it; "
                "set requires_grad=False if that is meant.",
                FAR_BEYOND,
            )
        return
    for factor in tensor.factors:
        yield from _diagnose_factor(tensor, factor)
    if (tensor.periods or 0.0) > OVERDUE_PERIODS:
        yield Finding(
            "refresh overdue",
            tensor.name,
            f"the last refresh was {tensor.age} steps ago, and one is due every {tensor.frequency}.",
            "Every gradient at a refresh was skipped (see skipped steps), or the saved state is not of these options.",
            (tensor.periods or 0.0) / OVERDUE_PERIODS,
        )
    if tensor.failed_refreshes > 0:
        yield Finding(
            "failed refreshes",
            tensor.name,
            f"{tensor.failed_refreshes} times a decomposition failed in every way, and the last good basis stayed.",
            "Look for gradients many orders of magnitude apart and clip them; the log has the first error.",
            1.0 + tensor.failed_refreshes,
        )
    if usable_steps >= YOUNG_STEPS:
        yield from _diagnose_update(tensor)


def _diagnose_factor(tensor: TensorHealth, factor: FactorHealth) -> Iterator[Finding]:
    if factor.orthogonality is not None and factor.orthogonality > ORTHOGONALITY[factor.basis_dtype]:
        limit = ORTHOGONALITY[factor.basis_dtype]
        yield Finding(
            "basis not orthogonal",
            tensor.name,
            f"axis {factor.axis}: max |Q^T Q - I| is {factor.orthogonality:.1e}, and at most {limit:.0e} should come "
            f"from {factor.basis_dtype} bases.",
            "The state was changed or damaged: load an earlier checkpoint. If it happened in training, set "
            "use_eigh=True and report it.",
            min(factor.orthogonality / limit, FAR_BEYOND),
        )
    elif _is_settled(tensor) and (factor.residual or 0.0) > STALE_RESIDUAL:
        residual = factor.residual or 0.0
        adaptive = " or adaptive_update_tolerance" if tensor.adaptive else ""
        yield Finding(
            "stale basis",
            tensor.name,
            f"axis {factor.axis}: {residual:.0%} of the factor's norm is off the diagonal, {tensor.age} steps "
            "after the last refresh.",
            f"Refresh more often: lower precondition_frequency{_now(tensor)}{adaptive}; or raise shampoo_beta or the "
            "batch size, so that the factor turns more slowly.",
            residual / STALE_RESIDUAL,
        )


def _is_settled(tensor: TensorHealth) -> bool:
    return tensor.step - tensor.skipped_steps >= SETTLED_STEPS


def _now(tensor: TensorHealth) -> str:
    return "" if tensor.frequency is None else f" (now {tensor.frequency})"


def _diagnose_update(tensor: TensorHealth) -> Iterator[Finding]:
    direction, ratio = tensor.direction_rms, tensor.update_ratio
    if direction is None:
        return
    if direction < STOPPED_DIRECTION and len(tensor.shape) > 1:
        yield Finding(
            "gradient stopped",
            tensor.name,
            f"the update is {direction:.1e} of a learning rate: the gradient has been zero lately, or is below eps.",
            "Look for a branch that is no longer used; if gradients are this small by nature, scale the loss up or "
            "lower eps.",
            min(STOPPED_DIRECTION / max(direction, 1e-30), FAR_BEYOND),
        )
    elif direction > LARGEST_DIRECTION:
        yield Finding(
            "second moment too small",
            tensor.name,
            f"the update is {direction:.1e} learning rates per weight, more than Adam can give.",
            "The second moment was changed or damaged: load an earlier checkpoint, or lower the learning rate for a "
            "few hundred steps.",
            min(direction / LARGEST_DIRECTION, FAR_BEYOND),
        )
    elif ratio is not None and len(tensor.shape) > 1 and ratio > LARGEST_UPDATE_RATIO:
        yield Finding(
            "update too large",
            tensor.name,
            f"one step changes the weight by {ratio:.1f} times its own root mean square.",
            "Lower the learning rate, warm it up, or set max_update_rms.",
            min(ratio / LARGEST_UPDATE_RATIO, FAR_BEYOND),
        )
    elif ratio is not None and tensor.weight_dtype in MACHINE_EPSILON and tensor.learning_rate > 0:
        least = LOST_UPDATE * MACHINE_EPSILON[tensor.weight_dtype]
        if ratio < least:
            yield Finding(
                "update lost in rounding",
                tensor.name,
                f"one step changes the weight by {ratio:.1e} of its size, and {tensor.weight_dtype} resolves "
                f"{MACHINE_EPSILON[tensor.weight_dtype]:.1e}: most weights do not move.",
                "Keep the weights in float32 (autocast for the products), or raise the learning rate.",
                min(least / max(ratio, 1e-30), FAR_BEYOND),
            )


def concern(tensor: TensorHealth) -> float:
    """How near a tensor is to the nearest threshold, or how far beyond: above 1 where something is wrong."""
    nearest = max((finding.severity for finding in diagnose(tensor)), default=0.0)
    shares = [nearest]
    for factor in tensor.factors if nearest == 0 else ():
        if factor.orthogonality is not None:
            shares.append(factor.orthogonality / ORTHOGONALITY[factor.basis_dtype])
        if factor.residual is not None:
            shares.append(min(factor.residual / STALE_RESIDUAL, 1.0))
    return max(shares)
