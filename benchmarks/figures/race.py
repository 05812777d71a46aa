"""The README's figures: every built-in task raced over three seeds at the tuned rates, on a machine left alone.

    python benchmarks/race.py            # all tasks, about 25 minutes on two cores
    python benchmarks/race.py digits     # one of them

Each race's report stays in ``races/TASK``. Its results without the per-step lists go to
``benchmarks/results/race-TASK.json``, its picture to ``docs/race-TASK.png``, and its table is printed as Markdown.
"""

import json
import shutil
import sys
from pathlib import Path

from emerging_optimizers.lab.cli import main as soap
from emerging_optimizers.lab.results import COLUMNS, Line, cells
from emerging_optimizers.lab.tasks import BUILT_IN

ROOT = Path(__file__).parent.parent
SMALL = "soap,soap-kronecker,kl-soap,adamw,muon"
# KL-SOAP was behind in the sweep on charlm, which is the long race.
OPTIMIZERS = {"charlm": "soap,soap-kronecker,adamw,muon", "digits": SMALL, "pinn": SMALL}


def race(task: str) -> None:
    folder = ROOT / "races" / task
    folder.parent.mkdir(exist_ok=True)
    words = ["race", "--task", task, "--seeds", "0,1,2", "--optimizers", OPTIMIZERS[task], "--out", str(folder)]
    words.append("--overwrite")  # a race that was stopped
    if (code := soap(words)) != 0:
        raise SystemExit(code)
    results = json.loads((folder / "results.json").read_text())
    for run in results["runs"]:
        for per_step in ("train_loss", "step_seconds", "optimizer_seconds"):
            del run[per_step]
    kept = ROOT / f"benchmarks/results/race-{task}.json"
    kept.write_text(json.dumps(results, indent=1) + "\n")
    shutil.copyfile(folder / "loss.png", ROOT / f"docs/race-{task}.png")
    print("\n| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|")
    for line in results["summary"]:
        print("| " + " | ".join(cells(Line(**line))) + " |")
    print(results["verdict"] + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or BUILT_IN:
        race(name)
