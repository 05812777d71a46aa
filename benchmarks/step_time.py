"""Time of one optimizer step, ours beside torch's and the peers on PyPI, in one run on a machine left alone.

    python benchmarks/step_time.py                                # the CPU part: two GPT sets, frequencies 10 and 1
    python benchmarks/step_time.py --sets resnet50 --frequencies 10 --optimizers soap,adamw --rounds 3

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
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.parameter_sets import PARAMETER_SETS

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "benchmarks" / ".venv-peers"
BETAS: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.01, "lr": 1e-3}


def soap(parameters: list[Tensor], frequency: int, **options: Any) -> torch.optim.Optimizer:
    from emerging_optimizers.soap import SOAP

    return SOAP(parameters, precondition_frequency=frequency, **BETAS, **options)


def heavyball_soap(parameters: list[Tensor], frequency: int) -> torch.optim.Optimizer:
    import heavyball

    # Without compilation: its schedule of refreshes is switched off so that it has the frequency of the others.
    options = {"max_precond_dim": 10_000, "merge_dims": False, "use_precond_schedule": False}
    return heavyball.SOAP(parameters, precondition_frequency=frequency, **options, **BETAS)


def pytorch_optimizer_soap(parameters: list[Tensor], frequency: int) -> torch.optim.Optimizer:
    import pytorch_optimizer

    return pytorch_optimizer.SOAP(parameters, precondition_frequency=frequency, **BETAS)


Maker = Callable[[list[Tensor], int], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Maker] = {
    "soap": soap,
    "soap-staggered": lambda parameters, frequency: soap(parameters, frequency, stagger_updates=True),
    "adamw": lambda parameters, frequency: torch.optim.AdamW(parameters, fused=True, **BETAS),
    "muon": lambda parameters, frequency: torch.optim.Muon(parameters, lr=1e-3),
    "heavyball": heavyball_soap,
    "pytorch-optimizer": pytorch_optimizer_soap,
}
PACKAGES = {"heavyball": "heavyball", "pytorch-optimizer": "pytorch-optimizer"}
REFRESHES = {name for name in OPTIMIZERS if name not in ("adamw", "muon")}


def available(names: list[str]) -> list[str]:
    """Those of these optimizers that this torch has."""
    return [name for name in names if name != "muon" or hasattr(torch.optim, "Muon")]


# --- one process per optimizer --------------------------------------------------------------------------------------


class Trial:
    """An optimizer with parameters and gradients drawn from a fixed seed."""

    def __init__(self, make: Maker, shapes: list[tuple[int, ...]], frequency: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.parameters = [torch.nn.Parameter(torch.randn(s, generator=generator, device=device)) for s in shapes]
        # Low rank plus noise, as gradients are, drawn before anything is timed; so many in turn that the factors of a
        # 4:1 matrix have full rank, as in a training.
        self.gradients = [[low_rank(shape, generator, device) for shape in shapes] for _ in range(8)]
        self.optimizer = make(self.parameters, frequency)
        self.device = device
        self.done = 0

    def set_gradients(self) -> None:
        """Give every parameter its next gradient."""
        for p, gradient in zip(self.parameters, self.gradients[self.done % len(self.gradients)], strict=True):
            p.grad = gradient.clone()
        self.done += 1

    def step(self) -> float:
        """Do one step and return its milliseconds."""
        self.set_gradients()
        wait(self.device)
        begin = time.perf_counter()
        self.optimizer.step()
        wait(self.device)
        return 1000 * (time.perf_counter() - begin)

    def play(self, steps: int) -> list[float]:
        """Do a round of steps and return the milliseconds of each."""
        return [self.step() for _ in range(steps)]


def warm_trial(name: str, shapes: list[tuple[int, ...]], frequency: int, device: str) -> Trial:
    """A trial of one of :data:`OPTIMIZERS` that has had its first basis, a refresh, and all gradients."""
    trial = Trial(OPTIMIZERS[name], shapes, frequency, device)
    trial.play(max(frequency, len(trial.gradients)) + 2 if name in REFRESHES else 2)
    return trial


def work(name: str, shapes: list[tuple[int, ...]], frequency: int, steps: int, device: str) -> None:
    """The worker: warms up, says that it is ready, then does a round per line of stdin and prints its step times."""
    trial = warm_trial(name, shapes, frequency, device)
    package = PACKAGES.get(name)
    facts = {"state_bytes": state_bytes(trial.optimizer), "version": version(package) if package else None}
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        print(json.dumps(trial.play(steps)), flush=True)


def low_rank(shape: tuple[int, ...], generator: torch.Generator, device: str) -> Tensor:
    rows, columns = shape[0], prod(shape[1:])
    rank = max(1, min(rows, columns) // 8)
    left = torch.randn(rows, rank, generator=generator, device=device)
    right = torch.randn(rank, columns, generator=generator, device=device)
    noise = torch.randn(rows, columns, generator=generator, device=device)
    return (0.01 * (left @ right / rank**0.5 + 0.1 * noise)).reshape(shape)


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every storage that the optimizer's state reaches."""
    storages: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for entry in value.values():
                visit(entry)
        elif isinstance(value, list | tuple):
            for entry in value:
                visit(entry)

    visit(dict(optimizer.state))
    return sum(storages.values())


# --- the run --------------------------------------------------------------------------------------------------------


class Worker:
    """A process with one optimizer."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        python = peers_python(PACKAGES[name]) if name in PACKAGES else sys.executable
        command = [python, "-W", "ignore", "-m", "benchmarks.step_time", "--worker", name, *arguments]
        # Peers print as they like: the last line of each answer counts.
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
        )
        self.facts = self._answer()
        self.rounds: list[list[float]] = []

    def _answer(self) -> Any:
        for line in self.process.stdout:
            if line.startswith(("{", "[")):
                return json.loads(line)
        raise SystemExit(f"{' '.join(self.process.args[-8:])} ended with {self.process.wait()}")

    def play(self) -> None:
        """Have it do one round."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.rounds.append(self._answer())

    def close(self) -> None:
        """End it."""
        self.process.stdin.close()
        self.process.wait()


def peers_python(package: str) -> str:
    """An interpreter that has this peer: this one, or that of the peers' environment, which is made on first use."""
    if find_spec(package.replace("-", "_")) is not None:
        return sys.executable
    python = PEERS / "bin" / "python"
    if not python.exists():
        print(f"installing {', '.join(PACKAGES.values())} into {PEERS.relative_to(ROOT)}")
        subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
        constraints = ["-c", str(ROOT / "constraints.txt")]
        subprocess.run(
            [python, "-m", "pip", "install", "-q", *constraints, "torch", *PACKAGES.values()], check=True, cwd=ROOT
        )
    return str(python)


def matmul_rate(device: str, size: int | None = None, ours: bool = False) -> float:
    """float32 FLOPs per second of a square product, at torch's default precision for SOAP ("high").

    As torch computes it or, with ``ours``, as SOAP asks for it, which on an AMD CPU is faster.
    """
    from emerging_optimizers.soap.precision import fp32_matmul_precision

    size = size or (1024 if device == "cpu" else 4096)
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    times = []
    with fp32_matmul_precision("high", a.unsqueeze(0) if ours else None):
        for _ in range(max(8, 2**28 // size**3)):
            begin = time.perf_counter()
            torch.mm(a, b)
            wait(device)
            times.append(time.perf_counter() - begin)
    return 2 * size**3 / median(times[2:])


def floor_flops(shapes: list[tuple[int, ...]]) -> int:
    """6 m n (m + n) per matrix; per axis of a tensor two Gram and four projection FLOPs per element and entry."""
    return sum(6 * prod(shape) * sum(shape) for shape in shapes)


def heading(device: str) -> dict[str, Any]:
    """What a reader of the result must know: date, machine, versions."""
    from emerging_optimizers.lab.machine import machine, versions

    head = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions()}
    return head if device == "cpu" else {**head, "device": torch.cuda.get_device_name()}


def measure(name: str, frequency: int, optimizers: list[str], rounds: int, device: str) -> dict[str, Any]:
    shapes = PARAMETER_SETS[name]
    parameters = sum(map(prod, shapes))
    steps = frequency * max(1, 10 // frequency) if frequency > 1 else 4
    arguments = ["--sets", name, "--frequencies", str(frequency), "--steps", str(steps), "--device", device]
    wanted = [one for one in optimizers if frequency > 1 or one != "soap-staggered"]  # nothing to spread at frequency 1
    workers = {optimizer: Worker(optimizer, arguments) for optimizer in wanted}
    rates, our_rates = [], []
    for number in range(rounds):
        rates.append(matmul_rate(device))
        our_rates.append(matmul_rate(device, ours=True))
        for worker in list(workers.values())[:: 1 if number % 2 else -1]:
            worker.play()
    for worker in workers.values():
        worker.close()
    floor = 1000 * floor_flops(shapes) / median(rates)
    lines = {}
    for optimizer, worker in workers.items():
        mean = median(sum(times) / len(times) for times in worker.rounds)
        middle = median(median(times) for times in worker.rounds)
        lines[optimizer] = {
            "mean_ms": round(mean, 2),
            "median_ms": round(middle, 2),
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
        "our_gflops": round(median(our_rates) / 1e9, 1),
        "rounds": rounds,
        "optimizers": lines,
    }


def table(result: dict[str, Any]) -> Iterator[str]:
    yield f"\n{result['set']} ({result['parameters'] / 1e6:.1f}M), frequency {result['frequency']}: "
    yield f"floor {result['floor_ms']} ms at {result['gflops']} GFLOP/s; as SOAP multiplies {result['our_gflops']}"
    yield "| optimizer | mean ms | median | worst | worst/median | x floor | bytes/parameter |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for optimizer, line in sorted(result["optimizers"].items(), key=lambda item: item[1]["mean_ms"]):
        keys = ("mean_ms", "median_ms", "worst_ms", "worst_over_median", "over_floor", "bytes_per_parameter")
        yield "| " + " | ".join([optimizer, *(str(line[key]) for key in keys)]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default="gpt-d128x8,gpt-d512x2", help=f"of {', '.join(PARAMETER_SETS)}")
    parser.add_argument("--frequencies", default="10,1")
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/step_time.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker, PARAMETER_SETS[given.sets], int(given.frequencies), given.steps, given.device)
        return
    results = []
    for name in given.sets.split(","):
        for frequency in map(int, given.frequencies.split(",")):
            results.append(measure(name, frequency, given.optimizers.split(","), given.rounds, given.device))
            print("\n".join(table(results[-1])), flush=True)
    given.out.write_text(json.dumps({**heading(given.device), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
