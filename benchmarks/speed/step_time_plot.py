"""Draws the pictures of ``docs/performance.md`` from ``benchmarks/results/step_time.json``.

python -m benchmarks.speed.step_time_plot
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from benchmarks.common import COLOURS, ROOT, parser, plain, save


def bars(axes: Any, result: dict[str, Any]) -> None:
    lines = sorted(result["optimizers"].items(), key=lambda item: -item[1]["over_floor"])
    axes.barh([name for name, _ in lines], [line["over_floor"] for _, line in lines],
              color=[COLOURS[name] for name, _ in lines])  # fmt: skip
    for place, (_, line) in enumerate(lines):
        beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # hides the line of the floor
        axes.annotate(f"{line['over_floor']:g}", (line["over_floor"], place), **beside, bbox=box)
    axes.axvline(1, color="black", linewidth=1, zorder=2)
    axes.set_xlabel("mean step / floor")


def steps(axes: Any, result: dict[str, Any]) -> None:
    for name, line in result["optimizers"].items():
        if name not in ("adamw", "muon"):
            times = [time for times in line["steps_ms"] for time in times]
            axes.plot(range(1, len(times) + 1), times, label=name, color=COLOURS[name], linewidth=1.2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step")
    axes.set_ylabel("ms")
    axes.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.1), ncols=2)


def main() -> None:
    arguments = parser(__doc__, "step_time.json")
    arguments.add_argument("--pictures", type=Path, default=ROOT / "docs", help="the folder for the pictures")
    given = arguments.parse_args()
    results = json.loads(given.out.read_text())["results"]
    periodic = [result for result in results if result["frequency"] > 1]
    for kind, draw, shown in (("ratio", bars, results), ("flatness", steps, periodic)):
        rows = (len(shown) + 1) // 2
        figure = Figure(figsize=(9, 2.9 * rows))
        for axes, result in zip(figure.subplots(rows, 2, squeeze=False).flat, shown, strict=False):
            draw(axes, result)
            axes.set_title(f"{result['set']}, frequency {result['frequency']}", fontsize=10)
            plain(axes)
        figure.tight_layout()
        save(figure, given.pictures / f"step-time-{kind}.png")


if __name__ == "__main__":
    main()
