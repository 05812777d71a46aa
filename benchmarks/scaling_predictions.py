"""What the cost model predicts for models and numbers of GPUs that are not at hand: the second half of ``scaling``."""

from math import prod
from typing import Any

import torch

from benchmarks.cost_model import (
    Division,
    Options,
    balance,
    divide,
    factor_bytes,
    flops,
    mesh_of,
    stagger,
    state_bytes,
    traffic,
)
from benchmarks.machines import MACHINES, predict
from benchmarks.parameter_sets import MODELS

#: Models, placements and processes of a row for which many GPUs are predicted.
PREDICTED = {
    "GPT-3 1.3B": {"ddp": 0, "fsdp": 0, "hsdp": 8},
    "Llama-3 8B": {"fsdp": 0, "hsdp": 8},
    "Llama-3 70B": {"fsdp": 0, "hsdp": 64},
}
GPUS = [2**k for k in range(3, 13)]
#: Tokens of a step and the rate of bfloat16 training, to compare an optimizer step with.
TOKENS, TRAINING_RATE = 4e6, 0.4 * 989e12


def predictions() -> list[dict[str, Any]]:
    """Every model, placement and number of GPUs."""
    found = []
    for name, placements in PREDICTED.items():
        parameters = sum(prod(weight.shape) for weight in MODELS[name])
        matrices = sum(weight.preconditioned for weight in MODELS[name])
        for placement, shard in placements.items():
            for gpus in GPUS:
                if gpus < shard:
                    continue
                division = divide(MODELS[name], Options(), mesh_of(placement, gpus, shard or 8))
                together = predict(division, MACHINES["H100"])
                spread = predict(stagger(division), MACHINES["H100"])
                moved, factors = traffic(division), factor_bytes(division)
                found.append(
                    {
                        "model": name,
                        "placement": placement + (f" {shard}" if shard else ""),
                        "gpus": gpus,
                        "owners": min(gpus, matrices),
                        "ranks_max_over_mean": balance(division).ranks,
                        "mean_ms": 1000 * together.mean,
                        "worst_ms": 1000 * together.worst,
                        "exchange_ms": 1000 * together.exchange,
                        "staggered_mean_ms": 1000 * spread.mean,
                        "staggered_worst_ms": 1000 * spread.worst,
                        "training_ms": 1000 * 6 * parameters * TOKENS / (gpus * TRAINING_RATE),
                        "state_bytes": int(state_bytes(division).max()),
                        "factor_share": float(factors.max() / factors.sum()),
                        "sent_bytes": int(moved.all_sent.max()),
                        "received_bytes": int(moved.all_received.max()),
                    }
                )
    return found


def variants(name: str, processes: int, placement: str = "fsdp") -> dict[str, Division]:
    """The ways to spread refreshes."""
    division = divide(MODELS[name], Options(), mesh_of(placement, processes))
    return {
        "all in one step": division,
        "`stagger_updates`": stagger(division),
        "places made for one process": stagger(division, 1),
    }


def balances() -> list[dict[str, Any]]:
    """How evenly 8 processes are loaded."""
    return [
        {"model": name, "processes": 8, "variant": variant, **balance(division)._asdict()}
        for name in ("GPT-2 124M", "GPT-3 1.3B")
        for variant, division in variants(name, 8).items()
    ]


def sizes() -> list[dict[str, Any]]:
    """What smaller state saves, and what a basis for the axes beyond ``max_precond_dim`` would cost."""
    small = Options(pack_factors=True, state_dtype=torch.bfloat16)
    found = []
    for name, limit in (("GPT-3 1.3B", None), ("Llama-3 8B", 20_000), ("Llama-3 70B", 30_000)):
        chosen = {"default": Options(), "packed, bfloat16": small}
        if limit:
            chosen[f"`max_precond_dim={limit}`"] = Options(max_precond_dim=limit)
            chosen[f"`max_precond_dim={limit}`, packed, bfloat16"] = small._replace(max_precond_dim=limit)
        for label, options in chosen.items():
            one = divide(MODELS[name], options, mesh_of("fsdp", 1))
            many = divide(MODELS[name], options, mesh_of("fsdp", 64))
            seconds = predict(many, MACHINES["H100"])
            found.append(
                {
                    "model": name,
                    "options": label,
                    "state_bytes": int(state_bytes(one).sum()),
                    "flops": float(flops(one).sum((1, 2)).mean()),
                    "mean_ms": 1000 * seconds.mean,
                    "worst_ms": 1000 * seconds.worst,
                    "state_bytes_64": int(state_bytes(many).max()),
                }
            )
    return found


def sensitivity() -> list[dict[str, Any]]:
    """How much of the prediction hangs on the guessed rate of QR, at 64 GPUs, FSDP2."""
    found = []
    for name in PREDICTED:
        division = divide(MODELS[name], Options(), mesh_of("fsdp", 64))
        for rate in (1e12, 4e12, 16e12):
            seconds = predict(division, MACHINES["H100"]._replace(decompositions=rate))
            found.append({"model": name, "qr_flops": rate, "mean_ms": 1000 * seconds.mean})
    return found
