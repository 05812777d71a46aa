r"""The race's default learning rates, from sweeps: read races, keep the best rate of each optimizer, write the tables.

A sweep is a race with several rates. These were run, Muon after AdamW, whose tuned rate its remaining parameters get:

    soap race --out sweeps/charlm-a --optimizers adamw,soap \
        --lr adamw=3e-3,4.5e-3,6e-3,1e-2 --lr soap=3e-3,6e-3,1e-2,1.5e-2
    soap race --out sweeps/charlm-b --optimizers soap-kronecker,kl-soap,muon \
        --lr soap-kronecker=3e-3,6e-3,1e-2,1.5e-2 --lr kl-soap=1.5e-3,3e-3,6e-3 --lr muon=7e-3,1.5e-2,3e-2
    python -m benchmarks.figures.learning_rates sweeps/*/results.json

What is kept of each run (task, optimizer, rate, seed, best and final score, whether it diverged) goes to the result
file, the best rates to the package.
"""

import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import ROOT, parser, write

Run = dict[str, Any]


def read(path: Path) -> list[Run]:
    """The runs of one race, each with what identifies it."""
    race = json.loads(path.read_text())
    if not race["finished"]:
        raise SystemExit(f"{path}: the race was not finished")
    same = {"task": race["task"]["name"], "steps": race["task"]["steps"], "date": race["date"][:10]}
    same |= {"cpu": race["machine"]["cpu"], "torch": race["versions"]["torch"]}
    return [
        same
        | {key: run[key] for key in ("optimizer", "lr", "seed", "diverged")}
        | {"best": min(run["validation"]), "final": run["validation"][-1]}
        for run in race["runs"]
    ]


def best_rates(runs: list[Run]) -> dict[str, dict[str, float]]:
    """Task -> optimizer -> the rate with the lowest median of best scores over seeds, a diverged run being infinite."""
    scores: dict[tuple[str, str], dict[float, list[float]]] = {}
    for run in runs:
        score = float("inf") if run["diverged"] else run["best"]
        scores.setdefault((run["task"], run["optimizer"]), {}).setdefault(run["lr"], []).append(score)
    found: dict[str, dict[str, float]] = {}
    for (task, optimizer), rates in scores.items():
        medians = {lr: median(values) for lr, values in rates.items()}
        best = min(medians, key=medians.__getitem__)
        edge = " (at the edge of the sweep)" if best in (min(medians), max(medians)) else ""
        shown = ", ".join(f"{lr:g}: {value:.4g}" for lr, value in sorted(medians.items()))
        print(f"{task:8} {optimizer:15} {best:g}{edge}   [{shown}]")
        found.setdefault(task, {})[optimizer] = best
    return found


def main() -> None:
    arguments = parser(__doc__, "learning_rates.json")
    arguments.add_argument("races", nargs="+", type=Path, help="results.json of races")
    tuned = ROOT / "emerging_optimizers/lab/learning_rates.json"
    arguments.add_argument(
        "--table", type=Path, default=tuned, help="the package's rates, which are brought up to date"
    )
    given = arguments.parse_args()
    kept = [run for path in given.races for run in read(path)]
    write(given.out, kept)
    write(given.table, json.loads(given.table.read_text()) | best_rates(kept))


if __name__ == "__main__":
    main()
