"""What :mod:`division` predicts for models and numbers of GPUs that are not at hand: the second half of ``scaling``."""

from math import prod
from typing import Any

import torch

from benchmarks.scale.division import H100, Division, balance, divide, mesh_of, model, predict, stagger, traffic, work

#: Models, placements and processes of a row for which many GPUs are predicted.
PREDICTED = {
    "GPT-3 1.3B": {"ddp": 0, "fsdp": 0, "hsdp": 8},
    "Llama-3 8B": {"fsdp": 0, "hsdp": 8},
    "Llama-3 70B": {"fsdp": 0, "hsdp": 64},
}
GPUS = [2**k for k in range(3, 13)]
#: Tokens of a step and the rate of bfloat16 training, to compare an optimizer step with.
TOKENS, TRAINING_RATE = 4e6, 0.4 * 989e12
REFRESH_RATES = (2.5e12, 10e12, 40e12)


def fsdp(name: str, processes: int, **options: Any) -> Division:
    return divide(model(name), mesh_of("fsdp", processes), precondition_frequency=10, **options)


def predictions(largest: int) -> list[dict[str, Any]]:
    """Every model, placement and number of GPUs up to a largest one."""
    found = []
    for name, placements in PREDICTED.items():
        parameters = sum(prod(route.shape) for route in model(name).routes)
        for placement, shard in placements.items():
            for gpus in (number for number in GPUS if shard <= number <= largest):
                division = divide(model(name), mesh_of(placement, gpus, shard or 8), precondition_frequency=10)
                together, spread, moved = predict(division, H100), predict(stagger(division), H100), traffic(division)
                found.append(
                    {
                        "model": name,
                        "placement": placement + (f" {shard}" if shard else ""),
                        "gpus": gpus,
                        "mean_ms": 1000 * together.mean,
                        "worst_ms": 1000 * together.worst,
                        "exchange_ms": 1000 * together.exchange,
                        "staggered_mean_ms": 1000 * spread.mean,
                        "staggered_worst_ms": 1000 * spread.worst,
                        "training_ms": 1000 * 6 * parameters * TOKENS / (gpus * TRAINING_RATE),
                        "state_bytes": int(division.state.max()),
                        "sent_bytes": int((moved.sent + moved.broadcast_sent).max()),
                        "received_bytes": int((moved.received + moved.broadcast_received).max()),
                    }
                )
    return found


def variants(name: str) -> dict[str, Division]:
    """The ways to spread refreshes over 8 processes."""
    division = fsdp(name, 8)
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
        for variant, division in variants(name).items()
    ]


def sizes() -> list[dict[str, Any]]:
    """What smaller state saves, and what a basis for the axes beyond ``max_precond_dim`` would cost."""
    small = {"pack_factors": True, "state_dtype": torch.bfloat16}
    found = []
    for name, limit in (("GPT-3 1.3B", None), ("Llama-3 8B", 20_000), ("Llama-3 70B", 30_000)):
        chosen: dict[str, dict[str, Any]] = {"default": {}, "packed, bfloat16": small}
        if limit:
            chosen[f"`max_precond_dim={limit}`"] = {"max_precond_dim": limit}
            chosen[f"`max_precond_dim={limit}`, packed, bfloat16"] = {"max_precond_dim": limit, **small}
        for label, options in chosen.items():
            one, many = fsdp(name, 1, **options), fsdp(name, 64, **options)
            time = predict(many, H100)
            found.append(
                {
                    "model": name,
                    "options": label,
                    "state_bytes": int(one.state.sum()),
                    "flops": float(work(one)[:2].sum((0, 2)).mean()),
                    "mean_ms": 1000 * time.mean,
                    "worst_ms": 1000 * time.worst,
                    "state_bytes_64": int(many.state.max()),
                }
            )
    return found


def sensitivity() -> list[dict[str, Any]]:
    """How much of the prediction hangs on the guessed rate of refreshes, at 64 GPUs, FSDP2."""
    return [
        {"model": name, "flops": rate, "mean_ms": 1000 * predict(fsdp(name, 64), H100._replace(refreshes=rate)).mean}
        for name in PREDICTED
        for rate in REFRESH_RATES
    ]
