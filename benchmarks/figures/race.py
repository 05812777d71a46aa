"""The README's figures: every built-in task raced over three seeds at the tuned rates, on a machine left alone.

    python -m benchmarks.figures.race            # all tasks, about 25 minutes on two cores
    python -m benchmarks.figures.race digits     # one of them
    python -m benchmarks.figures.race digits --steps 20 --out /tmp/results --docs /tmp/docs   # a dry run

Each race's report goes to ``races/TASK``, its results without the per-step lists to ``race-TASK.json``, its picture to
``docs/race-TASK.png``, and its table is printed as Markdown.
"""

import argparse
import json
import shutil
from pathlib import Path

from benchmarks.common import ROOT, parser, table, write
from emerging_optimizers.lab.cli import main as soap
from emerging_optimizers.lab.race.verdict import COLUMNS, Line, cells
from emerging_optimizers.lab.tasks import BUILT_IN

SMALL = "soap,soap-kronecker,kl-soap,adamw,muon"
# KL-SOAP was behind in the sweep on charlm, which is the long race.
OPTIMIZERS = {"charlm": "soap,soap-kronecker,adamw,muon", "digits": SMALL, "pinn": SMALL}


def race(task: str, given: argparse.Namespace) -> None:
    folder = given.docs.parent / "races" / task
    for place in (folder.parent, given.docs):
        place.mkdir(exist_ok=True)
    words = ["race", "--task", task, "--seeds", "0,1,2", "--optimizers", OPTIMIZERS[task], "--out", str(folder)]
    words.append("--overwrite")  # a race that was stopped
    if (code := soap(words + (["--steps", str(given.steps)] if given.steps else []))) != 0:
        raise SystemExit(code)
    results = json.loads((folder / "results.json").read_text())
    for run in results["runs"]:
        for per_step in ("train_loss", "step_seconds", "optimizer_seconds"):
            del run[per_step]
    write(given.out / f"race-{task}.json", results)
    shutil.copyfile(folder / "loss.png", given.docs / f"race-{task}.png")
    print("\n" + table(" | ".join(COLUMNS), [cells(Line(**line)) for line in results["summary"]]))
    print(results["verdict"] + "\n")


def main() -> None:
    arguments = parser(__doc__, "")
    arguments.add_argument("tasks", nargs="*", default=BUILT_IN)
    arguments.add_argument("--steps", type=int, help="instead of the task's")
    arguments.add_argument("--docs", type=Path, default=ROOT / "docs", help="the folder for the pictures")
    given = arguments.parse_args()
    for task in given.tasks:
        race(task, given)


if __name__ == "__main__":
    main()
