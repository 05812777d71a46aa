"""What a step costs before any arithmetic: tiny parameters, SOAP beside torch's optimizers, in one process.

    python -m benchmarks.speed.overhead               # half a minute; leave the machine alone
    python -m benchmarks.speed.overhead --profile     # where SOAP spends it; times nothing, writes nothing
    python -m benchmarks.speed.overhead --cases 16,shapes --rounds 1 --steps 3 --out overhead.json  # a dry run, seconds

A case is a number of 4 x 4 parameters, which are one stack, or ``shapes``: 64 parameters of 64 shapes from 2 x 2 to
9 x 9, each a stack of its own. No refresh falls into the timing. The optimizers take turns, a round of some steps
each; reported is the median over rounds of a round's median step.
"""

import cProfile
import pstats
from statistics import median
from typing import Any

from benchmarks.common import Shape, Trial, heading, parser, table, write

#: No step of a run is a multiple of it, so that only the first bases are formed, in the warm-up.
NEVER = 10**9
WARM_UP = 5
OPTIMIZERS = "soap,adamw-foreach,adamw,muon"
CASES: dict[str, list[Shape]] = {
    **{str(count): count * [(4, 4)] for count in (16, 64, 256)},
    "shapes": [(rows, columns) for rows in range(2, 10) for columns in range(2, 10)],
}


def warm_trial(name: str, case: str, device: str) -> Trial:
    trial = Trial(name, CASES[case], NEVER, device)
    trial.play(WARM_UP)
    return trial


def measure(case: str, optimizers: list[str], rounds: int, steps: int, device: str) -> dict[str, Any]:
    count = len(CASES[case])
    trials = {name: warm_trial(name, case, device) for name in optimizers}
    medians: dict[str, list[float]] = {name: [] for name in optimizers}
    for number in range(rounds):
        for name in optimizers[:: 1 if number % 2 else -1]:
            medians[name].append(1000 * median(trials[name].play(steps)))
    lines = {
        name: {
            "us_per_step": round(median(times), 1),
            "us_per_parameter": round(median(times) / count, 2),
            "rounds_us": [round(time, 1) for time in times],
        }
        for name, times in medians.items()
    }
    return {"case": case, "parameters": count, "shapes": len(set(CASES[case])), "optimizers": lines}


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
    arguments = parser(__doc__, "overhead.json", device=True)
    arguments.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    arguments.add_argument("--optimizers", default=OPTIMIZERS, help=f"of {OPTIMIZERS}")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--steps", type=int, default=20, help="per round, or of a profile")
    arguments.add_argument("--profile", action="store_true", help="print where SOAP spends it (cProfile), do no more")
    given = arguments.parse_args()
    cases, optimizers = given.cases.split(","), given.optimizers.split(",")
    if given.profile:
        for case in cases:
            profile(case, given.steps, given.device)
        return
    results = [measure(case, optimizers, given.rounds, given.steps, given.device) for case in cases]
    rows = [
        [result["parameters"], result["shapes"], name, line["us_per_step"], line["us_per_parameter"]]
        for result in results
        for name, line in result["optimizers"].items()
    ]
    print(table("parameters | shapes | optimizer | us per step | us per parameter", rows))
    write(given.out, {**heading(given.device), "results": results})


if __name__ == "__main__":
    main()
