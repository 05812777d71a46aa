"""Where the time of a step goes: products, decompositions, elementwise work, copies, and what is none of torch's.

    python -m benchmarks.speed.step_profile                            # the CPU part; leave the machine alone
    python -m benchmarks.speed.step_profile --sets gpt2-124m --device cuda --out profile.json

For each set, torch's profiler watches some steps without a refresh and as many in which all eigenbases are refreshed.
An operator's time is its own, without the operators it calls; on a GPU, that of the kernels it starts. The rest is what
is left of the wall time: Python, views, and on a GPU the time in which it waits for work. The profiler itself costs
time, which is why the steps are timed without it too.
"""

from collections import defaultdict
from statistics import median
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.common import PARAMETER_SETS, Trial, heading, parser, seconds, table, warm_trial, write

FREQUENCY = 10
STEPS = 5
WHICH = ("without refresh", "every basis refreshed")
#: Work on tensors without a product, and what does none.
ELEMENTWISE, REST = "elementwise", "rest"
#: An operator belongs to the first kind whose words are in its name.
KINDS: dict[str, tuple[str, ...]] = {
    "products": ("mm", "matmul"),
    "decompositions": ("geqrf", "householder_product", "eigh", "triangular", "cholesky", "svd"),
    "copies": ("copy", "cat", "gather", "fill", "zero", "index", "clone", "memcpy", "memset", "pad", "diag_embed"),
    REST: ("view", "slice", "select", "transpose", "permute", "squeeze", "bind", "split", "expand", "stride",
           "diagonal", "narrow", "reshape", "detach", "empty", "alias", "mT", "flatten", "item", "resolve"),
}  # fmt: skip
COLUMNS = ("products", "decompositions", "copies", ELEMENTWISE, REST)


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), ELEMENTWISE)


def profiled(trial: Trial) -> dict[str, Any]:
    """Milliseconds per step: timed, timed under the profiler, by kind, and the operators that take most."""
    unwatched = median(trial.play(STEPS))
    on_gpu = trial.device != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    kinds: dict[str, float] = defaultdict(float)
    operators: dict[str, dict[str, float]] = defaultdict(lambda: {"ms": 0.0, "calls": 0.0})
    watched = 0.0
    for _ in range(STEPS):
        trial.set_gradients()
        with profile(activities=activities) as seen:
            watched += 1000 * seconds(trial.optimizer.step, trial.device) / STEPS
        for event in seen.key_averages():
            if event.key.startswith("aten::"):
                name = event.key.removeprefix("aten::")
                own = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000 / STEPS
                kinds[kind_of(name)] += own
                operators[name]["ms"] += own
                operators[name]["calls"] += event.count / STEPS
    kinds[REST] = max(0.0, watched - sum(time for kind, time in kinds.items() if kind != REST))
    most = sorted(operators, key=lambda name: -operators[name]["ms"])[:12]
    return {
        "ms": round(unwatched, 2),
        "ms_under_profiler": round(watched, 2),
        "kinds_ms": {kind: round(kinds[kind], 2) for kind in COLUMNS},
        "operators": {name: {key: round(value, 3) for key, value in operators[name].items()} for name in most},
    }


def measure(name: str, device: str) -> dict[str, Any]:
    """Steps without a refresh, and at frequency 1, where every step has one."""
    trial = warm_trial("soap", PARAMETER_SETS[name], FREQUENCY, device)
    found: dict[str, Any] = {"set": name}
    for which, frequency in zip(WHICH, (10**6, 1), strict=True):
        trial.optimizer.param_groups[0]["precondition_frequency"] = frequency
        trial.play(2)
        found[which] = profiled(trial)
    return found


def main() -> None:
    arguments = parser(__doc__, "step_profile.json", device=True)
    arguments.add_argument("--sets", default="gpt-d128x8,gpt-d512x2", help=f"of {', '.join(PARAMETER_SETS)}")
    given = arguments.parse_args()
    results = [measure(name, given.device) for name in given.sets.split(",")]
    rows = []
    for result in results:
        for line in (result[which] | {"which": which} for which in WHICH):
            shares = [f"{line['kinds_ms'][kind] / line['ms_under_profiler']:.0%}" for kind in COLUMNS]
            rows.append([result["set"], line["which"], line["ms"], *shares])
    print(table("Set | | ms | " + " | ".join(COLUMNS), rows))
    write(given.out, {**heading(given.device), "results": results})


if __name__ == "__main__":
    main()
