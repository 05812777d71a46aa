"""What a step costs before any arithmetic: tiny parameters, SOAP beside torch's optimizers, in one process.

    python -m benchmarks.overhead               # half a minute; leave the machine alone
    python -m benchmarks.overhead --profile     # where SOAP spends it; times nothing, writes nothing
    python -m benchmarks.overhead --cases 16,shapes --rounds 1 --steps 3 --out overhead.json  # a dry run, seconds

A case is a number of 4 x 4 parameters, which are one bucket, or ``shapes``: 64 parameters of 64 shapes from 2 x 2 to
9 x 9, each a bucket of its own. No refresh falls into the timing. The optimizers take turns, a round of some steps
each; reported is the median over rounds of a round's median step.
"""

import argparse
import cProfile
import json
import pstats
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.step_time import BETAS, OPTIMIZERS, ROOT, Maker, Trial, available, heading

#: No step of a run is a multiple of it, so that only the first bases are formed, in the warm-up.
NEVER = 10**9
WARM_UP = 5


def adamw_foreach(parameters: list[Tensor], frequency: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, foreach=True, **BETAS)


TINY: tuple[int, ...] = (4, 4)
CASES: dict[str, list[tuple[int, ...]]] = {
    "16": 16 * [TINY],
    "64": 64 * [TINY],
    "256": 256 * [TINY],
    "shapes": [(rows, columns) for rows in range(2, 10) for columns in range(2, 10)],
}
MAKERS: dict[str, Maker] = {
    "soap": OPTIMIZERS["soap"],
    "adamw-foreach": adamw_foreach,
    "adamw-fused": OPTIMIZERS["adamw"],
    "muon": OPTIMIZERS["muon"],
}


def warm_trial(name: str, case: str, device: str) -> Trial:
    trial = Trial(MAKERS[name], CASES[case], NEVER, device)
    trial.play(WARM_UP)
    return trial


def measure(case: str, optimizers: list[str], rounds: int, steps: int, device: str) -> dict[str, Any]:
    count = len(CASES[case])
    trials = {name: warm_trial(name, case, device) for name in optimizers}
    medians: dict[str, list[float]] = {name: [] for name in optimizers}
    for number in range(rounds):
        for name in optimizers[:: 1 if number % 2 else -1]:
            medians[name].append(1000 * median(trials[name].play(steps)))
    return {
        "case": case,
        "parameters": count,
        "shapes": len(set(CASES[case])),
        "optimizers": {
            name: {
                "us_per_step": round(median(times), 1),
                "us_per_parameter": round(median(times) / count, 2),
                "rounds_us": [round(time, 1) for time in times],
            }
            for name, times in medians.items()
        },
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| parameters | shapes | optimizer | us per step | us per parameter |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        for name, line in result["optimizers"].items():
            cells = (result["parameters"], result["shapes"], name, line["us_per_step"], line["us_per_parameter"])
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def profile(case: str, steps: int, device: str) -> None:
    trial = warm_trial("soap", case, device)
    profiler = cProfile.Profile()
    for _ in range(steps):
        profiler.runcall(trial.optimizer.step)
    print(f"\ncase {case}: {steps} steps of {len(CASES[case])} parameters, {len(set(CASES[case]))} shapes")
    statistics = pstats.Stats(profiler).strip_dirs()
    statistics.sort_stats("tottime").print_stats(25)
    statistics.sort_stats("cumulative").print_stats(40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--optimizers", default=",".join(MAKERS), help=f"of {', '.join(MAKERS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="per round, or of a profile")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/overhead.json")
    parser.add_argument("--profile", action="store_true", help="print where SOAP spends it (cProfile), and do no more")
    given = parser.parse_args()
    if given.profile:
        for case in given.cases.split(","):
            profile(case, given.steps, given.device)
        return
    optimizers = available(given.optimizers.split(","))
    results = [measure(case, optimizers, given.rounds, given.steps, given.device) for case in given.cases.split(",")]
    print(table(results))
    given.out.write_text(json.dumps({**heading(given.device), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
