"""What the benchmarks share: weights to step on, optimizers, timing, result files, tables and pictures.

Imports of ``emerging_optimizers`` wait until they are needed: a peer's process has torch alone.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
PEERS = ROOT / "benchmarks/.venv-peers"
PACKAGES = ("heavyball", "pytorch-optimizer")
Shape = tuple[int, ...]

# --- the weight matrices of models that people train; embeddings, norms and biases get plain Adam from all ------------


def gpt(width: int, layers: int) -> list[Shape]:
    """Attention and feed-forward weights of a GPT block, as often as there are layers."""
    return layers * [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]


def resnet50() -> list[Shape]:
    """The convolutions of torchvision's ResNet-50, without the classifier."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, channels, 1, 1))
            channels = 4 * width
    return shapes


PARAMETER_SETS: dict[str, list[Shape]] = {
    "gpt-d128x8": gpt(128, 8),
    "gpt-d512x2": gpt(512, 2),
    "gpt2-124m": gpt(768, 12),
    "gpt-1.3b-quarter": gpt(2048, 6),  # of its 24 layers: several optimizers must fit beside each other
    "vit-b": [(768, 768), *gpt(768, 12)],
    "resnet50": resnet50(),
}

# --- optimizers -------------------------------------------------------------------------------------------------------

BETAS: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.01, "lr": 1e-3}


def soap(parameters: list[Tensor], frequency: int, **options: Any) -> torch.optim.Optimizer:
    from emerging_optimizers.soap import SOAP

    return SOAP(parameters, precondition_frequency=frequency, **BETAS, **options)


def heavyball_soap(parameters: list[Tensor], frequency: int) -> torch.optim.Optimizer:
    import heavyball

    # Not merged, and without its schedule, so that it has the shapes and the frequency of the others.
    options = {"max_precond_dim": 10_000, "merge_dims": False, "use_precond_schedule": False}
    return heavyball.SOAP(parameters, precondition_frequency=frequency, **options, **BETAS)


def pytorch_optimizer_soap(parameters: list[Tensor], frequency: int) -> torch.optim.Optimizer:
    import pytorch_optimizer

    return pytorch_optimizer.SOAP(parameters, precondition_frequency=frequency, **BETAS)


OPTIMIZERS: dict[str, Callable[[list[Tensor], int], torch.optim.Optimizer]] = {
    "soap": soap,
    "soap-staggered": lambda parameters, frequency: soap(parameters, frequency, stagger_updates=True),
    "adamw": lambda parameters, frequency: torch.optim.AdamW(parameters, fused=True, **BETAS),
    "adamw-foreach": lambda parameters, frequency: torch.optim.AdamW(parameters, foreach=True, **BETAS),
    "muon": lambda parameters, frequency: torch.optim.Muon(parameters, lr=1e-3),
    "heavyball": heavyball_soap,
    "pytorch-optimizer": pytorch_optimizer_soap,
}


def peers_python(package: str | None = None) -> str:
    """An interpreter that has this peer: this one, or that of the peers' environment, which is made on first use."""
    if package and find_spec(package.replace("-", "_")) is not None:
        return sys.executable
    python = PEERS / "bin/python"
    if not python.exists():
        print(f"installing {', '.join(PACKAGES)} into {PEERS.relative_to(ROOT)}")
        subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
        pip = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
        subprocess.run([*pip, "torch", *PACKAGES], check=True, cwd=ROOT)
    return str(python)


class Trial:
    """An optimizer with parameters and gradients drawn from a fixed seed."""

    def __init__(self, name: str, shapes: list[Shape], frequency: int, device: str = "cpu", gradients: int = 8) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.parameters = [torch.nn.Parameter(torch.randn(s, generator=generator, device=device)) for s in shapes]
        # Drawn before anything is timed; so many in turn that the factors of a 4:1 matrix have full rank.
        self.gradients = [[low_rank(shape, generator) for shape in shapes] for _ in range(gradients)]
        self.optimizer = OPTIMIZERS[name](self.parameters, frequency)
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
        return 1000 * seconds(self.optimizer.step, self.device)

    def play(self, steps: int) -> list[float]:
        """Do a round of steps and return the milliseconds of each."""
        return [self.step() for _ in range(steps)]


def warm_trial(name: str, shapes: list[Shape], frequency: int, device: str) -> Trial:
    """A trial that has had its first basis, a refresh, and all gradients."""
    trial = Trial(name, shapes, frequency, device)
    trial.play(2 if name.startswith(("adamw", "muon")) else max(frequency, len(trial.gradients)) + 2)
    return trial


def low_rank(shape: Shape, generator: torch.Generator) -> Tensor:
    """A low-rank matrix with noise, as gradients are."""
    rows, columns = shape[0], prod(shape[1:])
    rank = max(1, min(rows, columns) // 8)
    like: dict[str, Any] = {"generator": generator, "device": generator.device}
    product = torch.randn(rows, rank, **like) @ torch.randn(rank, columns, **like) / rank**0.5
    return (0.01 * (product + 0.1 * torch.randn(rows, columns, **like))).reshape(shape)


# --- measuring --------------------------------------------------------------------------------------------------------


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(do: Callable[[], object], device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> float:
    """How long it takes."""
    wait(device)
    begin = clock()
    do()
    wait(device)
    return clock() - begin


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every storage that the optimizer's state reaches."""
    storages: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict | list | tuple):
            for entry in value.values() if isinstance(value, dict) else value:
                visit(entry)

    visit(dict(optimizer.state))
    return sum(storages.values())


def matmul_rate(device: str, size: int | None = None) -> float:
    """float32 FLOPs per second of a square product, at torch's default precision for SOAP ("high")."""
    from emerging_optimizers.soap.precision import fp32_matmul_precision

    size = size or (1024 if device == "cpu" else 4096)
    a, b = torch.randn(2, size, size, device=device)
    with fp32_matmul_precision("high"):
        times = [seconds(lambda: torch.mm(a, b), device) for _ in range(max(8, 2**28 // size**3))]
    return 2 * size**3 / median(times[2:])


def floor_flops(shapes: list[Shape]) -> int:
    """6 m n (m + n) per matrix; per axis of a tensor two Gram and four projection FLOPs per element and entry."""
    return sum(6 * prod(shape) * sum(shape) for shape in shapes)


def race(task: str, rates: dict[str, float | Sequence[float]], seeds: Sequence[int], frequency: int = 10,
         steps: int | None = None) -> Any:  # fmt: skip
    """A race of the lab with one thread, which ``play()`` runs; ``rates`` are the optimizers' learning rates."""
    from emerging_optimizers.lab.race.race import Options, Race

    several = {name: tuple(rate) if isinstance(rate, Sequence) else (rate,) for name, rate in rates.items()}
    return Race(Options(task, None, several, tuple(seeds), steps, frequency, threads=1))


# --- arguments, results, tables, pictures -----------------------------------------------------------------------------


def parser(doc: str | None, result: str, device: bool = False) -> argparse.ArgumentParser:
    """Arguments that every script has: where the result goes, and for some where it is measured."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / result, help="the result file")
    if device:
        parser.add_argument("--device", default="cpu")
    return parser


def heading(device: str = "cpu") -> dict[str, Any]:
    """What a reader of the result must know: date, machine, versions."""
    from emerging_optimizers.lab.common import machine, versions

    head = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions()}
    return head if device == "cpu" else {**head, "device": torch.cuda.get_device_name()}


def write(path: Path, result: Any) -> None:
    """Writes JSON with a line for every object without a list or object in it, and for every list without an object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_json(result, "\n") + "\n", encoding="utf-8")


def _json(value: Any, line: str) -> str:
    if isinstance(value, dict) and any(isinstance(one, dict | list | tuple) for one in value.values()):
        return "{" + ",".join(f"{line} {json.dumps(k)}: {_json(v, line + ' ')}" for k, v in value.items()) + line + "}"
    if isinstance(value, list | tuple) and any(isinstance(one, dict) for one in value):
        return "[" + ",".join(f"{line} {_json(one, line + ' ')}" for one in value) + line + "]"
    return json.dumps(value)


def table(header: str, rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the header's cells are divided by " | "."""
    names = header.split(" | ")
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (names, ["---"] * len(names), *rows))


COLOURS = {
    "soap": "#1f5fbf",
    "soap-staggered": "#3fa7d6",
    "heavyball": "#c44e52",
    "pytorch-optimizer": "#dd8452",
    "muon": "#55a868",
    "adamw": "#8c8c8c",
}


def plain(*axes: Any) -> None:
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)


def save(figure: Any, picture: Path, dpi: int = 130) -> None:
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=dpi)
