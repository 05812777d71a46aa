"""What SOAP's state takes in memory when it is kept small, and what that does to training.

    python -m benchmarks.figures.state_size            # all of it, about half an hour with one thread
    python -m benchmarks.figures.state_size sizes      # bytes per parameter and memory of a step only

Three things: bytes of state per parameter, as the package plans them; the most memory that a step allocates beyond the
state, as torch's allocator reports it; and the final validation loss of the `charlm` race, three seeds.
``V in bfloat16``, on one seed, is no option of SOAP: the second moment is rounded to bfloat16 after every step here, to
see whether it should be one. The result file is written as soon as a race is over.
"""

import json
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity

from benchmarks.common import PARAMETER_SETS, Shape, heading, parser, race, state_bytes, write
from emerging_optimizers.lab.race.optimizers import BETAS, WEIGHT_DECAY, Contender, tuned_rate
from emerging_optimizers.plan import plan
from emerging_optimizers.routing import route_parameters
from emerging_optimizers.soap import SOAP

FREQUENCY = 10
MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "packed": {"pack_factors": True},
    "packed, bfloat16": {"pack_factors": True, "state_dtype": torch.bfloat16},
}
SETS = ("gpt-d128x8", "gpt-d512x2", "gpt2-124m", "gpt-1.3b-quarter", "resnet50")
STEPPED_SETS = ("gpt-d128x8", "gpt-d512x2")
SEEDS = (0, 1, 2)
#: On one seed only: a run's mode, whether V is rounded, and its options beyond the mode's.
SLOW_DECAY = {"betas": (0.9, 0.999)}  # a step then changes V by less than bfloat16 can hold
SECOND_MOMENT_RUNS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "packed, bfloat16, V in bfloat16": ("packed, bfloat16", True, {}),
    "float32, beta2 0.999": ("float32", False, SLOW_DECAY),
    "packed, bfloat16, V in bfloat16, beta2 0.999": ("packed, bfloat16", True, SLOW_DECAY),
}


def bytes_per_parameter(shapes: list[Shape], options: dict[str, Any]) -> float:
    planned = plan({str(number): shape for number, shape in enumerate(shapes)}, **options)
    return round(planned.totals["soap"].state_bytes / planned.parameters, 2)


def step_memory(shapes: list[Shape], options: dict[str, Any]) -> dict[str, float]:
    """The most MiB allocated at once in a step with and in one without a refresh, beyond what was there before it."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = SOAP(parameters, lr=1e-3, precondition_frequency=2, **options)
    peaks = []
    for _ in range(4):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
            optimizer.step()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        peaks.append(peak)
    sizes = (state_bytes(optimizer), peaks[3], peaks[2])
    names = ("state_mib", "step_mib", "refresh_step_mib")
    return {name: round(size / 2**20, 1) for name, size in zip(names, sizes, strict=True)}


def round_second_moments(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for state in optimizer.state.values():
        state["exp_avg_sq"].copy_(state["exp_avg_sq"].bfloat16())


def final_loss(
    seed: int, mode: str, rounds_v: bool, options: dict[str, Any], steps: int | None
) -> dict[str, float | str]:
    """Runs the race's `charlm` at SOAP's tuned rate with these options."""
    rate = tuned_rate("charlm", "soap")
    charlm = race("charlm", {"soap": rate}, [seed], FREQUENCY, steps)
    (run,) = charlm.runs
    groups = route_parameters(run.model).param_groups()
    every = {"betas": BETAS, "weight_decay": WEIGHT_DECAY, "precondition_frequency": FREQUENCY}
    soap = SOAP(groups, rate, **every | MODES[mode] | options)
    if rounds_v:
        soap.register_step_post_hook(round_second_moments)
    run.contender = Contender(soap)
    for _ in charlm.play():
        pass
    if run.record.diverged:
        return {"diverged": run.record.diverged}
    state = run.record.state_bytes / run.record.parameters
    return {"validation": round(run.record.validation[-1], 5), "state_bytes_per_parameter": round(state, 2)}


def main() -> None:
    arguments = parser(__doc__, "state_size.json")
    arguments.add_argument("parts", nargs="*", default=["sizes", "races"])
    arguments.add_argument("--steps", type=int, help="of a race, instead of the task's")
    given = arguments.parse_args()
    result = json.loads(given.out.read_text()) if given.out.exists() else {}
    result |= {**heading(), "frequency": FREQUENCY}
    if "sizes" in given.parts:
        for key, measure, sets in (
            ("state_bytes_per_parameter", bytes_per_parameter, SETS),
            ("memory_of_a_step", step_memory, STEPPED_SETS),
        ):
            result[key] = {
                name: {mode: measure(PARAMETER_SETS[name], options) for mode, options in MODES.items()} for name in sets
            }
            print(key, result[key])
        write(given.out, result)
    if "races" in given.parts:
        torch.set_num_threads(1)
        result["charlm"] = {}
        runs = [(seed, mode, (mode, False, {})) for seed in SEEDS for mode in MODES]
        for seed, name, run in runs + [(0, name, run) for name, run in SECOND_MOMENT_RUNS.items()]:
            outcome = final_loss(seed, *run, given.steps)
            result["charlm"].setdefault(name, {})[f"seed {seed}"] = outcome
            write(given.out, result)
            print(f"{name}, seed {seed}: {outcome}", flush=True)


if __name__ == "__main__":
    main()
