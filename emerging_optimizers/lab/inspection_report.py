"""The folder that ``soap inspect --out`` leaves: ``health.json`` and a self-contained ``health.html``.

The page loads nothing and runs no script. Every string in it passes through `report.escape`, whoever it comes from.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from emerging_optimizers.health import Finding, Health, TensorHealth
from emerging_optimizers.lab.checkpoint import write_atomically
from emerging_optimizers.lab.folders import claim_folder
from emerging_optimizers.lab.inspection import COLUMNS, FORMAT, Inspected, cells, notes, to_json, verdict
from emerging_optimizers.lab.printable import printable
from emerging_optimizers.lab.report import STYLE, escape, table

RESULTS = "health.json"
PAGE = "health.html"
POINTS = 96  # of a drawn spectrum: more cannot be told apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#4d4d4d")
DASHES = ("-", (0, (5, 2)), (0, (4, 1, 1, 1)), ":", (0, (6, 1)))

PAGE_STYLE = """
.layers { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.layers figure { margin: 0; min-width: 0; } figcaption { font-size: .85rem; } .ill { color: #a40000; font-weight: 600; }
li { margin: .4rem 0; }
"""


def claim(folder: Path) -> None:
    """Make the output folder, or take over one of an earlier inspection; LabError as of :func:`claim_folder`."""
    claim_folder(folder, RESULTS, FORMAT, "an inspection's")


def write(folder: Path, path: Path, inspected: list[Inspected]) -> None:
    """Write both files."""
    text = json.dumps(to_json(path, inspected), indent=1, allow_nan=False)
    page = render(path, inspected)
    write_atomically(folder / RESULTS, lambda file: file.write(text.encode()))
    write_atomically(folder / PAGE, lambda file: file.write(page.encode()))


def show(inspected: Sequence[Inspected], console: Console) -> None:
    """Print the verdict, what is wrong, and a table with the worst first."""
    for label, health in inspected:
        if label and len(inspected) > 1:
            _print(console, f"{label}:")
        _print(console, verdict(health))
        for finding in health.findings:
            _print(console, f"  {_words(finding)}")
        if health.tensors:
            shown = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
            for index, heading in enumerate(COLUMNS):
                shown.add_column(heading, justify="right" if index else "left", overflow="fold")
            ill = {finding.name for finding in health.findings}
            for tensor in health.worst_first:
                shown.add_row(*map(printable, cells(tensor)), style="red" if tensor.name in ill else None)
            console.print(shown, markup=False, highlight=False)
        for note in notes(health):
            _print(console, note)


def _print(console: Console, text: str) -> None:
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def _words(finding: Finding) -> str:
    return f"{finding.name}: {finding.kind}: {finding.what} {finding.advice}"


def render(path: Path, inspected: Sequence[Inspected]) -> str:
    """Render the page: the answer first, then what is wrong, the table, and the spectra layer by layer."""
    title = f"soap inspect: {path.name}"
    sections = "".join(_section(state, number, len(inspected)) for number, state in enumerate(inspected))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}{PAGE_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
{sections}
<h2>How to read it</h2>
<p class="note">Age: steps since the last refresh. Residual: the part of a Kronecker factor that is not diagonal in its
eigenbasis, 0 when fresh. Orth.: the largest entry of QᵀQ - I. Rank: how many directions the gradient uses (effective
rank), of how many. Cond.: largest over smallest eigenvalue, at most 8.4e6 in float32. Of a tensor's axes the table
shows the worst. Update: root mean square of the last step. / weight: that over the weight's.</p>
</body></html>
"""


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
    return f"""{heading}<p class="verdict">{escape(verdict(health))}</p>
<ul>{findings}</ul>
{table(COLUMNS, map(cells, ordered), "stack") if ordered else ""}{said}
{_spectra(health, figures)}"""


def _spectra(health: Health, figures: str) -> str:
    if not any(tensor.factors for tensor in health.tensors):
        return ""
    return f"""<h2>Spectra of the factors, worst first</h2>
<p class="note">Eigenvalues over the largest, against their rank. A steep curve: the gradient uses few directions.</p>
<div class="layers">{figures}</div>"""


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
    import matplotlib as mpl
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
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": salt}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return text.getvalue().partition("<svg")[2].join(["<svg", ""])
