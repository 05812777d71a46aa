"""What one new eigenbasis costs, as SOAP makes it and as LAPACK or cuSOLVER does, on factors of a real training.

    python -m benchmarks.speed.refresh_cost              # minutes on two cores; leave the machine alone
    python -m benchmarks.speed.refresh_cost --device cuda --out refresh_cost_gpu.json

A network whose layers double in width learns the race's `digits` with SOAP at frequency 10. After 10, 100 and 300
steps, just before a refresh, each method makes a basis of each factor; times are medians of three. ``orthogonality`` is
the largest entry of ``|Q^T Q - I|``, ``residual`` the off-diagonal part of ``Q^T K Q`` relative to ``K``, with "before"
for the basis that was to be refreshed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.common import heading, parser, seconds, table, write
from emerging_optimizers.lab.tasks import make_task
from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.soap_utils import get_eigenbasis_eigh, get_eigenbasis_qr


def sorted_qr(factor: Tensor, basis: Tensor) -> Tensor:
    """One step of orthogonal iteration, the columns of the largest eigenvalues first."""
    products = factor @ basis
    order = (basis * products).sum(0).argsort(descending=True)
    return torch.linalg.qr(products[:, order]).Q


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "before": lambda factor, basis: basis,
    "get_eigenbasis_qr": lambda factor, basis: get_eigenbasis_qr([factor], [basis], factor.diagonal())[0][0],
    "torch.linalg.qr": sorted_qr,
    "get_eigenbasis_eigh": lambda factor, basis: get_eigenbasis_eigh([factor])[0],
    "torch.linalg.eigh": lambda factor, basis: torch.linalg.eigh(factor).eigenvectors,
}


def factors(largest: int, steps: list[int], device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Factors and their bases after so many steps."""
    widths = [64 * 2**k for k in range(largest.bit_length() - 6)]  # digits have 64 pixels
    torch.manual_seed(0)
    layers = [layer for pair in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(*pair), nn.ReLU())]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 10)).to(device)
    task = make_task("digits", 0, {})
    optimizer = SOAP(model.parameters(), lr=1e-3, precondition_frequency=10)
    for step in range(1, max(steps) + 1):
        optimizer.zero_grad()
        task.loss(model, tuple(part.to(device) for part in task.batch(step))).backward()
        optimizer.step()
        if step in steps:
            for state in optimizer.state_dict()["state"].values():
                for key in state:
                    if key.startswith("GG_") and len(state[key]) >= widths[0]:
                        yield state[key], state[key.replace("GG", "Q")]


def main() -> None:
    arguments = parser(__doc__, "refresh_cost.json", device=True)
    arguments.add_argument("--largest", type=int, default=2048, help="the widest layer, a power of two")
    arguments.add_argument("--steps", default="10,100,300", help="when to look, after a multiple of ten")
    given = arguments.parse_args()
    steps = [int(step) for step in given.steps.split(",")]
    found: dict[tuple[int, str], list[tuple[float, ...]]] = defaultdict(list)
    for factor, basis in factors(given.largest, steps, given.device):
        one = torch.eye(len(factor), device=given.device)
        for name, method in METHODS.items():
            ms = 1000 * median(seconds(partial(method, factor, basis), given.device) for _ in range(3))
            made = method(factor, basis)
            rotated = made.mT @ factor @ made
            residual = (rotated - rotated.diagonal().diag()).norm() / factor.norm()
            found[len(factor), name].append((ms, float((made.mT @ made - one).abs().max()), float(residual)))
    results = []
    for (size, name), lines in sorted(found.items(), key=lambda item: item[0][0]):
        times, gaps, residuals = zip(*lines, strict=True)
        line = {"size": size, "method": name, "ms": round(median(times), 3), "matrices": len(lines)}
        line |= {"worst_orthogonality": float(f"{max(gaps):.1e}"), "median_residual": round(median(residuals), 4)}
        results.append(line)
    print(table(" | ".join(results[0]), [[*line.values()] for line in results]))
    write(given.out, {**heading(given.device), "steps": steps, "results": results})


if __name__ == "__main__":
    main()
