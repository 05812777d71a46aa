"""How the mean time of an optimizer step grows with the width and with the number of layers, SOAP's beside torch's.

    python -m benchmarks.speed.growth                 # three minutes on two cores; leave the machine alone
    python -m benchmarks.speed.growth --redraw        # only the picture, from the result file
    python -m benchmarks.speed.growth --widths 16,32 --layers 1,2 --rounds 1 --seconds 0 \
        --out growth.json --picture growth.png  # a dry run, seconds

The weights are a GPT's, without embeddings: 2 layers of each width, and each number of layers of width 128. All
optimizers of a point are in one process and take turns, a round of one refresh period each; reported are medians over
rounds of a round's mean. A point has ``--rounds`` rounds and as many more as begin within ``--seconds``. ``floor`` is
that of ``step_time.py``, but at the rate of one d x d product at a time, d the width, measured in the same rounds.
Batched products of small matrices may be faster than that.
"""

import json
import time
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

from benchmarks.common import (
    COLOURS,
    ROOT,
    floor_flops,
    gpt,
    heading,
    matmul_rate,
    parser,
    plain,
    save,
    warm_trial,
    write,
)

OPTIMIZERS = "soap,adamw,muon"
LABELS = {"soap": "SOAP", "adamw": "AdamW, fused", "muon": "Muon"}
FREQUENCY = 10
#: What is held while the other one grows.
LAYERS, WIDTH = 2, 128


def measure(width: int, layers: int, optimizers: list[str], rounds: int, seconds: float, device: str) -> dict[str, Any]:
    shapes = gpt(width, layers)
    trials = {name: warm_trial(name, shapes, FREQUENCY, device) for name in optimizers}
    means: dict[str, list[float]] = {name: [] for name in optimizers}
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while len(rates) < rounds or time.perf_counter() < end:
        rates.append(matmul_rate(device, width))
        for name in optimizers[:: 1 if len(rates) % 2 else -1]:
            times = trials[name].play(FREQUENCY)
            means[name].append(sum(times) / len(times))
    floor = 1000 * floor_flops(shapes) / median(rates)
    return {
        "width": width,
        "layers": layers,
        "parameters": sum(map(prod, shapes)),
        "floor_ms": round(floor, 4),
        "gflops": round(median(rates) / 1e9, 1),
        "optimizers": {
            name: {
                "mean_ms": round(median(times), 4),
                "over_floor": round(median(times) / floor, 2),
                "rounds_ms": [round(time, 4) for time in times],
            }
            for name, times in means.items()
        },
    }


def line_of(point: dict[str, Any]) -> str:
    cells = [f"d={point['width']}", f"{point['layers']} layers", f"{point['parameters'] / 1e6:.2f}M"]
    cells.append(f"floor {point['floor_ms']:.3g} ms at {point['gflops']} GFLOP/s")
    for name, line in point["optimizers"].items():
        cells.append(f"{name} {line['mean_ms']:.3g} ms ({line['over_floor']} x)")
    return ", ".join(cells)


def draw(points: list[dict[str, Any]], picture: Path) -> None:
    panels = (
        ("width", f"width d, {LAYERS} layers", [point for point in points if point["layers"] == LAYERS]),
        ("layers", f"layers, d = {WIDTH}", [point for point in points if point["width"] == WIDTH]),
    )
    figure = Figure(figsize=(9, 3.6))
    both = figure.subplots(1, 2)
    for axes, (key, label, shown) in zip(both, panels, strict=True):
        shown = sorted(shown, key=lambda point: point[key])
        places = [point[key] for point in shown]
        axes.plot(places, [point["floor_ms"] for point in shown], color="black", linewidth=1, label="floor")
        for name in shown[0]["optimizers"]:
            times = [point["optimizers"][name]["mean_ms"] for point in shown]
            axes.plot(places, times, marker="o", markersize=4, linewidth=1.2, color=COLOURS[name], label=LABELS[name])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.set_ylabel("ms per step, mean")
        plain(axes)
    both[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    save(figure, picture)


def main() -> None:
    arguments = parser(__doc__, "growth.json", device=True)
    arguments.add_argument("--widths", default="64,128,256,384,512", help=f"of {LAYERS} layers")
    arguments.add_argument("--layers", default="1,2,4,8,16,32", help=f"of width {WIDTH}")
    arguments.add_argument("--optimizers", default=OPTIMIZERS, help=f"of {OPTIMIZERS}")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--seconds", type=float, default=2.0)
    arguments.add_argument("--picture", type=Path, default=ROOT / "docs/growth.png")
    arguments.add_argument("--redraw", action="store_true", help="measure nothing, draw what --out has")
    given = arguments.parse_args()
    if not given.redraw:
        wanted = {(int(width), LAYERS) for width in given.widths.split(",")}
        wanted |= {(WIDTH, int(layers)) for layers in given.layers.split(",")}
        optimizers, points = given.optimizers.split(","), []
        for width, layers in sorted(wanted):
            points.append(measure(width, layers, optimizers, given.rounds, given.seconds, given.device))
            print(line_of(points[-1]), flush=True)
        write(given.out, {**heading(given.device), "frequency": FREQUENCY, "points": points})
    draw(json.loads(given.out.read_text())["points"], given.picture)


if __name__ == "__main__":
    main()
