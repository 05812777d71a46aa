"""``soap plan``: what SOAP will cost on a model, as tables, as JSON and as a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emerging_optimizers.lab.common import (
    LabError,
    make_console,
    make_table,
    printable,
    require,
    tell,
    write_atomically,
)
from emerging_optimizers.lab.names import DTYPES, PRESETS, files, flag, number, one_of, option

if TYPE_CHECKING:
    from rich.table import Table

    from emerging_optimizers.plan import Budget, Fit, Plan, Prediction, Row

UNITS = {unit: 1000**i for i, unit in enumerate(("B", "KB", "MB", "GB", "TB"))}
UNITS |= {unit: 1024**i for i, unit in enumerate(("KiB", "MiB", "GiB", "TiB"), start=1)}
CALIBRATION_SECONDS = 10.0

LABELS = {"soap": "SOAP", "adamw": "AdamW", "muon": "Muon"}
FORMAT = "soap-plan/1"
MOST_BARS = 8
VECTORS = "norms, biases, other vectors"


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help=f"{', '.join(PRESETS)}; package.module:function, which returns a module; or a file: Hugging Face "
            "config.json, .safetensors or its index, torch checkpoint",
            autocompletion=one_of(PRESETS),
        ),
    ],
    frequency: Annotated[int, number("--frequency", "steps between eigenbasis refreshes")] = 10,
    max_precond_dim: Annotated[
        int | None, number("--max-precond-dim", "a longer axis keeps no factor  [default: SOAP's, 10000]", least=0)
    ] = None,
    merge_dims: Annotated[bool, flag("--merge-dims", "fold a convolution's axes")] = False,
    pack_factors: Annotated[bool, flag("--pack-factors", "keep a triangle of each factor")] = False,
    bfloat16_state: Annotated[bool, flag("--bfloat16-state", "first moment and bases in bfloat16")] = False,
    no_routing: Annotated[bool, flag("--no-routing", "as SOAP(model.parameters()): embeddings and head too")] = False,
    dtype: Annotated[
        str | None,
        option("DTYPE", f"of the parameters: {', '.join(DTYPES)}  [default: the model's]", one_of(DTYPES)),
    ] = None,
    ranks: Annotated[int, number("--ranks", "processes that divide the work", most=10_000)] = 1,
    sharded: Annotated[
        bool, flag("--sharded", "weights sharded over the ranks (FSDP2), not whole on each (DDP)")
    ] = False,
    tokens: Annotated[
        int | None,
        number("--tokens", "tokens per step over all ranks; shows the optimizer's share of the FLOPs"),
    ] = None,
    memory: Annotated[
        str | None, option("SIZE", "such as 24GB or 24GiB: find options whose state fits on every rank")
    ] = None,
    with_weights: Annotated[bool, flag("--with-weights", "--memory holds weights and gradients too")] = False,
    overhead: Annotated[
        str | None, option("SHARE", "such as 5%: find options that add no more to the training FLOPs")
    ] = None,
    calibrate: Annotated[
        bool, flag("--calibrate", "measure this machine's rates (10 s); predict milliseconds")
    ] = False,
    every: Annotated[bool, flag("--all", "a line per parameter, not per kind of layer")] = False,
    as_json: Annotated[bool, flag("--json", "print JSON")] = False,
    picture: Annotated[Path | None, option("FILE.png", "draw the state of each kind of layer as bars", files)] = None,
) -> None:
    """Say what SOAP will cost on a model: memory and FLOPs, next to AdamW and Muon. Nothing is allocated."""
    require("rich", *(["matplotlib"] if picture else []))
    if picture is not None and picture.suffix.lower() != ".png":
        raise LabError(f"--picture {picture}: expected a name that ends in .png")
    if picture is not None and not picture.parent.is_dir():
        raise LabError(f"--picture {picture}: there is no folder {picture.parent}")
    if dtype is not None and dtype not in DTYPES:
        raise LabError(f"--dtype {dtype}: choose {', '.join(DTYPES)}")
    budget = read_budget(memory, with_weights, overhead, tokens)
    if calibrate and ranks > 1:
        raise LabError("--calibrate predicts one process, and no transfers: leave out --ranks")

    import torch

    from emerging_optimizers import plan as planner

    options: dict[str, Any] = {"precondition_frequency": frequency, "merge_dims": merge_dims}
    options |= {"pack_factors": pack_factors, "state_dtype": torch.bfloat16 if bfloat16_state else None}
    if max_precond_dim is not None:
        options["max_precond_dim"] = max_precond_dim
    try:
        described = planner.load_model(model)
        if dtype is not None:
            described = planner.model_of(described, parameter_dtype=getattr(torch, dtype))
        arguments = {"ranks": ranks, "sharded": sharded, "tokens_per_step": tokens, "routed": not no_routing, **options}
        planned = planner.plan(described, **arguments)
        fit = None if budget is None else planner.fit_budget(described, budget, **arguments)
    except ValueError as error:
        raise LabError(str(error)) from error
    prediction = planner.predict(planned, planner.calibrate(CALIBRATION_SECONDS)) if calibrate else None
    if picture is not None:
        write_picture(picture, planned, planner.plan(described, **{**arguments, "pack_factors": True}))
    if as_json:
        data = as_data(planned, fit, prediction)
        print(json.dumps(data, indent=1, default=lambda dtype: str(dtype).removeprefix("torch.")))
    else:
        print_plan(planned, fit, prediction, every, picture)
    if fit is not None and not fit.met:
        raise typer.Exit(1)


def read_budget(memory: str | None, with_weights: bool, overhead: str | None, tokens: int | None) -> Budget | None:
    """Read ``24GB`` and ``5%``."""
    if with_weights and memory is None:
        raise LabError("--with-weights belongs to --memory")
    if memory is None and overhead is None:
        return None
    if overhead is not None and tokens is None:
        raise LabError("--overhead is a share of the training step: give its batch with --tokens")
    limit = share = None
    if memory is not None:
        found = re.fullmatch(r"(\d{1,15}\.?\d{0,15})\s*([A-Za-z]+)", memory.strip())
        unit = next((unit for unit in UNITS if found and unit.lower() == found[2].lower()), None)
        limit = int(float(found[1]) * UNITS[unit]) if found and unit else 0
        if limit < 1:
            raise LabError(f"--memory {memory}: expected a size with its unit, for example 24GB or 512MiB")
    if overhead is not None:
        found = re.fullmatch(r"(\d{1,15}\.?\d{0,15})\s*%", overhead.strip())
        share = float(found[1]) / 100 if found else 0.0
        if not share > 0:
            raise LabError(f"--overhead {overhead}: expected a percentage, for example 5%")

    from emerging_optimizers.plan import Budget

    return Budget(limit, share, with_weights)


def size(count: float) -> str:
    """Bytes in decimal units, three digits: 1.23 GB."""
    return _scaled(count, (" B", " kB", " MB", " GB", " TB"))


def flops(count: float) -> str:
    """FLOPs with a prefix, three digits: 1.23 T."""
    return _scaled(count, ("", " k", " M", " G", " T", " P", " E"))


def _scaled(count: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.3g}{units[-1]}" if count < 999.5 else f"{count:,.0f}{units[-1]}"


def groups(planned: Plan, every: bool = False) -> dict[str, list[Row]]:
    """Rows of one kind of layer together, as blocks.*.up.weight; all vectors are one kind."""
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
    console = make_console()
    say = partial(tell, console, soft_wrap=False)
    note = f" ({planned.model.note})" if planned.model.note else ""
    say(f"{printable(planned.model.name)}: {planned.parameters:,} parameters{note}")
    layers = make_table(("parameters", "tensors", "elements", "SOAP state", "treatment"), "fold")
    layers.columns[-1].justify = "left"
    for column in layers.columns[1:-1]:
        column.no_wrap = True
    for name, rows in groups(planned, every).items():
        state = sum(row.soap.state_bytes for row in rows)
        what = {"soap": "SOAP: ", "adamw": "AdamW: ", "frozen": "nothing: "}[rows[0].optimizer] + rows[0].reason
        layers.add_row(printable(name), str(len(rows)), f"{sum(row.numel for row in rows):,}", size(state), what)
    say(layers)
    say(_totals(planned))
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
    overhead = [] if planned.training_flops is None else ["overhead"]
    headings = ("", "state", "bytes per parameter", "FLOPs per step", "more at a refresh", "FLOPs on average")
    table = make_table([*headings, *overhead])
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


def _say_shares(planned: Plan, say: Callable[[str], None]) -> None:
    weights = max(share.weight_bytes for share in planned.shares)
    where = " on the fullest rank" if planned.ranks > 1 else ""
    say(f"Refresh every {planned.frequency} steps. Weights and gradients: {size(weights)}{where}.")
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


def _say_fit(fit: Fit, say: Callable[[str], None]) -> None:
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
        say(f"  {change.option}={change.value}: {change.risk}")
    if not fit.met and not found.changes:
        say("  the options as they are")
    if fit.with_ranks is not None:
        say(f"Or by {fit.with_ranks.ranks} ranks with the options as they are, which is no risk to the loss.")


def as_data(planned: Plan, fit: Fit | None, prediction: Prediction | None) -> dict[str, Any]:
    """Turn a plan, and what was asked for besides, into what JSON can hold, but for dtypes."""
    options = ("parameters", "options", "ranks", "sharded", "tokens_per_step", "training_flops")
    found: dict[str, Any] = {"format": FORMAT, "model": planned.model.name, "note": planned.model.note}
    found |= {key: getattr(planned, key) for key in options}
    found["totals"] = {
        key: {**asdict(cost), "mean_flops": cost.mean_flops(planned.frequency), "overhead": planned.overhead(key)}
        for key, cost in planned.totals.items()
    }
    found["shares"] = [asdict(share) for share in planned.shares]
    found["rows"] = [
        {key: getattr(row, key) for key in ("name", "shape", "dtype", "optimizer", "reason")}
        | {"axes": row.layout.axes, **{key: asdict(getattr(row, key)) for key in LABELS}}
        for row in planned.rows
    ]
    if prediction is not None:
        found["predicted_seconds"] = asdict(prediction)
    if fit is not None:
        found["budget"] = {
            "met": fit.met,
            "uses": {name: {"used": u, "limit": v} for name, (u, v) in fit.budget.uses(fit.proposal.plan).items()},
            "with_weights": fit.budget.with_weights,
            "changes": [asdict(change) for change in fit.proposal.changes],
            "ranks_instead": None if fit.with_ranks is None else fit.with_ranks.ranks,
        }
    return found


def write_picture(path: Path, planned: Plan, packed: Plan) -> None:
    """Draw the state of each kind of layer under SOAP, SOAP packed, AdamW and Muon."""
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
