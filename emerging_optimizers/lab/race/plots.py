"""The curves of a race, as matplotlib figures without global state."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, BinaryIO, Literal

from emerging_optimizers.lab.page import plain_axes, render_svg
from emerging_optimizers.lab.race.race import Record
from emerging_optimizers.lab.race.verdict import LABELS, Line, best_runs, score, seconds_at_evaluations

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart under the common colour blindnesses; the dashes tell them apart in grey.
STYLES = {
    "soap": ("#0072B2", "-"),
    "soap-kronecker": ("#D55E00", "-"),
    "kl-soap": ("#CC79A7", (0, (6, 1))),
    "adamw": ("#4d4d4d", (0, (5, 2))),
    "muon": ("#009E73", (0, (4, 1, 1, 1))),
}
AXES: dict[str, Callable[[Record], Sequence[float]]] = {
    "optimizer steps": lambda record: record.eval_steps,
    "training seconds": seconds_at_evaluations,
}


def write_png(file: BinaryIO, lines: Sequence[Line], records: Sequence[Record], title: str, metric: str) -> None:
    """Draw the scores against steps and against seconds, side by side."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, x_label in zip(figure.subplots(1, 2, sharey=True), AXES, strict=True):
        _draw(axes, lines, records, x_label)
    figure.axes[0].set_ylabel(metric, parse_math=False)
    _legend(figure, "outside right center", columns=1)
    figure.suptitle(title, parse_math=False)
    figure.savefig(file, format="png", dpi=150)


def svg(lines: Sequence[Line], records: Sequence[Record], x_label: str, metric: str) -> str:
    """Draw the scores against one of `AXES`, as an SVG element to put into a page."""
    from matplotlib.figure import Figure

    # Narrow, so that the letters stay readable where a phone scales the picture down.
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.subplots()
    _draw(axes, lines, records, x_label)
    axes.set_ylabel(metric, parse_math=False)
    _legend(figure, "outside upper left", columns=2)
    return render_svg(figure, x_label)


def _draw(axes: Axes, lines: Sequence[Line], records: Sequence[Record], x_label: str) -> None:
    drawn: list[float] = []  # scores after the first tenth, which decide the visible range
    for line in lines:
        runs = best_runs(records, line.optimizer)
        colour, dashes = STYLES[line.optimizer]
        label = f"{LABELS[line.optimizer]}  {'diverged' if line.best is None else score(line.best)}"
        x, y = _median_curve(runs, AXES[x_label])
        axes.plot(x, y, color=colour, linestyle=dashes, linewidth=2, label=label)
        for run in runs if len(runs) > 1 else []:
            axes.plot(AXES[x_label](run), run.validation, color=colour, alpha=0.3, linewidth=0.8)
        drawn += [value for run in runs for value in run.validation[max(1, len(run.validation) // 10) :]]
        if line.optimizer == "adamw" and line.best is not None:
            axes.axhline(line.best, color=colour, linestyle=":", linewidth=1)
            # On the left, where every curve is still far above.
            axes.annotate("AdamW's best", (0.01, line.best), xycoords=("axes fraction", "data"), va="bottom",
                          fontsize=8, color=colour)  # fmt: skip
    if drawn and min(drawn) > 0 and max(drawn) > 5 * min(drawn):
        axes.set_yscale("log")
    elif drawn:
        # The fall from the start would flatten everything that the race is about.
        margin = 0.05 * (max(drawn) - min(drawn)) or 1.0
        axes.set_ylim(min(drawn) - margin, max(drawn) + margin)
    axes.set_xlabel(x_label)
    plain_axes(axes)


def _legend(figure: Figure, place: Literal["outside right center", "outside upper left"], columns: int) -> None:
    """Name the curves and their best scores, beside the axes: where in them is room depends on the race."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc=place, ncols=columns, frameon=False, title="best", alignment="left")


def _median_curve(runs: Sequence[Record], x_of: Callable[[Record], Sequence[float]]) -> tuple[list[float], list[float]]:
    """Take the median over seeds of both coordinates, evaluation by evaluation, as far as any seed got."""

    def medians(columns: Sequence[Sequence[float]]) -> list[float]:
        return [statistics.median(v for v in row if v is not None) for row in zip_longest(*columns)]

    return medians([x_of(run) for run in runs]), medians([run.validation for run in runs])
