"""A plan as tables, as JSON and as a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from emerging_optimizers.lab.checkpoint import write_atomically
from emerging_optimizers.lab.printable import printable
from emerging_optimizers.plan import Change, Fit, Plan, Prediction, Row

LABELS = {"soap": "SOAP", "adamw": "AdamW", "muon": "Muon"}
FORMAT = "soap-plan/1"
MOST_BARS = 8
VECTORS = "norms, biases, other vectors"


def size(count: float) -> str:
    """Bytes in decimal units, three digits: 1.23 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


def flops(count: float) -> str:
    """FLOPs with a prefix, three digits: 1.23 T."""
    for prefix in ("", " k", " M", " G", " T", " P"):
        if count < 999.5:
            return f"{count:.3g}{prefix}"
        count /= 1000
    return f"{count:.3g} E"


def groups(planned: Plan, every: bool = False) -> dict[str, list[Row]]:
    """Rows of one kind of layer together: blocks.0.up.weight and blocks.1.up.weight are blocks.*.up.weight.

    Vectors are one kind.
    """
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in planned.rows:
        kind = row.name if every else re.sub(r"(?<=[._])\d+(?=\.|$)|^\d+(?=\.)", "*", row.name)
        if not every and row.reason == "fewer than 2 axes":
            found.setdefault((VECTORS, "", ""), []).append(row)
        else:
            found.setdefault((kind, str(row.shape), row.reason), []).append(row)
    names = [kind for kind, *_ in found]
    return {
        key[0] if names.count(key[0]) == 1 else f"{key[0]} {'x'.join(map(str, rows[0].shape))}": rows
        for key, rows in found.items()
    }


def print_plan(
    planned: Plan, fit: Fit | None, prediction: Prediction | None, every: bool, picture: Path | None
) -> None:
    """Print the tables, and what there is to say about them."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a pipe has no width of its own

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    say(f"{printable(planned.model.name)}: {planned.parameters:,} parameters"
        + (f" ({planned.model.note})" if planned.model.note else ""))  # fmt: skip
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("parameters", overflow="fold")
    for heading in ("tensors", "elements", "SOAP state"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("treatment", overflow="fold")
    for name, rows in groups(planned, every).items():
        elements = sum(row.numel for row in rows)
        state = sum(row.soap.state_bytes for row in rows)
        what = {"soap": "SOAP: ", "adamw": "AdamW: ", "frozen": "nothing: "}[rows[0].optimizer] + rows[0].reason
        table.add_row(printable(name), str(len(rows)), f"{elements:,}", size(state), what)
    console.print(table, markup=False, highlight=False)
    console.print(_totals(planned), markup=False, highlight=False)
    _say_shares(planned, say)
    if prediction is not None:
        say(
            f"Predicted here: {1e3 * prediction.step:.3g} ms per step, {1e3 * prediction.refresh:.3g} ms more with a "
            f"refresh of all; {1e3 * prediction.mean:.3g} ms on average."
        )
    if fit is not None:
        _say_fit(fit, say)
    if picture is not None:
        say(f"Picture: {printable(picture)}")


def _totals(planned: Plan) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    headings = ["", "state", "bytes per parameter", "FLOPs per step", "more at a refresh", "FLOPs on average"]
    if planned.training_flops is not None:
        headings.append("overhead")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for optimizer, cost in planned.totals.items():
        share = planned.overhead(optimizer)
        table.add_row(
            LABELS[optimizer],
            size(cost.state_bytes),
            f"{cost.state_bytes / max(planned.parameters, 1):.1f}",
            flops(cost.step_flops),
            flops(cost.refresh_flops) if cost.refresh_flops else "-",
            flops(cost.mean_flops(planned.frequency)),
            *([] if share is None else [f"{share:.3%}"]),
        )
    return table


def _say_shares(planned: Plan, say: Any) -> None:
    weights = max(share.weight_bytes for share in planned.shares)
    say(f"Refresh every {planned.frequency} steps. Weights and gradients: {size(weights)}"
        + (" on the fullest rank." if planned.ranks > 1 else "."))  # fmt: skip
    if any(row.dtype.itemsize < 4 for row in planned.rows):
        say(
            "AdamW and Muon keep their state in the parameters' dtype, SOAP in float32 unless an option says otherwise."
        )
    if planned.ranks > 1:
        state = [share.state_bytes for share in planned.shares]
        work = [share.mean_flops for share in planned.shares]
        say(
            f"{planned.ranks} ranks, {'sharded' if planned.sharded else 'weights whole on each'}: state "
            f"{size(min(state))} to {size(max(state))}, FLOPs on average {flops(min(work))} to {flops(max(work))}."
        )
    if planned.training_flops is not None:
        say(
            f"Overhead: of {flops(planned.training_flops)} FLOPs forward and backward, 6 per parameter and token of a "
            f"transformer, for {planned.tokens_per_step:,} tokens."
        )


def _say_fit(fit: Fit, say: Any) -> None:
    found = fit.proposal
    with_what = "state, weights and gradients" if fit.budget.with_weights else "state"
    uses = []
    for name, (used, limit) in fit.budget.uses(found.plan).items():
        shown = (size(used), size(limit)) if name == "memory" else (f"{used:.3%}", f"{limit:.3%}")
        label = f"{with_what} on the fullest rank" if name == "memory" else "overhead"
        over = f", {used / limit - 1:.1%} too much" if used > limit else ""
        uses.append(f"{label} {shown[0]} of {shown[1]}{over}")
    if not fit.met:
        say(f"No options meet the budget. The nearest: {'; '.join(uses)}, with")
    elif found.changes:
        say(f"The budget is met, with the least risk to the loss ({'; '.join(uses)}), by")
    else:
        say(f"The budget is met as it is: {'; '.join(uses)}.")
    for change in found.changes:
        say(f"  {_setting(change)}: {change.risk}")
    if not fit.met and not found.changes:
        say("  the options as they are")
    if fit.with_ranks is not None:
        say(f"Or by {fit.with_ranks.ranks} ranks with the options as they are, which is no risk to the loss.")


def _setting(change: Change) -> str:
    return f"{change.option}={change.value}"


def print_json(planned: Plan, fit: Fit | None, prediction: Prediction | None) -> None:
    """Print everything that there is."""
    found = as_data(planned)
    if prediction is not None:
        found["predicted_seconds"] = asdict(prediction)
    if fit is not None:
        found["budget"] = {
            "met": fit.met,
            "uses": {name: {"used": u, "limit": v} for name, (u, v) in fit.budget.uses(fit.proposal.plan).items()},
            "with_weights": fit.budget.with_weights,
            "changes": [{"option": c.option, "value": _plain(c.value), "risk": c.risk} for c in fit.proposal.changes],
            "ranks_instead": None if fit.with_ranks is None else fit.with_ranks.ranks,
        }
    print(json.dumps(found, indent=1))


def as_data(planned: Plan) -> dict[str, Any]:
    """Turn a plan into what JSON can hold."""
    return {
        "format": FORMAT,
        "model": planned.model.name,
        "note": planned.model.note,
        "parameters": planned.parameters,
        "options": {key: _plain(value) for key, value in planned.options.items()},
        "ranks": planned.ranks,
        "sharded": planned.sharded,
        "tokens_per_step": planned.tokens_per_step,
        "training_flops": planned.training_flops,
        "totals": {
            key: {**asdict(cost), "mean_flops": cost.mean_flops(planned.frequency), "overhead": planned.overhead(key)}
            for key, cost in planned.totals.items()
        },
        "shares": [asdict(share) for share in planned.shares],
        "rows": [
            {
                "name": row.name,
                "shape": row.shape,
                "dtype": _plain(row.dtype),
                "optimizer": row.optimizer,
                "reason": row.reason,
                "axes": row.layout.axes,
                **{key: asdict(getattr(row, key)) for key in LABELS},
            }
            for row in planned.rows
        ],
    }


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def write_picture(path: Path, planned: Plan, packed: Plan) -> None:
    """Draw the state of each kind of layer under SOAP, SOAP packed, AdamW and Muon.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import

    rows = sorted(groups(planned).items(), key=lambda item: -sum(row.soap.state_bytes for row in item[1]))
    kinds = [(name, {row.name for row in group}) for name, group in rows]
    shown, rest = kinds[: MOST_BARS - 1], kinds[MOST_BARS - 1 :]
    if rest:
        shown.append((f"{len(rest)} others", {name for _, names in rest for name in names}))
    series = [("SOAP", planned, "soap", "#0072B2"), ("SOAP packed", packed, "soap", "#56B4E9"),
              ("AdamW", planned, "adamw", "#4d4d4d"), ("Muon", planned, "muon", "#009E73")]  # fmt: skip
    figure = Figure(figsize=(9, 1.6 + 0.62 * len(shown)), layout="constrained")
    axes = figure.subplots()
    heights = [_bytes_of(plan, key, shown) for _, plan, key, _ in series]
    unit, scale = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1))
                       if max(map(max, heights), default=0) >= s or s == 1)  # fmt: skip
    for i, ((label, plan, key, colour), values) in enumerate(zip(series, heights, strict=True)):
        total = size(plan.totals[key].state_bytes)
        positions = [bar + 0.2 * (i - 1.5) for bar in range(len(shown))]
        axes.barh(positions, [value / scale for value in values], 0.19, color=colour, label=f"{label}  {total}")
    axes.set_yticks(range(len(shown)), [printable(name) for name, _ in shown], parse_math=False, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"optimizer state, {unit}")
    axes.set_title(f"{printable(planned.model.name)}: optimizer state by kind of layer", parse_math=False, loc="left")
    figure.legend(frameon=False, loc="outside lower center", ncols=len(series))
    axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _bytes_of(planned: Plan, key: str, kinds: Sequence[tuple[str, set[str]]]) -> list[int]:
    states = {row.name: getattr(row, key).state_bytes for row in planned.rows}
    return [sum(states[name] for name in names) for _, names in kinds]
