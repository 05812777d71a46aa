"""The algorithm: one step of parameters that are worked on together, in the order of ``docs/architecture.md``.

The functions read a parameter group's options and hand plain numbers to the kernels (``kronecker``, ``refresh``,
``adam``), which know neither groups nor state.
"""

from __future__ import annotations

from typing import Any

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


def step_run(run: Run, group: dict[str, Any], timetable: Timetable, skipped: list[Tensor]) -> None:
    """One step of neighbours in a bucket, except of those whose gradient cannot be used.

    Args:
        run: The neighbours.
        group: Their parameter group.
        timetable: Which bases are refreshed.
        skipped: Where only the device knows, gets whether each gradient was skipped, (B,).
    """
    run.counters("step").add_(1)
    grad = run.join([parameter.grad for parameter in run.parameters])  # type: ignore[misc]
    if group["maximize"]:
        grad = -grad
    if group["weight_decay_method"] == "l2":
        grad = WeightDecayMixin.regularized_grad(grad, run.join(run.parameters), group)
    if group["nonfinite"] != "skip":
        _update(run, grad, group, timetable)
        return
    finite = is_usable(run.norms(grad), group["state_dtype"])
    if state.masks_on(grad.device):
        run.counters("skipped_steps").add_(~finite)
        skipped.append(~finite)
        _update(run, torch.where(run.spread(finite), grad, 0.0), group, timetable, finite)
        return
    usable = finite.tolist()
    for start, stop in stretches(usable):
        part, part_grad = run.part(start, stop), run.part_of(grad, start, stop)
        if usable[start]:
            _update(part, part_grad, group, timetable)
        else:
            part.counters("skipped_steps").add_(1)
            for index, one in zip(part.indices, part.split(part_grad), strict=True):
                report_skipped_gradient(name_of(group, index), one)


def _update(run: Run, grad: Tensor, group: dict[str, Any], timetable: Timetable, finite: Tensor | None = None) -> None:
    """Steps 2 to 9 of the algorithm for neighbours in a bucket.

    Args:
        run: The neighbours.
        grad: Their gradients, joined; zero where ``finite`` is false.
        group: Their parameter group.
        timetable: Which bases are refreshed.
        finite: (B,), false for those that are to stay as they are.
    """
    mask = None if finite is None else run.spread(finite)
    bases: list[Tensor | None] | None = None
    if run.layout is not None:
        _update_factors(run, grad, group, finite)
        if _refresh_if_due(run, group, timetable, finite):
            bases = run.matrices("Q")
            grad = kronecker.project(grad, bases)
    exp_avg = run.moment("exp_avg")
    update = adam_direction(
        grad,
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
        update = kronecker.project_back(update, bases)
    if group["max_update_rms"] > 0:
        update = update * run.spread(rms_scale(run.norms(update), run.sizes(), group["max_update_rms"]))
    _apply(run, update, group, mask)


def _apply(run: Run, update: Tensor, group: dict[str, Any], mask: Tensor | None) -> None:
    """Steps 5 and 9: decays the weights and subtracts the update. 16-bit weights are rounded once."""
    update = update.mul_(scalar_lr(group["lr"], update))
    if mask is None and all(parameter.dtype == update.dtype for parameter in run.parameters):
        WeightDecayMixin.decay_weights_(run.parameters, group)
        torch._foreach_sub_(run.parameters, run.split(update))
    else:
        weights = run.join(run.parameters).clone()
        WeightDecayMixin.decay_weight_(weights, group, mask)
        torch._foreach_copy_(run.parameters, run.split(weights.sub_(update)))


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

    def where_finite(new: Tensor, old: Tensor) -> Tensor:
        return new if finite is None else torch.where(along_stack(finite, old), new, old)

    refreshed = refresh_eigenbasis_and_moments(
        run.matrices("GG"),
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
