"""A Gram product into a Kronecker factor, whole and by blocks of its lower half, which is mirrored before a refresh.

The reason for ``GRAM_ROWS``.

Run as ``python -m benchmarks.gram_product`` on a machine left alone; half a minute.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from emerging_optimizers.lab.machine import machine, versions
from emerging_optimizers.soap.precision import fp32_matmul_precision
from emerging_optimizers.soap import kronecker

OUT = Path(__file__).parent / "results" / "gram_product.json"
SIZES = [
    (1, 2048, 512),
    (1, 1536, 512),
    (1, 1024, 1024),
    (1, 512, 2048),
    (2, 512, 512),
    (4, 768, 768),
    (16, 512, 128),
    (8, 384, 128),
]
ROUNDS = 15


def main() -> None:
    lines = []
    for count, size, rank in SIZES:
        matrix, factor = torch.randn(count, size, rank), torch.zeros(count, size, size)
        products: dict[int, list[float]] = {size: [], 256: [], 128: [], 64: []}
        mirrors: dict[int, list[float]] = {rows: [] for rows in products}
        for _ in range(ROUNDS):
            for rows in products:
                kronecker.GRAM_ROWS = rows
                with fp32_matmul_precision("highest", matrix):
                    begin = perf_counter()
                    kronecker._decay_and_add_gram_(factor, matrix, 0.95, None)
                    middle = perf_counter()
                    kronecker.mirror_(factor)
                products[rows].append(1000 * (middle - begin))
                mirrors[rows].append(1000 * (perf_counter() - middle))
        line: dict[str, Any] = {"stack": [count, size, rank]}
        for rows, taken in products.items():
            line["whole_ms" if rows == size else f"rows_{rows}_ms"] = round(median(taken), 2)
        line["mirror_rows_128_ms"] = round(median(mirrors[128]), 2)
        lines.append(line)
        print(line)
    head = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions()}
    OUT.write_text(json.dumps({**head, "results": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
