"""What SOAP's state takes in memory when it is kept small, and what that does to training.

    python -m benchmarks.state_size            # all of it, about half an hour with one thread
    python -m benchmarks.state_size sizes      # bytes per parameter and memory of a step only

Three things: bytes of state per parameter, counted from the shapes and dtypes of the state; the most memory that a step
allocates beyond the state, as torch's allocator reports it; and the final validation loss of the `charlm` race, three
seeds. ``V in bfloat16``, on one seed, is no option of SOAP: the second moment is rounded to bfloat16 after every step
here, to see whether it should be one. Results go to ``benchmarks/results/state_size.json``, a race's as soon as it is
over.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.parameter_sets import PARAMETER_SETS
from emerging_optimizers.lab.machine import machine, versions
from emerging_optimizers.lab.optimizers import BETAS, WEIGHT_DECAY, Contender, tuned_rate
from emerging_optimizers.lab.options import Options
from emerging_optimizers.lab.race import Race
from emerging_optimizers.routing import route_parameters
from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.layout import layout_for
from emerging_optimizers.soap.state import init_state

RESULTS = Path(__file__).parent / "results/state_size.json"
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


class RoundingContender(Contender):
    """Rounds the second moment to bfloat16 after every step."""

    def step(self) -> None:
        """Take one step with every optimizer, and round."""
        super().step()
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                state["exp_avg_sq"].copy_(state["exp_avg_sq"].bfloat16())


def bytes_per_parameter(shapes: list[tuple[int, ...]], options: dict[str, Any]) -> float:
    """Counted on tensors that have no storage, so that any model fits."""
    group = SOAP([nn.Parameter(torch.zeros(2))], lr=0.1, **options).param_groups[0]
    total, parameters = 0, 0
    for shape in shapes:
        parameter = torch.empty(shape, device="meta")
        state: dict[str, Any] = {}
        layout = layout_for(parameter, group)
        init_state(state, parameter, layout, group["pack_factors"], group["state_dtype"])
        total += sum(value.numel() * value.element_size() for value in state.values())
        parameters += parameter.numel()
    return round(total / parameters, 2)


def step_memory(shapes: list[tuple[int, ...]], options: dict[str, Any]) -> dict[str, float]:
    """The most MiB allocated at once in a step with and in one without a refresh, beyond what was there before it."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = SOAP(parameters, lr=1e-3, precondition_frequency=2, **options)
    peaks = []
    for step in range(4):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if step < 2:
            optimizer.step()
            continue
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            optimizer.step()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        peaks.append(peak)
    state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    refresh, plain = (round(peak / 2**20, 1) for peak in peaks)
    return {"state_mib": round(state / 2**20, 1), "step_mib": plain, "refresh_step_mib": refresh}


def final_loss(seed: int, mode: str, rounds_v: bool, options: dict[str, Any]) -> dict[str, float]:
    """Runs the race's `charlm` at SOAP's tuned rate with these options."""
    rate = tuned_rate("charlm", "soap")
    race = Race(Options("charlm", None, {"soap": (rate,)}, (seed,), None, FREQUENCY, torch.get_num_threads()))
    (run,) = race.runs
    all_options = {"betas": BETAS, **MODES[mode], **options}
    groups = route_parameters(run.model).param_groups()
    soap = SOAP(groups, rate, weight_decay=WEIGHT_DECAY, precondition_frequency=FREQUENCY, **all_options)
    run.contender = (RoundingContender if rounds_v else Contender)(soap)
    for _ in race.play():
        pass
    if run.record.diverged:
        return {"diverged": run.record.diverged}
    return {
        "validation": round(run.record.validation[-1], 5),
        "state_bytes_per_parameter": round(run.record.state_bytes / run.record.parameters, 2),
    }


def main() -> None:
    about = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions()}
    results: dict[str, Any] = {**about, "frequency": FREQUENCY}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text()) | results

    def write() -> None:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")

    if "races" not in sys.argv[1:]:
        results["state_bytes_per_parameter"] = {
            name: {mode: bytes_per_parameter(PARAMETER_SETS[name], options) for mode, options in MODES.items()}
            for name in SETS
        }
        results["memory_of_a_step"] = {
            name: {mode: step_memory(PARAMETER_SETS[name], options) for mode, options in MODES.items()}
            for name in STEPPED_SETS
        }
        write()
    if "sizes" in sys.argv[1:]:
        return
    results["charlm"] = {}
    plan = [(seed, mode, (mode, False, {})) for seed in SEEDS for mode in MODES]
    plan += [(0, name, run) for name, run in SECOND_MOMENT_RUNS.items()]
    for seed, name, run in plan:
        outcome = final_loss(seed, *run)
        results["charlm"].setdefault(name, {})[f"seed {seed}"] = outcome
        write()
        print(f"{name}, seed {seed}: {outcome}", flush=True)


if __name__ == "__main__":
    main()
