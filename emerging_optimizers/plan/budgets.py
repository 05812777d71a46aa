"""Which options make SOAP fit into a budget of memory or of FLOPs, the least risk to the loss first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from emerging_optimizers.plan.planning import Plan, plan
from emerging_optimizers.plan.shapes import Model, model_of

FREQUENCIES = (10, 20, 50, 100)
MOST_RANKS = 4096

#: Why an option stands where it does in the order, the least risk first.
RISKS = {
    "pack_factors": "rounding alone; no loss seen over three seeds (docs/performance.md, Memory)",
    "state_dtype": "bfloat16 moments and bases; no loss seen over three seeds (docs/performance.md, Memory)",
    "precondition_frequency": "staler bases; worse the longer the period in the paper's ablation, not measured here",
    "merge_dims": "another preconditioner for tensors of more than two axes; not measured",
    "max_precond_dim": "longer axes keep no eigenbasis (one-sided); not measured",
}


@dataclass(frozen=True)
class Budget:
    """What there is to spend.

    Attributes:
        memory_bytes: Of the fullest rank, or None: optimizer state, and with ``with_weights`` also weights and
            gradients. Activations are not in it.
        overhead: SOAP's FLOPs per step over those of forward and backward, on the busiest rank, or None.
        with_weights: Whether weights and gradients count.
    """

    memory_bytes: int | None = None
    overhead: float | None = None
    with_weights: bool = False

    def uses(self, planned: Plan) -> dict[str, tuple[float, float]]:
        """What the plan uses and what there is, under "memory" and "overhead", as far as they are limited."""
        found: dict[str, tuple[float, float]] = {}
        if self.memory_bytes is not None:
            extra = [share.weight_bytes if self.with_weights else 0 for share in planned.shares]
            used = max(share.state_bytes + more for share, more in zip(planned.shares, extra, strict=True))
            found["memory"] = (used, self.memory_bytes)
        if self.overhead is not None:
            found["overhead"] = (planned.overhead() or 0.0, self.overhead)
        return found

    def excess(self, planned: Plan) -> float:
        """The largest of use over budget; at most 1: the plan meets it."""
        return max((used / limit for used, limit in self.uses(planned).values()), default=0.0)


@dataclass(frozen=True)
class Change:
    """One option that is set otherwise, its new value, and what that may do to the loss."""

    option: str
    value: Any
    risk: str


@dataclass(frozen=True)
class Proposal:
    """What differs from the options that were asked for, if anything has to, and the plan under them."""

    changes: tuple[Change, ...]
    plan: Plan


@dataclass(frozen=True)
class Fit:
    """The answer to a budget.

    Attributes:
        met: Whether ``proposal`` meets it.
        proposal: The options of least risk that meet it; if none do, those that miss it least.
        with_ranks: The plan with the fewest ranks, doubling, under the options as they were asked for: no risk to the
            loss, but more devices. None where they meet it anyhow, or no number does.
    """

    budget: Budget
    met: bool
    proposal: Proposal
    with_ranks: Plan | None


def fit_budget(
    model: Model | nn.Module | Mapping[str, Sequence[int]],
    budget: Budget,
    *,
    ranks: int = 1,
    parameter_dtype: torch.dtype | None = None,
    **arguments: Any,
) -> Fit:
    """Looks for options that meet a budget.

    The order is that of ``RISKS``: packing before bfloat16, both before a longer refresh period, and preconditioning
    fewer axes last. The riskiest change decides: everything that does without it is tried before. Arguments besides the
    budget are those of :func:`~emerging_optimizers.plan.plan`, with the options to start from.

    Raises:
        TypeError, ValueError: As ``plan``; also for a budget that is not positive, and for ``overhead`` without
            ``tokens_per_step``.
    """
    for name, limit in {"memory_bytes": budget.memory_bytes, "overhead": budget.overhead}.items():
        if limit is not None and not limit > 0:
            raise ValueError(f"{name} must be positive, got {limit}")
    if budget.memory_bytes is None and budget.overhead is None:
        raise ValueError("a budget must limit memory_bytes or overhead, got neither")
    if budget.overhead is not None and arguments.get("tokens_per_step") is None:
        raise ValueError("a budget of overhead needs tokens_per_step, got None")
    described = model_of(model, parameter_dtype=parameter_dtype)
    asked = plan(described, ranks=ranks, **arguments)
    best, least = Proposal((), asked), budget.excess(asked)
    if least <= 1:
        return Fit(budget, True, best, None)
    more_ranks = _more_ranks(described, budget, asked, arguments)
    for changes in _changes(asked):
        new = {change.option: change.value for change in changes}
        proposal = Proposal(changes, plan(described, ranks=ranks, **{**arguments, **new}))
        excess = budget.excess(proposal.plan)
        if excess <= 1:
            return Fit(budget, True, proposal, more_ranks)
        if excess < least:
            best, least = proposal, excess
    return Fit(budget, False, best, more_ranks)


def _changes(asked: Plan) -> Iterator[tuple[Change, ...]]:
    """Combinations of changes, the least risk first."""
    options = asked.options
    sizes = {row.layout.shape[axis] for row in asked.rows for axis in row.layout.axes}
    ladders: dict[str, list[Any]] = {
        # A threshold leaves out all axes above it; one that leaves out every axis is AdamW, and no answer.
        "max_precond_dim": sorted(sizes, reverse=True)[1:],
        "merge_dims": [not options["merge_dims"]] if any(len(row.shape) > 2 for row in asked.rows) else [],
        "precondition_frequency": []
        if callable(options["precondition_frequency"])
        else [f for f in FREQUENCIES if f > asked.frequency],
        "state_dtype": [torch.bfloat16] if options["state_dtype"] is None else [],
        "pack_factors": [] if options["pack_factors"] else [True],
    }

    for values in product(*([None, *ladder] for ladder in ladders.values())):
        changed = [(option, value) for option, value in zip(ladders, values, strict=True) if value is not None]
        if changed:
            yield tuple(Change(option, value, RISKS[option]) for option, value in reversed(changed))


def _more_ranks(model: Model, budget: Budget, asked: Plan, arguments: dict[str, Any]) -> Plan | None:
    ranks, last = 2 * asked.ranks, budget.excess(asked)
    while ranks <= MOST_RANKS:
        planned = plan(model, ranks=ranks, **arguments)
        excess = budget.excess(planned)
        if excess <= 1:
            return planned
        if excess >= last:  # one matrix, or what every rank has whole, is already too much
            return None
        ranks, last = 2 * ranks, excess
    return None
