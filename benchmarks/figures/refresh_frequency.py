"""How the loss depends on the refresh frequency: `digits` and `pinn`, three seeds, every frequency at the same rates.

    python benchmarks/refresh_frequency.py            # both tasks
    python benchmarks/refresh_frequency.py digits     # one of them; the other's results are kept

Each task is raced by plain SOAP and by ``second_moment_refresh="kronecker"``, at the rate that its sweep found for
frequency 10 and at half of that, in case stale bases want smaller steps. Losses only: nothing is timed, so the machine
may be busy. What is kept of each run goes to ``benchmarks/results/refresh_frequency.json``, and a table of medians of
final scores, at the better of the two rates, is printed as Markdown.
"""

import json
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from emerging_optimizers.lab.machine import machine, versions
from emerging_optimizers.lab.optimizers import tuned_rate
from emerging_optimizers.lab.options import Options
from emerging_optimizers.lab.race import Race
from emerging_optimizers.lab.results import score

RESULTS = Path(__file__).parent / "results/refresh_frequency.json"
TASKS = ("digits", "pinn")
OPTIMIZERS = ("soap", "soap-kronecker")
FREQUENCIES = (1, 3, 10, 30, 100)
SEEDS = (0, 1, 2)


def runs_of(task: str, frequency: int) -> list[dict]:
    rates = {name: (tuned_rate(task, name) / 2, tuned_rate(task, name)) for name in OPTIMIZERS}
    race = Race(Options(task, None, rates, SEEDS, None, frequency, threads=1))
    for _ in race.play():
        pass
    records = [run.record for run in race.runs]
    return [
        {"task": task, "steps": race.steps, "frequency": frequency, "optimizer": r.optimizer, "lr": r.lr}
        | {"seed": r.seed, "final": r.validation[-1], "best": min(r.validation), "diverged": r.diverged}
        for r in records
    ]


def median_final(runs: list[dict], **wanted: object) -> tuple[float, float]:
    """The lowest median of final scores over the rates, and the rate that has it; a diverged run is infinite."""
    chosen = [run for run in runs if all(run[key] == value for key, value in wanted.items())]
    finals: dict[float, list[float]] = {}
    for run in chosen:
        finals.setdefault(run["lr"], []).append(float("inf") if run["diverged"] else run["final"])
    return min((statistics.median(values), lr) for lr, values in finals.items())


def main(tasks: list[str]) -> None:
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    runs = [run for run in kept if run["task"] not in tasks]
    for task in tasks:
        for frequency in FREQUENCIES:
            runs += runs_of(task, frequency)
            print(f"{task}, every {frequency} steps: done", file=sys.stderr)
    about = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions()}
    rows = ",\n".join(json.dumps(run) for run in runs)
    RESULTS.write_text(json.dumps(about, indent=1)[:-2] + f',\n "runs": [\n{rows}\n ]\n}}\n')

    print("| Task | Refresh | " + " | ".join(map(str, FREQUENCIES)) + " |\n" + "| --- " * (2 + len(FREQUENCIES)) + "|")
    for task in dict.fromkeys(run["task"] for run in runs):
        for name in OPTIMIZERS:
            medians = [median_final(runs, task=task, optimizer=name, frequency=f) for f in FREQUENCIES]
            print(f"| `{task}` | {name} | " + " | ".join(f"{score(m)} ({lr:g})" for m, lr in medians) + " |")


if __name__ == "__main__":
    main(sys.argv[1:] or list(TASKS))
