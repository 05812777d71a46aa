"""``soap inspect``: the optimizer states in a checkpoint file, measured, as a table, as JSON and as a page."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from emerging_optimizers.lab.common import (
    LabError,
    claim_folder,
    damaged_entry,
    make_console,
    make_table,
    printable,
    require,
    tell,
    write_text,
)
from emerging_optimizers.lab.names import files, flag, option
from emerging_optimizers.lab.page import escape, plain_axes, render_page, render_svg, render_table

if TYPE_CHECKING:
    from rich.console import Console

    from emerging_optimizers.health import Health, TensorHealth

FORMAT = "soap-inspect/1"
RESULTS = "health.json"
PAGE = "health.html"
OPTIMIZER_KEYS = ("optimizer", "optim", "optimizer_state_dict", "optimizer_states", "optimizers")
MODEL_KEYS = ("model", "state_dict", "model_state_dict", "model_state")


def inspect(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="file of torch.save: an optimizer's state dict or a dict with one",
            autocompletion=files,
        ),
    ],
    out: Annotated[Path | None, option("FOLDER", "for a page with the spectra of all factors", files)] = None,
    as_json: Annotated[bool, flag("--json", "print everything as JSON instead of a table")] = False,
) -> None:
    """Measure a saved optimizer state: is every basis fresh and orthogonal, does every gradient live?

    The worst tensors come first, and what is wrong is said in words. The file is only read, and nothing in it executed.
    """
    require("matplotlib", "rich")
    if out is not None:
        claim_folder(out, RESULTS, FORMAT, "an inspection's")
    found = inspect_file(checkpoint)
    text = json.dumps(to_json(checkpoint, found), indent=1, allow_nan=False)
    if out is not None:
        page = render(checkpoint, found)
        write_text(out / RESULTS, text)
        write_text(out / PAGE, page)
    if as_json:
        print(text)
        return
    console = make_console()
    show(found, console)
    if out is not None:
        tell(console, f"Page: {printable(out / PAGE)}")


class Inspected(NamedTuple):
    """One optimizer state of a file, and where in it that is: "optimizer"; "" where it is the file."""

    label: str
    health: Health


def inspect_file(path: Path) -> list[Inspected]:
    """Measure every SOAP state in a checkpoint file. Nothing in it is executed, nothing written."""
    from emerging_optimizers.health import examine

    checkpoint = _load(path)
    found = list(_states(checkpoint, "", {}))
    if not found:
        keys = ", ".join(map(str, list(checkpoint)[:8])) if isinstance(checkpoint, Mapping) else "no dict"
        raise LabError(f"{path}: no optimizer state under {', '.join(OPTIMIZER_KEYS)}, nor is it one; it has: {keys}")
    ours = [(label, state, weights) for label, state, weights in found if _is_soap(state)]
    if not ours:
        raise LabError(f"{path}: the optimizer state in it is not SOAP's (its groups have no shampoo_beta)")
    try:
        return [Inspected(label, examine(state, weights=weights)) for label, state, weights in ours]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise LabError(f"{path}: {error}") from error


def _load(path: Path) -> Any:
    import torch

    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped and (damaged := damaged_entry(path)) is not None:
            raise LabError(f"{path}: damaged (bad check sum of {damaged})")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what it then refuses: the error says so
            # Mapped, not read: a matrix at a time is looked at.
            return torch.load(path, weights_only=True, map_location="cpu", mmap=zipped)
    except OSError as error:
        hint = "; name a file in it" if path.is_dir() else ""
        raise LabError(f"{path}: {error.strerror or error}{hint}") from error
    except LabError:
        raise
    except Exception as error:  # zip, pickle and storage errors share no base class
        hint = ""
        if "DTensor" in str(error):
            hint = "; it has DTensors: save the full state"
        elif found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            hint = f"; it has a {found[1]}: save optimizer.state_dict(), not the object"
        raise LabError(f"{path}: not a checkpoint that torch.load(weights_only=True) reads{hint}") from error


def _states(value: Any, label: str, weights: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """The optimizer states in a checkpoint, each with where it is and the weights beside it."""
    if isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _states(inner, f"{label} {place}".strip(), weights)
    elif not isinstance(value, Mapping):
        return
    elif isinstance(value.get("param_groups"), list | tuple) and isinstance(value.get("state"), Mapping):
        yield label, value, weights
    elif str(value.get("format", "")).startswith("soap-race-checkpoint/"):
        yield from _race_states(value)
    else:
        weights = next((value[key] for key in MODEL_KEYS if isinstance(value.get(key), Mapping)), weights)
        for key in value:
            # A contender of a race keeps its optimizers under "0" and "1".
            if key in OPTIMIZER_KEYS or (label and isinstance(key, str) and key.isdigit()):
                yield from _states(value[key], f"{label} {key}".strip(), weights)


def _race_states(value: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    runs = value.get("runs")
    for run in runs if isinstance(runs, list) else []:
        record = run.get("record") if isinstance(run, Mapping) else None
        if isinstance(record, Mapping):
            label = f"{record.get('optimizer')}, rate {record.get('lr')}, seed {record.get('seed')}"
            inner = {"model": run.get("model"), "optimizer": run.get("optimizer")}
            for found, state, weights in _states(inner, "run", {}):
                number = found.removeprefix("run optimizer").strip()
                yield label + (f", optimizer {number}" if number not in ("", "0") else ""), state, weights


def _is_soap(state: Mapping[str, Any]) -> bool:
    return any(isinstance(group, Mapping) and "shampoo_beta" in group for group in state["param_groups"])


def _worst(values: Iterable[float | None], form: str) -> str:
    return format(max(known), form) if (known := [value for value in values if value is not None]) else "-"


def _lowest_rank(tensor: TensorHealth) -> str:
    shares = [(rank / f.size, f"{rank:.1f}/{f.size}") for f in tensor.factors if (rank := f.effective_rank) is not None]
    return min(shares)[1] if shares else "-"


#: Of a table, with what stands in them: of several axes the worst.
COLUMNS: dict[str, Callable[[TensorHealth], str]] = {
    "tensor": lambda tensor: tensor.name,
    "shape": lambda tensor: "x".join(map(str, tensor.shape)) or "scalar",
    "age": lambda tensor: "-" if tensor.age is None else str(tensor.age),
    "residual": lambda tensor: _worst((f.residual for f in tensor.factors), ".2f"),
    "orth.": lambda tensor: _worst((f.orthogonality for f in tensor.factors), ".0e"),
    "rank": _lowest_rank,
    "cond.": lambda tensor: _worst((f.condition for f in tensor.factors), ".0e"),
    "update": lambda tensor: _worst([tensor.update_rms], ".1e"),
    "/ weight": lambda tensor: _worst([tensor.update_ratio], ".1e"),
}


def cells(tensor: TensorHealth) -> tuple[str, ...]:
    """Format a tensor for a table with the headings `COLUMNS`."""
    return tuple(cell(tensor) for cell in COLUMNS.values())


def verdict(health: Health) -> str:
    """Say in a line what was found."""
    count = len(health.tensors)
    tensors = f"{count} tensor{'' if count == 1 else 's'}"
    with_factors = sum(tensor.preconditioned for tensor in health.tensors)
    if not count:
        return "No tensor has a state yet: the optimizer has not taken a step."
    known = f"{tensors} ({with_factors} preconditioned; {health.step} steps)"
    if not health.findings:
        return f"Nothing wrong with {known}."
    return f"Something is wrong with {len({finding.name for finding in health.findings})} of {known}."


def notes(health: Health) -> list[str]:
    """Say what was not looked at, and what shows nothing."""
    said = []
    if still := tuple(tensor.name for tensor in health.tensors if tensor.learning_rate == 0):
        whose = "" if len(still) == len(health.tensors) else f" of {_few(still)}"
        said.append(f"The saved learning rate{whose} is 0, as at the end of a schedule; so the updates shown are 0.")
    if health.waiting:
        said.append(f"Without a state yet (no gradient has come): {_few(health.waiting)}.")
    if health.elsewhere:
        said.append(f"Worked on by another process, so not looked at here: {_few(health.elsewhere)}.")
    if health.tensors and all(tensor.weight_rms is None for tensor in health.tensors):
        said.append(
            "What an update is to its weight is not known: that takes the model's weights in the file beside the "
            "optimizer's state and an optimizer that was given model.named_parameters()."
        )
    return said


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def to_json(path: Path, inspected: list[Inspected]) -> dict[str, Any]:
    """Collect everything as plain values, finite numbers only."""
    states = [{"label": label, "verdict": verdict(health)} | health.to_dict() for label, health in inspected]
    return {"format": FORMAT, "checkpoint": printable(path.name), "states": states}


def show(inspected: Sequence[Inspected], console: Console) -> None:
    """Print the verdict, what is wrong, and a table with the worst first."""
    for label, health in inspected:
        if label and len(inspected) > 1:
            tell(console, printable(f"{label}:"))
        tell(console, printable(verdict(health)))
        for finding in health.findings:
            tell(console, printable(f"  {finding}"))
        if health.tensors:
            shown = make_table(COLUMNS, "fold")
            ill = {finding.name for finding in health.findings}
            for tensor in health.worst_first:
                shown.add_row(*map(printable, cells(tensor)), style="red" if tensor.name in ill else None)
            tell(console, shown)
        for note in notes(health):
            tell(console, printable(note))


# --- the page -------------------------------------------------------------------------------------------------------

POINTS = 96  # of a drawn spectrum: more cannot be told apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#4d4d4d")
DASHES = ("-", (0, (5, 2)), (0, (4, 1, 1, 1)), ":", (0, (6, 1)))

PAGE_STYLE = """
.layers { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.layers figure { margin: 0; min-width: 0; } figcaption { font-size: .85rem; } .ill { color: #a40000; font-weight: 600; }
li { margin: .4rem 0; }
"""


def render(path: Path, inspected: Sequence[Inspected]) -> str:
    """Render the page: the answer first, then what is wrong, the table, and the spectra layer by layer."""
    title = f"soap inspect: {path.name}"
    sections = "".join(_section(state, number, len(inspected)) for number, state in enumerate(inspected))
    reading = """<h2>How to read it</h2>
<p class="note">Age: steps since the last refresh. Residual: the part of a Kronecker factor that is not diagonal in its
eigenbasis, 0 when fresh. Orth.: the largest entry of QᵀQ - I. Rank: how many directions the gradient uses (effective
rank), of how many. Cond.: largest over smallest eigenvalue, at most 8.4e6 in float32. Of a tensor's axes the table
shows the worst. Update: root mean square of the last step. / weight: that over the weight's.</p>"""
    return render_page(title, f"{sections}\n{reading}", PAGE_STYLE)


def _section(state: Inspected, number: int, count: int) -> str:
    label, health = state
    heading = f"<h2>{escape(label)}</h2>" if label and count > 1 else ""
    ill = {finding.name for finding in health.findings}
    findings = "".join(
        f"<li><b>{escape(f.name)}</b>: <span class='ill'>{escape(f.kind)}</span>: {escape(f.what)} {escape(f.advice)}"
        "</li>"
        for f in health.findings
    )
    said = "".join(f'<p class="note">{escape(note)}</p>' for note in notes(health))
    ordered = health.worst_first
    figures = "".join(_figure(tensor, tensor.name in ill, f"{number}-{place}") for place, tensor in enumerate(ordered))
    spectra = f"""<h2>Spectra of the factors, worst first</h2>
<p class="note">Eigenvalues over the largest, against their rank. A steep curve: the gradient uses few directions.</p>
<div class="layers">{figures}</div>"""
    return f"""{heading}<p class="verdict">{escape(verdict(health))}</p>
<ul>{findings}</ul>
{render_table(COLUMNS, map(cells, ordered), "stack") if ordered else ""}{said}
{spectra if any(tensor.factors for tensor in ordered) else ""}"""


def _figure(tensor: TensorHealth, ill: bool, salt: str) -> str:
    curves = [(f.axis, f.size, f.spectrum) for f in tensor.factors if f.spectrum and f.spectrum[0] > 0]
    if not curves:
        return ""
    ranked = [f for f in tensor.factors if f.effective_rank is not None]
    ranks = ", ".join(f"axis {f.axis}: rank {f.effective_rank:.1f} of {f.size}" for f in ranked)
    kind = ' class="ill"' if ill else ""
    return (
        f'<figure role="img" aria-label="spectra of {escape(tensor.name)}">{_svg(curves, salt)}'
        f"<figcaption><span{kind}>{escape(tensor.name)}</span><br>{escape(ranks)}</figcaption></figure>"
    )


def _svg(curves: Sequence[tuple[int, int, tuple[float, ...]]], salt: str) -> str:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(3.2, 2.3), layout="constrained")
    axes = figure.subplots()
    for place, (axis, size, spectrum) in enumerate(curves):
        chosen = sorted({round(k * (size - 1) / (POINTS - 1)) for k in range(POINTS)})
        values = [max(spectrum[k] / spectrum[0], 1e-9) for k in chosen]
        colour, dashes = COLOURS[place % len(COLOURS)], DASHES[place % len(DASHES)]
        axes.plot([k + 1 for k in chosen], values, color=colour, linestyle=dashes, linewidth=1.5, label=f"axis {axis}")
    axes.set_yscale("log")
    axes.set_ylim(1e-9, 2)
    plain_axes(axes)
    axes.legend(frameon=False, fontsize=8)
    return render_svg(figure, salt)
