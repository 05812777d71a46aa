"""How to orthonormalise ``K Q``: time, orthogonality and residual of several methods on the factors of a real training.

    python -m benchmarks.refresh_cost        # three minutes on two cores; leave the machine alone
    python -m benchmarks.refresh_cost --device cuda --out refresh_cost_gpu.json

The race's transformer is trained with SOAP at frequency 10, and the stacks of factors and products that its refreshes
meet are kept. On the device that is asked for, each method then orthonormalises the same products, columns scaled to
unit length. ``fails`` counts matrices whose result is not finite or further than 1e-4 from orthonormal; the other
columns are of the rest. ``residual`` is the off-diagonal part of ``Q^T K Q``, relative to ``K``.

``as_soap_chooses`` has, for frequencies 10 and 1 and by refresh, what SOAP's choice between Gram-Schmidt and
Householder's QR takes beside the latter alone, both with putting columns in order, and how many of the matrices went
through Gram-Schmidt. On the CPU, and of those large enough to have the choice.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.step_time import heading, wait
from emerging_optimizers.lab.optimizers import make_contender
from emerging_optimizers.lab.tasks import make_task
from emerging_optimizers.soap import decompositions, eigenbasis

OUT = Path(__file__).parent / "results" / "refresh_cost.json"
STEPS, KEPT = 1001, (10, 20, 40, 80, 150, 300, 600, 1000)
LEAF = 64


def householder(products: Tensor) -> Tensor:
    return torch.linalg.householder_product(*torch.geqrf(products))


def cholesky_qr_twice(products: Tensor) -> Tensor:
    for _ in range(2):
        root, _ = torch.linalg.cholesky_ex(products.mT @ products, upper=True)
        products = torch.linalg.solve_triangular(root, products, upper=True, left=False)
    return products


def shifted_cholesky_qr(products: Tensor) -> Tensor:
    """Three times, the first with a shift that lets no rounding make the Gram matrix indefinite (arXiv 1809.11085)."""
    size = products.shape[-1]
    for shifted in (True, False, False):
        gram = products.mT @ products
        if shifted:
            bound = torch.linalg.matrix_norm(gram, torch.inf)  # of the largest eigenvalue
            gram.diagonal(dim1=-2, dim2=-1).add_((size * torch.finfo(gram.dtype).eps * bound).unsqueeze(-1))
        root, _ = torch.linalg.cholesky_ex(gram, upper=True)
        products = torch.linalg.solve_triangular(root, products, upper=True, left=False)
    return products


def inverse_root(gram: Tensor) -> Tensor:
    """The upper triangular ``T`` with ``T^T G T = I``, by blocks: all but the leaves are products."""
    size = gram.shape[-1]
    if size <= LEAF:
        root, _ = torch.linalg.cholesky_ex(gram, upper=True)
        identity = torch.eye(size, dtype=gram.dtype, device=gram.device).expand_as(gram)
        return torch.linalg.solve_triangular(root, identity, upper=True)
    half = -(-size // 2 // LEAF) * LEAF
    first = inverse_root(gram[..., :half, :half])
    across = first.mT @ gram[..., :half, half:]
    second = inverse_root(torch.baddbmm(gram[..., half:, half:], across.mT, across, alpha=-1))
    result = torch.zeros_like(gram)
    result[..., :half, :half], result[..., half:, half:] = first, second
    result[..., :half, half:] = -(first @ (across @ second))
    return result


def cholesky_qr_by_products(products: Tensor) -> Tensor:
    for _ in range(2):
        products = products @ inverse_root(products.mT @ products)
    return products


def gram_schmidt(products: Tensor, passes: int) -> Tensor:
    """Panels of 64 columns: out of the earlier ones by projection, among themselves by Cholesky QR."""
    result = torch.empty_like(products)
    for start in range(0, products.shape[-1], LEAF):
        panel, earlier = products[..., start : start + LEAF], result[..., :start]
        for _ in range(passes):
            if start:
                panel = torch.baddbmm(panel, earlier, earlier.mT @ panel, alpha=-1)
            panel = panel @ inverse_root(panel.mT @ panel)
        result[..., start : start + LEAF] = panel
    return result


METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "Householder (LAPACK)": householder,
    "Householder, by panels": lambda products: decompositions._householder_by_panels(products.clone()),
    "Cholesky QR twice (LAPACK)": cholesky_qr_twice,
    "Cholesky QR thrice, shifted (LAPACK)": shifted_cholesky_qr,
    "Cholesky QR twice (products)": cholesky_qr_by_products,
    "panels, one pass": lambda products: gram_schmidt(products, 1),
    "panels, two passes": lambda products: gram_schmidt(products, 2),
}


class Refresh(NamedTuple):
    """What a refresh of a stack met."""

    step: int
    factors: Tensor
    bases: Tensor
    products: Tensor
    quotients: Tensor
    order: Tensor

    def sorted_and_scaled(self) -> Tensor:
        """The products as they are orthonormalised."""
        products = self.products.gather(-1, self.order.unsqueeze(-2).expand_as(self.products))
        return products / torch.linalg.vector_norm(products, dim=-2, keepdim=True)


def refreshes(frequency: int) -> list[Refresh]:
    """Some of the refreshes of a training."""
    kept: list[Refresh] = []
    step = 0
    real = eigenbasis.orthogonal_iteration

    def watch(factors: Tensor, bases: Tensor, products: Tensor, quotients: Tensor, *rest: object) -> object:
        result = real(factors, bases, products, quotients, *rest)
        if step in KEPT:
            kept.append(Refresh(step, *(part.clone() for part in (factors, bases, products, quotients, result[1]))))
        return result

    eigenbasis.orthogonal_iteration = watch
    task = make_task("charlm", 0, {})
    torch.manual_seed(0)
    model = task.model()
    contender = make_contender("soap", model, 0.006, "charlm", frequency)
    for step in range(STEPS):
        task.loss(model, task.batch(step)).backward()
        contender.step()
        contender.zero_grad()
    eigenbasis.orthogonal_iteration = real
    return kept


def choice(frequency: int, kept: list[Refresh]) -> Iterator[dict[str, Any]]:
    """What SOAP's choice takes at the refreshes of a training, by step and size."""
    by_householder: list[int] = []
    real = decompositions._householder

    def count(matrices: Tensor) -> Tensor:
        by_householder.append(len(matrices))
        return real(matrices)

    large = [one for one in kept if one.factors.shape[-1] >= decompositions.GRAM_SCHMIDT_FROM]
    for step, size in sorted({(one.step, one.factors.shape[-1]) for one in large}):
        stacks = [one for one in large if (one.step, one.factors.shape[-1]) == (step, size)]
        times: list[list[float]] = [[], []]
        for _ in range(9):
            for taken, chosen in zip(times, (False, True), strict=True):
                begin = perf_counter()
                for one in stacks:
                    decompositions.orthonormal_columns(
                        one.products, one.bases, one.order, one.quotients if chosen else None
                    )
                taken.append(1000 * (perf_counter() - begin))
        decompositions._householder = count
        by_householder.clear()
        gaps = []
        for one in stacks:
            bases, _ = decompositions.orthonormal_columns(one.products, one.bases, one.order, one.quotients)
            gaps.append(float((bases.mT @ bases - torch.eye(size)).abs().max()))
        decompositions._householder = real
        matrices = sum(len(one.factors) for one in stacks)
        householder_ms, chosen_ms = (round(median(taken) / matrices, 3) for taken in times)
        yield {
            "frequency": frequency,
            "step": step,
            "size": size,
            "matrices": matrices,
            "by_gram_schmidt": matrices - sum(by_householder),
            "householder_ms": householder_ms,
            "as_soap_chooses_ms": chosen_ms,
            "worst_orthogonality": float(f"{max(gaps):.1e}"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    found: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    kept = refreshes(10)
    chosen = [*choice(10, kept), *choice(1, refreshes(1))]
    for one in kept:
        factors, products = one.factors.to(given.device), one.sorted_and_scaled().to(given.device)
        identity = torch.eye(factors.shape[-1], device=given.device)
        for name, method in METHODS.items():
            times = []
            for _ in range(5):
                wait(given.device)
                begin = perf_counter()
                bases = method(products)
                wait(given.device)
                times.append(perf_counter() - begin)
            line = found[name, factors.shape[-1]]
            line["ms"].append(1000 * median(times) / len(factors))
            rotated = bases.mT @ factors @ bases
            off = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
            residuals = torch.linalg.matrix_norm(off) / torch.linalg.matrix_norm(factors)
            gaps = (bases.mT @ bases - identity).abs().amax((-2, -1))
            good = gaps <= 1e-4  # false for NaN
            line["fails"] += (~good).tolist()
            line["orthogonality"] += gaps[good].tolist()
            line["residual"] += residuals[good].tolist()
    lines = [
        {
            "size": size,
            "method": name,
            "ms_per_matrix": round(median(line["ms"]), 3),
            "matrices": len(line["fails"]),
            "fails": int(sum(line["fails"])),
            "worst_orthogonality": float(f"{max(line['orthogonality'], default=float('nan')):.1e}"),
            "median_residual": float(f"{median(line['residual'] or [float('nan')]):.4g}"),
        }
        for (name, size), line in sorted(found.items(), key=lambda item: (item[0][1], list(METHODS).index(item[0][0])))
    ]
    for table in (lines, chosen):
        print("\n| " + " | ".join(table[0]) + " |\n" + "| --- " * len(table[0]) + "|")
        for line in table:
            print("| " + " | ".join(map(str, line.values())) + " |")
    result = {**heading(given.device), "steps": KEPT, "results": lines, "as_soap_chooses": chosen}
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
