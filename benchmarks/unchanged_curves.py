"""Whether what makes SOAP fast changes what it learns: `charlm` with and without, three seeds, frequencies 10 and 1.

    python benchmarks/unchanged_curves.py

"plain" has every optimisation that is on by default switched off: parameters go through a step one by one, products to
torch's BLAS and Gram products whole, QR to LAPACK alone, Adam and the weights are done in passes, and the first moment
is in the eigenbases whatever the frequency. All of that is the same but for rounding, which a training magnifies:
"rate + 1e-6" has a learning rate larger by a millionth of itself and nothing else changed, and shows by how much.
Losses only: nothing is timed, so the machine may be busy; a process per core, of one thread each. What is kept of each
run goes to ``benchmarks/results/unchanged_curves.json``, and a table of final losses is printed as Markdown.
"""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest import mock

import torch

from emerging_optimizers.soap import precision
from emerging_optimizers.adam import adam_direction
from emerging_optimizers.lab.machine import machine, versions
from emerging_optimizers.lab.optimizers import tuned_rate
from emerging_optimizers.lab.options import Options
from emerging_optimizers.lab.race import Race
from emerging_optimizers.mixin import WeightDecayMixin
from emerging_optimizers.soap import algorithm, buckets, decompositions, kronecker, refresh

RESULTS = Path(__file__).parent / "results/unchanged_curves.json"
TASK = "charlm"
SEEDS = range(3)
FREQUENCIES = (10, 1)
NEVER = 10**9  # more rows than any matrix here has


def adam_in_passes(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    return adam_direction(*tensors, **options | {"finite": torch.ones((), dtype=torch.bool)})


def moved_in_passes(weights: list[torch.Tensor], directions: list[torch.Tensor], group: dict[str, Any]) -> None:
    WeightDecayMixin.decay_weights_(weights, group)
    algorithm._subtract_(weights, directions, group)


VARIANTS: dict[str, list[tuple[Any, str, Any]]] = {
    "as it is": [],
    "rate + 1e-6": [],
    "plain": [
        (buckets, "CHUNK_ELEMENTS", 0),
        (precision, "_onednn_is_faster_and_exact", lambda: False),
        (kronecker, "GRAM_ROWS", NEVER),
        (kronecker, "WIDE", NEVER),
        (decompositions, "GRAM_SCHMIDT_FROM", NEVER),
        (decompositions, "PANELS", {NEVER: 1}),
        (algorithm, "adam_direction", adam_in_passes),
        (algorithm, "_move_", moved_in_passes),
        (algorithm, "_moment_outside", lambda *_: None),
        (refresh, "carried_by_rotation", lambda *_: False),
    ],
}


def run(frequency: int, seed: int, variant: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    for module, name, value in VARIANTS[variant]:
        mock.patch.object(module, name, value).start()
    rate = tuned_rate(TASK, "soap") * (1 + 1e-6 * (variant == "rate + 1e-6"))
    race = Race(Options(TASK, None, {"soap": (rate,)}, (seed,), None, frequency, threads=1))
    for _ in race.play():
        pass
    mock.patch.stopall()
    record = race.runs[0].record
    return {"frequency": frequency, "variant": variant, "seed": seed, "validation": record.validation}


def main() -> None:
    jobs = list(product(FREQUENCIES, SEEDS, VARIANTS))
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        runs = []
        for done in pool.map(run, *zip(*jobs, strict=True)):
            runs.append(done)
            print(*(done[key] for key in ("frequency", "seed", "variant")), done["validation"][-1], flush=True)
    about = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions()}
    rows = ",\n".join(json.dumps(one) for one in runs)
    RESULTS.write_text(json.dumps(about, indent=1)[:-2] + f',\n "runs": [\n{rows}\n ]\n}}\n')

    print("\n| f | | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean | deviation |")
    print("| --- " * (4 + len(SEEDS)) + "|")
    for frequency, variant in product(FREQUENCIES, VARIANTS):
        chosen = [one for one in runs if (one["frequency"], one["variant"]) == (frequency, variant)]
        finals = [one["validation"][-1] for one in chosen]
        cells = [f"{final:.3f}" for final in (*finals, mean(finals), stdev(finals))]
        print(f"| {frequency} | {variant} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
