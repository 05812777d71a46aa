"""Where the time of a step goes: products, decompositions, elementwise work, copies, and what is none of torch's.

    python -m benchmarks.step_profile                                      # the CPU part; leave the machine alone
    python -m benchmarks.step_profile --sets gpt2-124m --device cuda --out profile.json

For each set, torch's profiler watches some steps without a refresh and as many in which all eigenbases are refreshed.
An operator's time is its own, without the operators it calls; on a GPU, that of the kernels it starts. The rest is what
is left of the wall time: Python, views, and on a GPU the time in which it waits for work. The profiler itself costs
time, which is why the steps are timed without it too. Results go to ``benchmarks/results/step_profile.json``.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.parameter_sets import PARAMETER_SETS
from benchmarks.step_time import ROOT, Trial, heading, wait, warm_trial

FREQUENCY = 10
STEPS = 5
#: An operator belongs to the first kind whose words are in its name.
KINDS: dict[str, tuple[str, ...]] = {
    "products": ("mm", "matmul"),
    "decompositions": ("geqrf", "householder_product", "eigh", "triangular", "cholesky", "svd"),
    "copies": ("copy", "cat", "gather", "fill", "zero", "index", "clone", "memcpy", "memset", "pad", "diag_embed"),
}
#: Work on tensors without a product, and what does none.
ELEMENTWISE, REST = "elementwise", "rest"
VIEWS = ("view", "slice", "select", "transpose", "permute", "squeeze", "bind", "split", "expand", "stride", "diagonal",
         "narrow", "reshape", "detach", "empty", "alias", "mT", "flatten", "item", "resolve")  # fmt: skip


def kind_of(name: str) -> str:
    kinds = {**KINDS, REST: VIEWS}
    return next((kind for kind, words in kinds.items() if any(word in name for word in words)), ELEMENTWISE)


def profiled(trial: Trial, steps: int) -> dict[str, Any]:
    """Milliseconds per step: timed, timed under the profiler, by kind, and the operators that take most."""
    unwatched = median(trial.play(steps))
    on_gpu = trial.device != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    kinds: dict[str, float] = defaultdict(float)
    operators: dict[str, dict[str, float]] = defaultdict(lambda: {"ms": 0.0, "calls": 0.0})
    watched = 0.0
    for _ in range(steps):
        trial.set_gradients()
        wait(trial.device)
        with profile(activities=activities) as seen:
            begin = perf_counter()
            trial.optimizer.step()
            wait(trial.device)
            watched += 1000 * (perf_counter() - begin) / steps
        for event in seen.key_averages():
            if event.key.startswith("aten::"):
                name = event.key.removeprefix("aten::")
                own = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000 / steps
                kinds[kind_of(name)] += own
                operators[name]["ms"] += own
                operators[name]["calls"] += event.count / steps
    kinds[REST] = max(0.0, watched - sum(time for kind, time in kinds.items() if kind != REST))
    most = sorted(operators, key=lambda name: -operators[name]["ms"])[:12]
    return {
        "ms": round(unwatched, 2),
        "ms_under_profiler": round(watched, 2),
        "kinds_ms": {kind: round(kinds[kind], 2) for kind in (*KINDS, ELEMENTWISE, REST)},
        "operators": {name: {key: round(value, 3) for key, value in operators[name].items()} for name in most},
    }


def measure(name: str, device: str) -> dict[str, Any]:
    """Steps without a refresh, and at frequency 1, where every step has one."""
    shapes = PARAMETER_SETS[name]
    trial = warm_trial("soap", shapes, FREQUENCY, device)  # the next refresh is eight steps away
    trial.optimizer.param_groups[0]["precondition_frequency"] = 10**6
    plain = profiled(trial, STEPS)
    trial.optimizer.param_groups[0]["precondition_frequency"] = 1
    trial.play(2)
    return {"set": name, "without refresh": plain, "every basis refreshed": profiled(trial, STEPS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default="gpt-d128x8,gpt-d512x2", help=f"of {', '.join(PARAMETER_SETS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/step_profile.json")
    given = parser.parse_args()
    results = [measure(name, given.device) for name in given.sets.split(",")]
    columns = (*KINDS, ELEMENTWISE, REST)
    print("| Set | | ms | " + " | ".join(columns) + " |\n" + "| --- " * (3 + len(columns)) + "|")
    for result in results:
        for which in ("without refresh", "every basis refreshed"):
            line = result[which]
            shares = [f"{line['kinds_ms'][kind] / line['ms_under_profiler']:.0%}" for kind in columns]
            print(f"| {result['set']} | {which} | {line['ms']} | " + " | ".join(shares) + " |")
    given.out.write_text(json.dumps({**heading(given.device), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
