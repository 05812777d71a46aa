"""Draws the pictures of ``docs/concept.md`` from ``benchmarks/results/concept.json``.

python -m benchmarks.figures.concept_plot
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from benchmarks.common import ROOT, parser, plain, save
from benchmarks.figures.concept import ANGLES, turn
from emerging_optimizers.lab.race.plots import STYLES
from emerging_optimizers.lab.race.verdict import LABELS

WIDTH = 5.2  # inches; narrow, so that the letters stay readable where a phone scales the picture down
SOAP, ADAMW = (STYLES[name] for name in ("soap", "adamw"))
TITLES = {"straight": "valley along the axes", "turned": "the same, turned by 45°"}


def label(axes: Any, text: str, place: tuple[float, float], colour: str, **options: Any) -> None:
    """Words beside what they name, readable across lines."""
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axes.text(*place, text, color=colour, bbox=box, **options)


def draw_valley(figure: Figure, result: dict[str, Any]) -> None:
    panels = figure.subplots(1, 2)
    side = 5.2
    corners = {"straight": (-2.6, -1.3), "turned": (-4.1, -1.0)}
    words = {
        "straight": (("adamw", (-0.75, 2.5), "right"), ("soap", (0.45, 1.4), "left")),
        "turned": (("adamw", (-3.9, 0.45), "left"), ("soap", (-0.9, 1.35), "left")),
    }
    for axes, where in zip(panels, ANGLES, strict=True):
        left, bottom = corners[where]
        x, y = np.meshgrid(np.linspace(left, left + side, 300), np.linspace(bottom, bottom + side, 300))
        along = np.einsum("ki,kab->iab", turn(ANGLES[where]).numpy(), np.stack([x, y]))
        loss = 0.5 * sum(v * a**2 for v, a in zip(result["variances"], along, strict=True))
        axes.contourf(x, y, np.log10(loss + 1e-3), levels=14, cmap="Greys_r", alpha=0.3)
        for name, (colour, dashes), width in (("adamw", ADAMW, 1.0), ("soap", SOAP, 1.6)):
            path = np.array(result[f"{name}, {where}"]["path"])
            axes.plot(*path.T, color=colour, linestyle=dashes, linewidth=width, marker="o", markersize=2.2)
        for name, place, side_of in words[where]:
            colour, rate = STYLES[name][0], result[f"{name}, {where}"]["best_rate"]
            label(axes, f"{LABELS[name]}, {rate:g}", place, colour, ha=side_of, va="center", fontsize=9.5)
        start = np.array(result[f"soap, {where}"]["path"][0])
        axes.plot(*start, "o", color="black", markersize=5)
        axes.annotate("start", start, (4, 7), textcoords="offset points", fontsize=9.5)
        axes.plot(0, 0, "+", color="black", markersize=10, markeredgewidth=1.8, zorder=5)
        axes.set_title(TITLES[where], fontsize=10)
        axes.set_xlim(left, left + side)
        axes.set_ylim(bottom, bottom + side)
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("first weight")
    panels[0].set_ylabel("second weight")


def draw_rates(axes: Any, result: dict[str, Any]) -> None:
    for name, (colour, _), width in (("adamw", ADAMW, 1.4), ("soap", SOAP, 2.0)):
        for where, dashes, marker in (("straight", ":", "o"), ("turned", "-", "s")):
            sweep = result[f"{name}, {where}"]["sweep"]
            axes.plot([float(rate) for rate in sweep], list(sweep.values()), color=colour, linestyle=dashes,
                      marker=marker, markersize=4, linewidth=width)  # fmt: skip
    label(axes, "AdamW, valley turned", (0.16, 0.06), ADAMW[0])
    label(axes, "AdamW, along the axes", (0.009, 0.0021), ADAMW[0])
    label(axes, "SOAP, both valleys", (0.125, 0.009), SOAP[0])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"loss after {result['steps']} steps")


def draw_basis(figure: Figure, result: dict[str, Any]) -> None:
    panels = figure.subplots(1, 2)
    for axes, key, title in zip(panels, ("factor", "in_basis"), ("factor K", "QᵀKQ, in its eigenbasis"), strict=True):
        image = axes.imshow(np.array(result[key]), cmap="Blues", vmin=-4, vmax=0, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    bar = figure.colorbar(image, ax=panels, orientation="horizontal", shrink=0.8, aspect=30)
    bar.set_ticks([-4, -3, -2, -1, 0], labels=["≤ 0.0001", "0.001", "0.01", "0.1", "1"])
    bar.set_label("size of an entry, relative to the largest", fontsize=9)


def draw_squares(axes: Any, result: dict[str, Any]) -> None:
    for key, colour, words, place in (
        ("squares_in_basis", SOAP[0], "in the eigenbases", (60, 0.72)),
        ("squares", ADAMW[0], "in the weight's own\ncoordinates", (9, 0.24)),
    ):
        counts, share = zip(*result[key]["curve"], strict=True)
        axes.plot(counts, share, color=colour, linewidth=2)
        label(axes, f"{words}:\n90% in {result[key]['nine_tenths_in']:,} entries", place, colour, fontsize=9.5)
        axes.plot(result[key]["nine_tenths_in"], 0.9, "o", color=colour, markersize=5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(f"entries of {result['squares']['entries']:,}, largest first")
    axes.set_ylabel("share of the sum of squares")


def draw_residual(axes: Any, result: dict[str, Any]) -> None:
    residual = result["residual"]
    axes.plot(range(1, len(residual) + 1), residual, color=SOAP[0], linewidth=1.2)
    axes.axhline(result["off_diagonal"], color=ADAMW[0], linestyle=":", linewidth=1.4)
    label(axes, f"without a basis, after step {result['shown_after_step']}", (295, result["off_diagonal"] - 0.02),
          ADAMW[0], ha="right", va="top", fontsize=9.5)  # fmt: skip
    label(axes, "a refresh every 10 steps", (100, 0.5), SOAP[0], fontsize=9.5)
    axes.set_ylim(0, 1)
    axes.set_xlim(0, len(residual))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("step")
    axes.set_ylabel("residual: off-diagonal share")


def draw_frequency(axes: Any, result: dict[str, Any]) -> None:
    for key, words, (colour, dashes), up in (
        ("adamw", "AdamW", ADAMW, 4),
        ("soap, 100", "SOAP, every 100", STYLES["muon"], -2),
        ("soap, 10", "SOAP, every 10", SOAP, 0),
        ("soap, 1", "SOAP, every step", STYLES["soap-kronecker"], 0),
    ):
        run = result[key]
        axes.plot(run["steps"], run["curve"], color=colour, linestyle=dashes, linewidth=1.8)
        axes.annotate(f"{words}  {run['curve'][-1]:.3f}", (run["steps"][-1], run["curve"][-1]), (4, up), color=colour,
                      va="center", textcoords="offset points", fontsize=9, annotation_clip=False)  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(0.035, 3)
    axes.yaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.5, 1.0, 2.0]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss, nats")
    axes.set_xlim(0, 300)


def main() -> None:
    arguments = parser(__doc__, "concept.json")
    arguments.add_argument("--pictures", type=Path, default=ROOT / "docs", help="the folder for the pictures")
    given = arguments.parse_args()
    result = json.loads(given.out.read_text())
    pictures: dict[str, tuple[Callable[[Any, dict[str, Any]], None], str, float]] = {
        "valley": (draw_valley, "valley", 3.1),
        "rates": (draw_rates, "valley", 3.4),
        "basis": (draw_basis, "basis", 3.0),
        "squares": (draw_squares, "basis", 3.0),
        "residual": (draw_residual, "basis", 3.0),
        "frequency": (draw_frequency, "frequency", 3.4),
    }
    for name, (draw, part, height) in pictures.items():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        if draw in (draw_valley, draw_basis):
            draw(figure, result[part])
        else:
            axes = figure.subplots()
            draw(axes, result[part])
            plain(axes)
            axes.grid(alpha=0.2, linewidth=0.6)
        save(figure, given.pictures / f"concept-{name}.png", dpi=150)


if __name__ == "__main__":
    main()
