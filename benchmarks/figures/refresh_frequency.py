"""How the loss depends on the refresh frequency: `digits` and `pinn`, three seeds, every frequency at the same rates.

    python -m benchmarks.figures.refresh_frequency            # both tasks
    python -m benchmarks.figures.refresh_frequency digits     # one of them; the other's results are kept

Each task is raced by plain SOAP and by ``second_moment_refresh="kronecker"``, at the rate that its sweep found for
frequency 10 and at half of that, in case stale bases want smaller steps. Losses only: nothing is timed, so the machine
may be busy. A table of medians of final scores, at the better of the two rates, is printed as Markdown.
"""

import json
import sys
from statistics import median
from typing import Any

from benchmarks.common import heading, parser, race, table, write
from emerging_optimizers.lab.race.optimizers import tuned_rate
from emerging_optimizers.lab.race.verdict import score

TASKS = ("digits", "pinn")
OPTIMIZERS = ("soap", "soap-kronecker")
FREQUENCIES = (1, 3, 10, 30, 100)
SEEDS = (0, 1, 2)


def runs_of(task: str, frequency: int, steps: int | None) -> list[dict[str, Any]]:
    rates = {name: (tuned_rate(task, name) / 2, tuned_rate(task, name)) for name in OPTIMIZERS}
    played = race(task, rates, SEEDS, frequency, steps)
    for _ in played.play():
        pass
    return [
        {"task": task, "steps": played.steps, "frequency": frequency, "optimizer": r.optimizer, "lr": r.lr}
        | {"seed": r.seed, "final": r.validation[-1], "best": min(r.validation), "diverged": r.diverged}
        for r in (run.record for run in played.runs)
    ]


def median_final(runs: list[dict[str, Any]], **wanted: object) -> tuple[float, float]:
    """The lowest median of final scores over the rates, and the rate that has it; a diverged run is infinite."""
    finals: dict[float, list[float]] = {}
    for run in runs:
        if all(run[key] == value for key, value in wanted.items()):
            finals.setdefault(run["lr"], []).append(float("inf") if run["diverged"] else run["final"])
    return min((median(values), lr) for lr, values in finals.items())


def main() -> None:
    arguments = parser(__doc__, "refresh_frequency.json")
    arguments.add_argument("tasks", nargs="*", default=TASKS)
    arguments.add_argument("--steps", type=int, help="instead of the task's")
    given = arguments.parse_args()
    kept = json.loads(given.out.read_text())["runs"] if given.out.exists() else []
    runs = [run for run in kept if run["task"] not in given.tasks]
    for task in given.tasks:
        for frequency in FREQUENCIES:
            runs += runs_of(task, frequency, given.steps)
            print(f"{task}, every {frequency} steps: done", file=sys.stderr)
    write(given.out, {**heading(), "runs": runs})
    rows = []
    for task in dict.fromkeys(run["task"] for run in runs):
        for name in OPTIMIZERS:
            medians = [median_final(runs, task=task, optimizer=name, frequency=f) for f in FREQUENCIES]
            rows.append([f"`{task}`", name, *(f"{score(m)} ({lr:g})" for m, lr in medians)])
    print(table(" | ".join(["Task", "Refresh", *map(str, FREQUENCIES)]), rows))


if __name__ == "__main__":
    main()
