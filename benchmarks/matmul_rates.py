"""float32 products of the sizes of a SOAP step in MKL and in oneDNN, in turns: the reason for ``ONEDNN_FROM``.

Also what it costs oneDNN that the decay of a factor is another in every step, as it is while its bias is corrected.
Run as ``python -m benchmarks.matmul_rates`` on a machine left alone; a minute. Says nothing where both are one.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from emerging_optimizers import precision
from emerging_optimizers.lab.machine import machine, versions

OUT = Path(__file__).parent / "results" / "matmul_rates.json"
#: Matrices in the stack, rows, columns and inner dimension.
SIZES = [
    *[(1, size, size, size) for size in (256, 512, 768, 1024, 2048, 3072)],
    *[(1, 2048, 512, 2048), (1, 2048, 512, 512), (1, 3072, 768, 3072), (1, 3072, 768, 768)],
    *[(1, 128, 2048, 2048), (1, 2048, 2048, 128)],  # a panel of a QR
    *[(12, 768, 768, 768), (2, 512, 512, 512), (8, 512, 128, 512), (8, 128, 128, 512), (8, 384, 128, 384)],
    *[(16, 192, 192, 192), (8, 160, 160, 160), (8, 128, 128, 128), (32, 64, 64, 64)],
]
#: Factors in the stack, their rows, and columns of the gradient.
FACTORS = [(1, 2048, 512), (1, 1024, 1024), (8, 512, 128), (8, 128, 128)]
ROUNDS = 9


def factor_times() -> list[dict[str, object]]:
    """Milliseconds of ``K <- beta K + (1 - beta) G G^T``, with one beta and with a new one every time."""
    lines = []
    for count, rows, columns in FACTORS:
        factor, grad = torch.zeros(count, rows, rows), torch.randn(count, rows, columns)
        times: dict[str, list[float]] = {"mkl": [], "onednn_same_beta": [], "onednn_new_beta": []}
        for number in range(4 * ROUNDS):
            for name, taken in times.items():
                beta = 0.9 + number / 1000 if name == "onednn_new_beta" else 0.9
                precision.ONEDNN_FROM = 10**9 if name == "mkl" else 1
                with precision.fp32_matmul_precision("highest", factor):
                    begin = perf_counter()
                    factor.baddbmm_(grad, grad.mT, beta=beta, alpha=1 - beta)
                    taken.append(perf_counter() - begin)
        lines.append(
            {"stack": count, "factor": rows, "columns": columns}
            | {f"{name}_ms": round(1000 * median(taken), 2) for name, taken in times.items()}
        )
        print(lines[-1])
    return lines


def main() -> None:
    lines = []
    for count, m, n, k in SIZES:
        left, right = torch.randn(count, m, k), torch.randn(count, k, n)
        repetitions = max(1, 2 * 10**9 // (count * m * n * k))
        times: dict[str, list[float]] = {"mkl": [], "onednn": []}
        for _ in range(ROUNDS):
            for name, taken in times.items():
                precision.ONEDNN_FROM = 1 if name == "onednn" else 10**9
                with precision.fp32_matmul_precision("highest", left):
                    begin = perf_counter()
                    for _ in range(repetitions):
                        precision.matrix_product(left, right)
                    taken.append((perf_counter() - begin) / repetitions)
        flops = 2 * count * m * n * k
        rates = {f"{name}_gflops": round(flops / median(taken) / 1e9) for name, taken in times.items()}
        lines.append({"stack": count, "product": [m, k, n], **rates})
        print(lines[-1])
    head = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions()}
    OUT.write_text(json.dumps({**head, "results": lines, "factors": factor_times()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
