"""The plan: what every parameter gets and costs, and what that makes altogether and per rank."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from emerging_optimizers.plan.costs import COUNTER_BYTES, Cost, adamw_cost, held, layout_and_bytes, muon_cost, soap_cost
from emerging_optimizers.plan.shapes import Model, model_of
from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.costs import mean_flops, share_out
from emerging_optimizers.soap.options import refresh_frequency, validate_options
from emerging_optimizers.soap.state import Layout


@dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        optimizer: "soap", "adamw" or "frozen".
        reason: Why, and which axes are preconditioned.
        layout: The working shape and the preconditioned axes.
        soap: Its cost under SOAP as planned.
        adamw: Its cost under torch's AdamW.
        muon: Its cost where Muon trains the matrices that SOAP would precondition and AdamW the rest.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    dtype: torch.dtype
    optimizer: str
    reason: str
    layout: Layout
    soap: Cost
    adamw: Cost
    muon: Cost

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight and, where it is trained, of its gradient."""
        return self.numel * self.dtype.itemsize * (1 if self.optimizer == "frozen" else 2)


@dataclass(frozen=True)
class Share:
    """What falls to one rank: bytes of optimizer state and of weights with gradients, and the optimizer's FLOPs.

    They are those of a step without a refresh, of a refresh of all eigenbases on top, and of the mean step.
    """

    state_bytes: int
    weight_bytes: int
    step_flops: float
    refresh_flops: float
    mean_flops: float


@dataclass(frozen=True)
class Plan:
    """What SOAP does with a model and costs there.

    Attributes:
        model: The model.
        options: The options of the preconditioned group, complete.
        frequency: Steps between refreshes; of a schedule, at step 0.
        ranks: The number of processes.
        sharded: Whether weights, gradients and AdamW's state are divided over them.
        tokens_per_step: The batch in tokens, over all ranks, or None.
        rows: One per parameter.
        shares: One per rank.
    """

    model: Model
    options: Mapping[str, Any]
    frequency: int
    ranks: int
    sharded: bool
    tokens_per_step: int | None
    rows: tuple[Row, ...]
    shares: tuple[Share, ...]

    @cached_property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(row.numel for row in self.rows)

    @cached_property
    def totals(self) -> dict[str, Cost]:
        """The cost over all parameters and ranks, each tensor once, under "soap", "adamw" and "muon"."""
        return {key: sum((getattr(row, key) for row in self.rows), Cost()) for key in ("soap", "adamw", "muon")}

    @cached_property
    def fullest(self) -> Share:
        """The rank with the most state."""
        return max(self.shares, key=lambda share: share.state_bytes + share.weight_bytes)

    @cached_property
    def training_flops(self) -> int | None:
        """FLOPs of forward and backward over all ranks, or None without a batch.

        A transformer multiplies each token by each weight once forward and twice backward, 6 FLOPs per weight and token
        (arXiv 2001.08361), and once backward where the weight is frozen. Products within attention are left out.
        """
        if self.tokens_per_step is None:
            return None
        frozen = sum(row.numel for row in self.rows if row.optimizer == "frozen")
        return (6 * self.parameters - 2 * frozen) * self.tokens_per_step

    def overhead(self, optimizer: str = "soap") -> float | None:
        """The optimizer's FLOPs per step over those of forward and backward, on the rank with the most; or None.

        "adamw" and "muon" are run whole by every rank without ``sharded``.
        """
        if self.training_flops is None:
            return None
        if optimizer == "soap":
            busiest = max(share.mean_flops for share in self.shares)
        else:
            busiest = self.totals[optimizer].step_flops / (self.ranks if self.sharded else 1)
        return self.ranks * busiest / self.training_flops if self.training_flops else 0.0


def plan(
    model: Model | nn.Module | Mapping[str, Sequence[int]],
    *,
    ranks: int = 1,
    sharded: bool = False,
    tokens_per_step: int | None = None,
    parameter_dtype: torch.dtype | None = None,
    routed: bool = True,
    **options: Any,
) -> Plan:
    """Plans SOAP for a model. Pure arithmetic on shapes: nothing is allocated.

    Args:
        model: A module, on any device, also "meta"; names and shapes; or what ``load_model`` returned.
        ranks: The number of processes that divide the work (``docs/distributed.md``).
        sharded: Whether weights, gradients and AdamW's state are sharded over them, as by FSDP2; otherwise every rank
            has them whole, as under DDP with ``process_group``.
        tokens_per_step: The batch in tokens, over all ranks; None: nothing is said about the training step.
        parameter_dtype: The dtype of all parameters; None: their own.
        routed: Whether groups are made by ``emerging_optimizers.routing``; otherwise as ``SOAP(model.parameters())``.
        options: SOAP's options, as its constructor takes them; ``lr`` may be left out.

    Raises:
        TypeError: An argument or an option has the wrong type, or is unknown.
        ValueError: One has an impossible value.

    Example:
        >>> planned = plan(nn.Linear(64, 32), precondition_frequency=10)
        >>> [(row.name, row.reason, row.soap.state_bytes) for row in planned.rows]
        [('weight', 'axes 0, 1 of 32x64', 57376), ('bias', 'fewer than 2 axes', 272)]
        >>> planned.totals["adamw"].state_bytes
        16648
    """
    for name, value in {"ranks": ranks, "tokens_per_step": 1 if tokens_per_step is None else tokens_per_step}.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer >= 1, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value}")
    described = model_of(model, parameter_dtype=parameter_dtype)
    complete = _complete(options)
    rows = tuple(
        _row(route, dtype, complete, routed) for route, dtype in zip(described.routes, described.dtypes, strict=True)
    )
    frequency = refresh_frequency(complete["precondition_frequency"], 0)
    shares = _shares(rows, frequency, ranks, sharded)
    return Plan(described, complete, frequency, ranks, sharded, tokens_per_step, rows, shares)


def _complete(options: Mapping[str, Any]) -> dict[str, Any]:
    """All of SOAP's options, checked. Constructing a SOAP would do, but the first one imports torch's compiler."""
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(SOAP).parameters.items()
        if name not in ("params", "process_group")
    }
    for name in options:
        if name not in known:
            raise TypeError(f"plan() got {name!r}, which is neither its own argument nor an option of SOAP")
    complete = {**known, "lr": 1e-3, **options}
    validate_options(complete)
    return complete


def _row(route: Any, dtype: torch.dtype, options: Mapping[str, Any], routed: bool) -> Row:
    shape, optimizer, reason = route.shape, route.optimizer, route.reason
    if optimizer == "frozen":
        return Row(route.name, shape, route.numel, dtype, optimizer, reason, Layout(shape, ()), Cost(), Cost(), Cost())
    to_adamw = routed and optimizer == "adamw"
    layout, state = layout_and_bytes(shape, dtype, {**options, "max_precond_dim": 0} if to_adamw else options)
    adamw = adamw_cost(shape, dtype)
    muon = muon_cost(shape, dtype) if route.optimizer == "soap" and len(shape) == 2 else adamw
    if not to_adamw:
        optimizer, reason = _treatment(route, layout, options["max_precond_dim"])
    cost = soap_cost(layout, state)
    return Row(route.name, shape, route.numel, dtype, optimizer, reason, layout, cost, adamw, muon)


def _treatment(route: Any, layout: Layout, longest: int) -> tuple[str, str]:
    """What happens to a tensor of the preconditioned group, and why."""
    if not layout.axes:
        whole = any(size > longest for size in layout.shape)
        return "adamw", f"every axis is longer than max_precond_dim={longest}" if whole else "fewer than 2 axes"
    words = [f"{_axes(layout.axes)} of {'x'.join(map(str, layout.shape))}"]
    if len(layout.shape) < len(route.shape):
        words.append(f"folded from {len(route.shape)}")
    if left := [axis for axis in range(len(layout.shape)) if axis not in layout.axes]:
        words.append(f"{_axes(left)} longer than max_precond_dim={longest}")
    return "soap", ", ".join(words)


def _axes(axes: Sequence[int]) -> str:
    return f"{'axis' if len(axes) == 1 else 'axes'} {', '.join(map(str, axes))}"


def _shares(rows: Sequence[Row], frequency: int, ranks: int, sharded: bool) -> tuple[Share, ...]:
    """Divides the work as ``docs/distributed.md`` says: matrices to owners by cost, the rest by rows or whole."""
    owned = [row for row in rows if row.layout.axes]
    owners = share_out([mean_flops(row.layout, frequency) for row in owned], [0.0] * ranks)
    elsewhere = COUNTER_BYTES if ranks > 1 else 0
    state = [len(owned) * elsewhere] * ranks
    weights, steps, refreshes = [0] * ranks, [0.0] * ranks, [0.0] * ranks
    for row, owner in zip(owned, owners, strict=True):
        state[owner] += row.soap.state_bytes - elsewhere
        steps[owner] += row.soap.step_flops
        refreshes[owner] += row.soap.refresh_flops
    for row in rows:
        numel = max(row.numel, 1)
        for rank, here in enumerate(held(row.shape, ranks) if sharded else [row.numel] * ranks):
            weights[rank] += row.weight_bytes * here // numel
            if not row.layout.axes and row.optimizer != "frozen":
                # Moments shrink with the piece, the two counters do not.
                moments = row.soap.state_bytes - 2 * COUNTER_BYTES
                state[rank] += 2 * COUNTER_BYTES + moments * here // numel
                steps[rank] += row.soap.step_flops * here / numel
    return tuple(
        Share(state[r], weights[r], steps[r], refreshes[r], steps[r] + refreshes[r] / frequency) for r in range(ranks)
    )
