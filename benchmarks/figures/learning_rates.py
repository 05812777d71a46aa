r"""The race's default learning rates, from sweeps: read races, keep the best rate of each optimizer, write the tables.

A sweep is a race with several rates. These were run, Muon after AdamW, whose tuned rate its remaining parameters get:

    soap race --out sweeps/charlm-a --optimizers adamw,soap \
        --lr adamw=3e-3,4.5e-3,6e-3,1e-2 --lr soap=3e-3,6e-3,1e-2,1.5e-2
    soap race --out sweeps/charlm-b --optimizers soap-kronecker,kl-soap,muon \
        --lr soap-kronecker=3e-3,6e-3,1e-2,1.5e-2 --lr kl-soap=1.5e-3,3e-3,6e-3 --lr muon=7e-3,1.5e-2,3e-2
    python benchmarks/learning_rates.py sweeps/*/results.json

What is kept of each run (task, optimizer, rate, seed, best and final score, whether it diverged) goes to
``benchmarks/results/learning_rates.json``, the best rates to the package.
"""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks/results/learning_rates.json"
TABLE = ROOT / "emerging_optimizers/lab/learning_rates.json"


def read(path: Path) -> list[dict]:
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


def best_rates(runs: list[dict]) -> dict[str, dict[str, float]]:
    """Task -> optimizer -> the rate with the lowest median of best scores over seeds, a diverged run being infinite."""
    scores: dict[tuple[str, str], dict[float, list[float]]] = {}
    for run in runs:
        score = float("inf") if run["diverged"] else run["best"]
        scores.setdefault((run["task"], run["optimizer"]), {}).setdefault(run["lr"], []).append(score)
    table: dict[str, dict[str, float]] = {}
    for (task, optimizer), rates in scores.items():
        medians = {lr: statistics.median(values) for lr, values in rates.items()}
        best = min(medians, key=medians.__getitem__)
        edge = " (at the edge of the sweep)" if best in (min(medians), max(medians)) else ""
        shown = ", ".join(f"{lr:g}: {value:.4g}" for lr, value in sorted(medians.items()))
        print(f"{task:8} {optimizer:15} {best:g}{edge}   [{shown}]")
        table.setdefault(task, {})[optimizer] = best
    return table


def main(paths: list[str]) -> None:
    kept = [run for path in paths for run in read(Path(path))]
    table = json.loads(TABLE.read_text()) | best_rates(kept)
    KEPT.write_text("[\n" + ",\n".join(json.dumps(run) for run in kept) + "\n]\n")
    rows = [f"  {json.dumps(task)}: {json.dumps(rates)}" for task, rates in table.items()]
    TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
