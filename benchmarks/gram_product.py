"""A Gram product into a Kronecker factor, whole and by blocks of its lower half: the reason for ``GRAM_ROWS``.

Run as ``python -m benchmarks.gram_product`` on a machine left alone; half a minute.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from emerging_optimizers.lab.machine import machine, versions
from emerging_optimizers.soap import kronecker

OUT = Path(__file__).parent / "results" / "gram_product.json"
SIZES = [(1, 2048, 512), (1, 1536, 512), (1, 1024, 1024), (1, 512, 2048), (2, 512, 512), (16, 512, 128)]
ROUNDS = 15


def main() -> None:
    lines = []
    for count, size, rank in SIZES:
        matrix, factor = torch.randn(count, size, rank), torch.zeros(count, size, size)
        times: dict[int, list[float]] = {size: [], 384: [], 256: []}
        for _ in range(ROUNDS):
            for rows, taken in times.items():
                kronecker.GRAM_ROWS = min(rows, rank) if rows < size else size
                begin = perf_counter()
                kronecker.update_factors([factor, None], matrix, 0.95)
                taken.append(1000 * (perf_counter() - begin))
        whole, *blocks = (round(median(taken), 2) for taken in times.values())
        stack = [count, size, rank]
        lines.append({"stack": stack, "whole_ms": whole, "rows_384_ms": blocks[0], "rows_256_ms": blocks[1]})
        print(lines[-1])
    head = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions()}
    OUT.write_text(json.dumps({**head, "results": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
