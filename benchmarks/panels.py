"""QR by panels and its parts: the reasons for the widths of panels in ``soap.decompositions`` and ``gram_schmidt``.

Run as ``python -m benchmarks.panels`` on a machine left alone; two minutes. LAPACK's QR of a panel, on all threads and
on one, and of whole matrices: LAPACK's, by panels that LAPACK takes whole, by panels as SOAP takes them, and
Gram-Schmidt by panels of 32 and 64 columns. The matrices are nearly orthogonal, so that one pass of it is enough.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from math import inf
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from emerging_optimizers.lab.machine import machine, versions
from emerging_optimizers.precision import fp32_matmul_precision
from emerging_optimizers.soap import decompositions, gram_schmidt

OUT = Path(__file__).parent / "results" / "panels.json"
PANELS = [(rows, columns) for columns in (32, 96, 128, 256) for rows in (256, 512, 768, 1024, 1536, 2048)]
STACKS = [
    (1, 64),
    (16, 64),
    (1, 128),
    (16, 128),
    (16, 256),
    (8, 384),
    (8, 512),
    (1, 512),
    (4, 768),
    (1, 1024),
    (1, 1536),
    (1, 2048),
]
ROUNDS = 7


def by_lapack(matrices: Tensor) -> Tensor:
    return torch.linalg.householder_product(*torch.geqrf(matrices))


def by_panels(tall: float) -> Callable[[Tensor], Tensor]:
    def run(matrices: Tensor) -> Tensor:
        decompositions.TALL = tall
        with fp32_matmul_precision("highest", matrices):
            return decompositions._householder_by_panels(matrices.clone())

    return run


def by_gram_schmidt(width: int) -> Callable[[Tensor], Tensor]:
    def run(matrices: Tensor) -> Tensor:
        gram_schmidt.PANELS = {1: width}
        with fp32_matmul_precision("highest", matrices):
            assert bool(gram_schmidt.orthonormalise_(result := matrices.clone()).all())
        return result

    return run


METHODS = {"lapack_ms": by_lapack, "panels_ms": by_panels(inf), "panels_in_tall_panels_ms": by_panels(1024)}
METHODS |= {f"gram_schmidt_{width}_ms": by_gram_schmidt(width) for width in (32, 64)}


def in_turn(runs: dict[str, Callable[[], object]], per: int) -> dict[str, float]:
    """Milliseconds of each, medians over rounds in which they take turns, divided by so many matrices."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS + 1):
        for name, run in runs.items():
            begin = perf_counter()
            run()
            if number:  # the first warms up
                times[name].append(1000 * (perf_counter() - begin) / per)
    return {name: round(median(taken), 3) for name, taken in times.items()}


def panel_times(rows: int, columns: int) -> dict[str, float]:
    panel = torch.randn(1, columns, rows).mT
    threads = torch.get_num_threads()
    lines: dict[str, float] = {}
    for name, count in (("all_threads_ms", threads), ("one_thread_ms", 1)):
        torch.set_num_threads(count)
        lines |= in_turn({name: partial(torch.geqrf, panel)}, 1)
    torch.set_num_threads(threads)
    return lines


def main() -> None:
    panels = []
    for rows, columns in PANELS:
        panels.append({"rows": rows, "columns": columns, **panel_times(rows, columns)})
        print(panels[-1])
    stacks = []
    for count, size in STACKS:
        stack = torch.eye(size) + 0.3 / size**0.5 * torch.randn(count, size, size)
        stack /= torch.linalg.vector_norm(stack, dim=-2, keepdim=True)
        runs = {name: partial(method, stack) for name, method in METHODS.items()}
        stacks.append({"stack": [count, size, size], **in_turn(runs, count)})
        print(stacks[-1])
    head = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions()}
    OUT.write_text(json.dumps({**head, "panels": panels, "stacks": stacks}, indent=1) + "\n")


if __name__ == "__main__":
    main()
