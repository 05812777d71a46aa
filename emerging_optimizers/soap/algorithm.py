"""The algorithm: one step of parameters that are worked on together, in the order of ``docs/algorithm.md``.

The functions read a parameter group's options and hand plain numbers to the kernels (``kronecker``, ``refresh``,
``adam``), which know neither groups nor state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.adam import adam_direction, raise_to_floor
from emerging_optimizers.mixin import WeightDecayMixin, scalar_lr
from emerging_optimizers.soap import kronecker, state
from emerging_optimizers.soap.buckets import NO_AXIS, Run, stretches
from emerging_optimizers.soap.incidents import report_skipped_gradient
from emerging_optimizers.soap.options import name_of
from emerging_optimizers.soap.refresh import along_stack, refresh_eigenbasis_and_moments
from emerging_optimizers.soap.timing import Timetable


class Update(NamedTuple):
    """What a step subtracts from weights, but for the learning rate.

    Attributes:
        run: Whose.
        direction: Joined; zero where ``mask`` is false.
        finite: (B,), false for those that are to stay as they are; None: for none of them.
    """

    run: Run
    direction: Tensor
    finite: Tensor | None


def updates_of(run: Run, group: dict[str, Any], timetable: Timetable, skipped: list[Tensor]) -> Iterator[Update]:
    """One step of neighbours in a bucket, except of those whose gradient cannot be used, up to the weights.

    Args:
        run: The neighbours.
        group: Their parameter group.
        timetable: Which bases are refreshed.
        skipped: Where only the device knows, gets whether each gradient was skipped, (B,).

    Yields:
        Updates for the caller to apply; none for a gradient that was seen to be unusable.
    """
    run.counters("step").add_(1)
    grad = run.join(run.grads)
    if group["maximize"]:
        grad = -grad
    if group["weight_decay_method"] == "l2" and not run.bucket.gathered:
        grad = WeightDecayMixin.regularized_grad(grad, run.join(run.tensors), group)
    if group["nonfinite"] != "skip":
        yield _update(run, grad, group, timetable)
        return
    finite = is_usable(run.rough_norms(grad), group["state_dtype"])
    if state.masks_on(grad.device):
        run.counters("skipped_steps").add_(~finite)
        skipped.append(~finite)
        yield _update(run, torch.where(run.spread(finite), grad, 0.0), group, timetable, finite)
        return
    usable = finite.tolist()
    for start, stop in stretches(usable):
        part, part_grad = run.part(start, stop), run.part_of(grad, start, stop)
        if usable[start]:
            yield _update(part, part_grad, group, timetable)
        else:
            part.counters("skipped_steps").add_(1)
            for index, one in zip(part.indices, part.split(part_grad), strict=True):
                report_skipped_gradient(name_of(group, index), one, run.layout is None and run.bucket.kind.pieces)


def _update(
    run: Run, grad: Tensor, group: dict[str, Any], timetable: Timetable, finite: Tensor | None = None
) -> Update:
    """Steps 2 to 8 of the algorithm for neighbours in a bucket.

    Args:
        run: The neighbours.
        grad: Their gradients, joined; zero where ``finite`` is false.
        group: Their parameter group.
        timetable: Which bases are refreshed.
        finite: (B,), false for those that are to stay as they are.
    """
    bases: list[Tensor | None] | None = None
    projected = grad
    if run.layout is not None:
        _update_factors(run, grad, group, finite)
        if _refresh_if_due(run, group, timetable, finite):
            bases = run.matrices("Q")
            projected = kronecker.project(grad, bases)
    exp_avg = run.moment("exp_avg")
    mask = None if finite is None else run.spread(finite)
    direction = adam_direction(
        projected,
        exp_avg,
        run.moment("exp_avg_sq"),
        step=run.step + 1,
        betas=group["betas"],
        eps=group["eps"],
        correct_bias=group["correct_bias"],
        use_nesterov=group["use_nesterov"],
        finite=mask,
    )
    run.keep("exp_avg", exp_avg)
    if bases is not None:
        direction = kronecker.project_back(direction, bases)
    if group["max_update_rms"] > 0:
        direction = direction * run.spread(rms_scale(run.norms(direction), run.sizes(), group["max_update_rms"]))
    return Update(run, direction, finite)


def apply(update: Update, group: dict[str, Any]) -> None:
    """Steps 5 and 9: decays the weights and subtracts the update. 16-bit weights are rounded once."""
    run, direction, finite = update
    if finite is None and all(tensor.dtype == direction.dtype for tensor in run.tensors):
        _move_(run.tensors, run.split(direction), group)
    else:
        weights = run.join(run.tensors).clone()
        _move_([weights], [direction], group, None if finite is None else run.spread(finite))
        torch._foreach_copy_(run.tensors, run.split(weights))


def apply_to_piece(weight: Tensor, direction: Tensor, moves: Tensor, group: dict[str, Any]) -> None:
    """:func:`apply` to a piece of a weight whose update was computed elsewhere.

    Args:
        weight: The piece.
        direction: Its part of the update, in the working dtype; zero where the weight is to stay as it is.
        moves: 1, or 0 where the weight is to stay as it is; 0-D.
        group: The parameter group.
    """
    working = weight.to(direction.dtype)
    _move_([working], [direction], group, moves)
    if working is not weight:
        weight.copy_(working)


def _move_(
    weights: list[Tensor], directions: list[Tensor], group: dict[str, Any], finite: Tensor | None = None
) -> None:
    """Steps 5 and 9: decays each weight and subtracts ``lr U``, in place; ``U`` is lost.

    Args:
        weights: ``W``, in the working dtype.
        directions: ``U``, zero where ``finite`` is false.
        group: The parameter group.
        finite: Broadcasts against each; where it is false, or 0, the weights stay as they are.
    """
    if finite is None:
        WeightDecayMixin.decay_weights_(weights, group)
    else:
        for weight in weights:
            WeightDecayMixin.decay_weight_(weight, group, finite)
    _subtract_(weights, directions, group)


def _subtract_(weights: list[Tensor], directions: list[Tensor], group: dict[str, Any]) -> None:
    """``W <- W - lr U`` for each, in place; ``U`` is lost. In one pass where the rate is a number."""
    lr = scalar_lr(group["lr"], weights[0])
    if isinstance(lr, Tensor):
        torch._foreach_mul_(directions, lr)
        lr = 1
    torch._foreach_sub_(weights, directions, alpha=lr)


def _update_factors(run: Run, grad: Tensor, group: dict[str, Any], finite: Tensor | None) -> None:
    """Steps 2 and 3: decays the Kronecker factors and adds this gradient's."""
    beta = group["shampoo_beta"] if group["shampoo_beta"] >= 0 else group["betas"][1]
    correct = group["correct_shampoo_beta_bias"]
    if group["correct_bias"] if correct is None else correct:
        beta = 1 - (1 - beta) / (1 - beta ** (run.step + 1))
    factors = run.matrices("GG")
    if group["use_kl_shampoo"]:
        # Without a basis the others are the identity, so that 1 / eps never enters the first update.
        bases = run.matrices("Q") if run.based else None
        kronecker.update_factors_kl(factors, grad, beta, bases, group["eps"], finite=finite)
    else:
        kronecker.update_factors(factors, grad, beta, finite)
    run.keep_matrices("GG", factors)


def _refresh_if_due(run: Run, group: dict[str, Any], timetable: Timetable, finite: Tensor | None) -> bool:
    """Step 4: new eigenbases, with the moments carried into them, where they are due.

    Args:
        run: The neighbours.
        group: Their parameter group.
        timetable: Which bases are refreshed.
        finite: (B,), false for those that are to stay as they are.

    Returns:
        Whether any of the neighbours has a basis now; ``Q`` is the identity for one that has none.
    """
    layout = run.layout or NO_AXIS
    if run.based:
        due = [timetable.due_axes(index, layout, run.step) for index in run.indices]
        for start, stop in stretches(due):
            if due[start]:
                part = None if finite is None else finite[start:stop]
                _refresh(run.part(start, stop), group, due[start], part)
        return True
    if run.step < group["adam_warmup_steps"]:
        return False
    # A zero factor has no eigenbasis: layers behind a zero-initialised one, and tensors whose first gradient was
    # skipped, wait for their first gradient. eigh waits for the device anyway. A tensor's factors are zero together.
    alive = run.kept(f"GG_{layout.axes[0]}").flatten(1).any(1)
    wanted = (alive if finite is None else alive & finite).tolist()
    for start, stop in stretches(wanted):
        if wanted[start]:
            _refresh(run.part(start, stop), group, layout.axes, None)
    return any(wanted)


def _refresh(run: Run, group: dict[str, Any], axes: tuple[int, ...], finite: Tensor | None) -> None:
    """Refreshes these axes' bases of all neighbours, except where ``finite`` is false."""
    exp_avg, exp_avg_sq, bases = run.moment("exp_avg"), run.moment("exp_avg_sq"), run.matrices("Q")
    factors = run.matrices("GG")

    def where_finite(new: Tensor, old: Tensor) -> Tensor:
        return new if finite is None else torch.where(along_stack(finite, old), new, old)

    refreshed = refresh_eigenbasis_and_moments(
        factors,
        bases if run.based else None,
        exp_avg,
        exp_avg_sq,
        axes=axes,
        use_eigh=group["use_eigh"],
        adaptive_tolerance=group["adaptive_update_tolerance"] if group["use_adaptive_criteria"] else None,
        power_iter_steps=group["power_iter_steps"],
        second_moment_refresh=group["second_moment_refresh"],
        matmul_precision=group["qr_fp32_matmul_prec"],
    )
    new_exp_avg_sq = raise_to_floor(refreshed.exp_avg_sq, refreshed.exp_avg, run.step, group["betas"])
    run.keep("exp_avg", where_finite(refreshed.exp_avg, exp_avg))
    run.keep("exp_avg_sq", where_finite(new_exp_avg_sq, exp_avg_sq))
    pairs = zip(refreshed.bases, bases, strict=True)
    run.keep_matrices("Q", [None if n is None or o is None else where_finite(n, o) for n, o in pairs])
    run.counters("failed_refreshes").add_(refreshed.failed if finite is None else refreshed.failed & finite)
    run.counters("refresh_step").fill_(run.step + 1)


def is_usable(norms: Tensor, state_dtype: torch.dtype | None) -> Tensor:
    """Whether gradients with these norms are finite and so are the sums of their squares: boolean, like ``norms``.

    An entry that overflows when squared would set its second moment to Inf and freeze its weight for good. So would a
    float64 gradient a first moment that is kept in ``state_dtype``, if it overflowed that; half of its range leaves
    room for the rounding of a basis.
    """
    limit = torch.finfo(norms.dtype).max ** 0.5
    if state_dtype is not None:
        limit = min(limit, torch.finfo(state_dtype).max / 2)
    usable: Tensor = norms < limit  # false for NaN too
    return usable


def rms_scale(norms: Tensor, sizes: Tensor, max_rms: float) -> Tensor:
    """``min(1, max_rms / (rms(U) + 1e-7))`` (Adafactor, arXiv 1804.04235, section 6), for each norm."""
    scale: Tensor = (max_rms / (norms / sizes.to(norms.dtype).sqrt() + 1e-7)).clamp(max=1.0)
    return scale
