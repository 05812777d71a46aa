"""The largest update of SOAP's first 30 steps with and without the floor under the second moment.

Gaussian gradients, published defaults, learning rate 1: an update's root mean square, worst over 30 steps, 6 seeds.
Adam's own bound is 1.17. Results go to ``benchmarks/results/second_moment_floor.json``.
"""

import json
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

from emerging_optimizers.soap import SOAP, algorithm

SHAPES = [(24, 4), (128, 32)]


def worst_rms(shape: tuple[int, ...], dtype: torch.dtype) -> float:
    worst = 0.0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = SOAP([weight], lr=1.0, weight_decay=0.0)
        for _ in range(30):
            before = weight.detach().clone()
            weight.grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            optimizer.step()
            worst = max(worst, (weight.detach() - before).square().mean().sqrt().item())
    return worst


def main() -> None:
    floor, rows = algorithm.raise_to_floor, []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float64):
            row = {"shape": shape, "dtype": str(dtype)}
            for name, function in {"with": floor, "without": lambda v, *_: v}.items():
                algorithm.raise_to_floor = function
                row[name] = worst_rms(shape, dtype)
            rows.append(row)
            print(row)
    about = {"date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__, "machine": platform.machine()}
    path = Path(__file__).parent / "results/second_moment_floor.json"
    path.write_text(json.dumps(about | {"worst_rms": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
