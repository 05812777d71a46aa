"""What refreshing only the leading columns of each basis saves, and what it costs: `charlm`, three seeds, frequency 10.

    python -m benchmarks.leading_block        # a quarter of an hour on two cores; the last seconds are timed

"half" and "quarter" take the power step `K Q` for that share of the columns, those of the largest eigenvalues. The
others keep their directions, but for what makes them orthogonal to the new ones. They too are put in the order of their
eigenvalues and give the second moment its order, for which all of `K Q` is formed here: a step that left them out would
do without, and could only train worse. The times are of the refresh of one axis as it is, and of the part of `K Q` that
would be left out: the most that can be saved, since the orthonormalisation has as many FLOPs as before.

Trainings are done by a process per core, of one thread each. What is kept goes to
``benchmarks/results/leading_block.json``, and tables are printed as Markdown.
"""

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.panels import in_turn
from emerging_optimizers.lab.machine import machine, versions
from emerging_optimizers.lab.optimizers import tuned_rate
from emerging_optimizers.lab.options import Options
from emerging_optimizers.lab.race import Race
from emerging_optimizers.soap import eigenbasis
from emerging_optimizers.soap.decompositions import orthonormal_columns

RESULTS = Path(__file__).parent / "results/leading_block.json"
TASK, FREQUENCY = "charlm", 10
SEEDS = range(3)
SHARES = {"whole": 1.0, "half": 0.5, "quarter": 0.25}
STACKS = [(8, 128), (8, 512), (1, 2048)]


def iteration(share: float) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """``eigenbasis.orthogonal_iteration`` of so many of the columns."""

    def of_leading(
        factors: Tensor, bases: Tensor, products: Tensor, quotients: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        order = torch.argsort(quotients, dim=-1, descending=True, stable=True)
        products, bases = (stack.gather(-1, order.unsqueeze(-2).expand_as(stack)) for stack in (products, bases))
        leading = round(share * bases.shape[-1])
        new_bases, failed = orthonormal_columns(torch.cat([products[..., :leading], bases[..., leading:]], -1), bases)
        return new_bases, order, failed

    return of_leading


def train(seed: int, name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    if name != "whole":
        mock.patch.object(eigenbasis, "orthogonal_iteration", iteration(SHARES[name])).start()
    race = Race(Options(TASK, None, {"soap": (tuned_rate(TASK, "soap"),)}, (seed,), None, FREQUENCY, threads=1))
    for _ in race.play():
        pass
    mock.patch.stopall()
    return {"columns": name, "seed": seed, "validation": race.runs[0].record.validation}


def times(count: int, size: int) -> dict[str, Any]:
    """Milliseconds of a refresh of bases that have hardly turned, and of the products that would be left out."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(count, size, size, generator=generator)).Q
    factor = (basis * torch.logspace(0, -2, size)) @ basis.mT
    turned = basis + 0.1 / size**0.5 * torch.randn(count, size, size, generator=generator)
    basis = torch.linalg.qr(turned).Q.contiguous()
    works: dict[str, Callable[[], object]] = {"refresh": lambda: eigenbasis.refresh_bases(factor, basis)}
    for name, share in list(SHARES.items())[1:]:
        rest = basis[..., round(share * size) :]
        works[f"saved_by_{name}"] = lambda rest=rest: factor @ rest  # type: ignore[misc]
    return {"matrices": count, "size": size, **{f"{name}_ms": ms for name, ms in in_turn(works, 1).items()}}


def main() -> None:
    jobs = list(product(SEEDS, SHARES))
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        runs = []
        for done in pool.map(train, *zip(*jobs, strict=True)):
            runs.append(done)
            print(done["seed"], done["columns"], done["validation"][-1], flush=True)
    timed = [times(*stack) for stack in STACKS]
    about = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions()}
    lists = {"times": timed, "runs": runs}
    rows = {key: ",\n".join(json.dumps(one) for one in some) for key, some in lists.items()}
    parts = "".join(f',\n "{key}": [\n{text}\n ]' for key, text in rows.items())
    RESULTS.write_text(json.dumps(about, indent=1)[:-2] + parts + "\n}\n")

    print("\n| Columns | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean |")
    print("| --- " * (2 + len(SEEDS)) + "|")
    for name in SHARES:
        finals = [one["validation"][-1] for one in runs if one["columns"] == name]
        print(f"| {name} | " + " | ".join(f"{final:.3f}" for final in (*finals, mean(finals))) + " |")
    print()
    for one in timed:
        print(one)


if __name__ == "__main__":
    main()
