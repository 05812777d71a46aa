"""The largest update of SOAP's first 30 steps with and without the floor under the second moment.

    python -m benchmarks.figures.second_moment_floor        # seconds; nothing is timed

Gaussian gradients, published defaults, learning rate 1: an update's root mean square, worst over 30 steps, 6 seeds.
Adam's own bound is 1.17.
"""

from typing import Any
from unittest import mock

import torch

from benchmarks.common import heading, parser, write
from emerging_optimizers.soap import SOAP, refresh

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
    given = parser(__doc__, "second_moment_floor.json").parse_args()
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float64):
            with mock.patch.object(refresh, "raise_to_floor", lambda second_moment, *_: second_moment):
                without = worst_rms(shape, dtype)
            rows.append({"shape": shape, "dtype": str(dtype), "with": worst_rms(shape, dtype), "without": without})
            print(rows[-1])
    write(given.out, {**heading(), "worst_rms": rows})


if __name__ == "__main__":
    main()
