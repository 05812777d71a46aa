"""Time of one optimizer step, ours beside torch's and the peers on PyPI, in one run on a machine left alone.

    python -m benchmarks.speed.step_time                        # the CPU part: two GPT sets, frequencies 10 and 1
    python -m benchmarks.speed.step_time --sets resnet50 --frequencies 10 --optimizers soap,adamw --rounds 3

Every optimizer has a process of its own, which holds the parameters and gradients drawn from the same seed. The
processes take turns, a round of some steps each, so that slow minutes fall on all alike; only one of them works at a
time. Reported are medians over rounds of the mean, the median and the worst step of a round. A round has whole
refresh periods. ``floor`` is 6 * sum(m n (m + n)) FLOPs, the two Gram products and four projections of every
matrix, at the float32 matmul rate that is measured in the same rounds.
"""

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from math import prod
from statistics import median
from typing import Any

from benchmarks.common import (
    OPTIMIZERS,
    PACKAGES,
    PARAMETER_SETS,
    ROOT,
    floor_flops,
    heading,
    matmul_rate,
    parser,
    peers_python,
    state_bytes,
    table,
    warm_trial,
    write,
)


def work(given: argparse.Namespace) -> None:
    """The worker: warms up, says that it is ready, then does a round per line of stdin and prints its step times."""
    trial = warm_trial(given.worker, PARAMETER_SETS[given.sets], int(given.frequencies), given.device)
    package = version(given.worker) if given.worker in PACKAGES else None
    print(json.dumps({"state_bytes": state_bytes(trial.optimizer), "version": package}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(trial.play(given.steps)), flush=True)


class Worker:
    """A process with one optimizer."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        python = peers_python(name) if name in PACKAGES else sys.executable
        command = [python, "-W", "ignore", "-m", "benchmarks.speed.step_time", "--worker", name, *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, stderr=subprocess.DEVNULL
        )
        self.facts = self._answer()
        self.rounds: list[list[float]] = []

    def _answer(self) -> Any:
        # Peers print as they like: the last line of each answer counts.
        for line in self.process.stdout:
            if line.startswith(("{", "[")):
                return json.loads(line)
        raise SystemExit(f"{' '.join(self.process.args[-8:])} ended with {self.process.wait()}")

    def play(self) -> None:
        """Have it do one round."""
        print(file=self.process.stdin, flush=True)
        self.rounds.append(self._answer())

    def close(self) -> None:
        """End it."""
        self.process.stdin.close()
        self.process.wait()


def measure(name: str, frequency: int, optimizers: list[str], rounds: int, device: str) -> dict[str, Any]:
    shapes = PARAMETER_SETS[name]
    parameters = sum(map(prod, shapes))
    steps = frequency * max(1, 10 // frequency) if frequency > 1 else 4
    arguments = ["--sets", name, "--frequencies", str(frequency), "--steps", str(steps), "--device", device]
    wanted = [one for one in optimizers if frequency > 1 or one != "soap-staggered"]  # nothing to spread at frequency 1
    workers = {optimizer: Worker(optimizer, arguments) for optimizer in wanted}
    rates = []
    for number in range(rounds):
        rates.append(matmul_rate(device))
        for worker in list(workers.values())[:: 1 if number % 2 else -1]:
            worker.play()
    for worker in workers.values():
        worker.close()
    floor = 1000 * floor_flops(shapes) / median(rates)
    lines = {}
    for optimizer, worker in workers.items():
        mean = median(sum(times) / len(times) for times in worker.rounds)
        lines[optimizer] = {
            "mean_ms": round(mean, 2),
            "median_ms": round(median(median(times) for times in worker.rounds), 2),
            "worst_ms": round(median(max(times) for times in worker.rounds), 2),
            "worst_over_median": round(median(max(times) / median(times) for times in worker.rounds), 2),
            "over_floor": round(mean / floor, 2),
            "bytes_per_parameter": round(worker.facts["state_bytes"] / parameters, 1),
            "version": worker.facts["version"],
            "steps_ms": [[round(t, 2) for t in times] for times in worker.rounds],
        }
    return {
        "set": name,
        "parameters": parameters,
        "frequency": frequency,
        "floor_ms": round(floor, 2),
        "gflops": round(median(rates) / 1e9, 1),
        "rounds": rounds,
        "optimizers": lines,
    }


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['set']} ({result['parameters'] / 1e6:.1f}M), frequency {result['frequency']}:", end=" ")
    print(f"floor {result['floor_ms']} ms at {result['gflops']} GFLOP/s")
    keys = ("mean_ms", "median_ms", "worst_ms", "worst_over_median", "over_floor", "bytes_per_parameter")
    lines = sorted(result["optimizers"].items(), key=lambda item: item[1]["mean_ms"])
    header = "optimizer | mean ms | median | worst | worst/median | x floor | bytes/parameter"
    print(table(header, [[name, *(line[key] for key in keys)] for name, line in lines]), flush=True)


def main() -> None:
    arguments = parser(__doc__, "step_time.json", device=True)
    arguments.add_argument("--sets", default="gpt-d128x8,gpt-d512x2", help=f"of {', '.join(PARAMETER_SETS)}")
    arguments.add_argument("--frequencies", default="10,1")
    arguments.add_argument("--optimizers", default=",".join(name for name in OPTIMIZERS if name != "adamw-foreach"))
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--worker", help=argparse.SUPPRESS)
    arguments.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.worker:
        work(given)
        return
    results = []
    for name in given.sets.split(","):
        for frequency in map(int, given.frequencies.split(",")):
            results.append(measure(name, frequency, given.optimizers.split(","), given.rounds, given.device))
            show(results[-1])
    write(given.out, {**heading(given.device), "results": results})


if __name__ == "__main__":
    main()
