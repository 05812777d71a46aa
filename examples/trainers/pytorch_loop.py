"""Trains a small network on text with SOAP, in a plain loop with all that such a loop usually has.

    python examples/trainers/pytorch_loop.py --checkpoints runs/loop
    python examples/trainers/pytorch_loop.py --checkpoints runs/loop --resume

The network guesses each byte of Python's language reference from the 16 bytes before it. There is a learning rate that
warms up and decays, gradient accumulation, clipping, mixed precision (``--dtype bfloat16``), and a checkpoint from
which a run goes on as if it had never stopped: the resumed run ends with the same bits.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from emerging_optimizers.routing import route_parameters
from emerging_optimizers.soap import SOAP

CONTEXT = 16  # bytes that the network sees
WARMUP = 0.1  # of the steps
CLIP = 1.0  # largest norm of all gradients together


def make_model() -> nn.Module:
    """A network from (B, CONTEXT) bytes to the logits (B, 256) of the next."""
    return nn.Sequential(
        nn.Embedding(256, 16),
        nn.Flatten(),
        nn.Linear(16 * CONTEXT, 128),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(128, 128),
        nn.GELU(),
        nn.Linear(128, 256),
    )


class Run(NamedTuple):
    """What changes from step to step, besides torch's random state."""

    model: nn.Module
    optimizer: SOAP
    schedule: LambdaLR
    batches: torch.Generator  # draws the examples


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> tuple[SOAP, LambdaLR]:
    """SOAP for hidden matrices, AdamW for the rest; warm-up, then linear decay."""
    routing = route_parameters(model)
    print(routing)
    groups = routing.param_groups(adamw={"weight_decay": 0.0})
    optimizer = SOAP(groups, lr=args.lr, weight_decay=0.01, precondition_frequency=10)

    warmup = max(1, round(WARMUP * args.steps))
    decay = args.steps - warmup + 1
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / decay))
    return optimizer, schedule


def save(folder: Path, step: int, run: Run) -> None:
    """Writes all that the next step depends on. Only a whole file has its last name."""
    state = {
        "step": step,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "batches": run.batches.get_state(),
        "random": torch.get_rng_state(),  # of dropout
        "cuda_random": torch.cuda.get_rng_state_all(),  # empty without a GPU
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "unfinished")
    os.replace(folder / "unfinished", folder / f"step-{step:06d}.pt")


def load(folder: Path, run: Run) -> int:
    """Goes back to the last checkpoint. Returns its step."""
    last = max(folder.glob("step-*.pt"))
    state = torch.load(last, map_location="cpu", weights_only=True)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.schedule.load_state_dict(state["schedule"])
    run.batches.set_state(state["batches"])
    torch.set_rng_state(state["random"])
    torch.cuda.set_rng_state_all(state["cuda_random"])
    return state["step"]


def draw(data: Tensor, size: int, batches: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Contexts (B, CONTEXT) from anywhere in the text, and the bytes (B,) that follow them."""
    starts = torch.randint(len(data) - CONTEXT, (size,), generator=batches)
    windows = data[starts[:, None] + torch.arange(CONTEXT + 1)].to(device)
    return windows[:, :-1], windows[:, -1]


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = torch.frombuffer(bytearray("\n\n".join(topics.values()).encode()), dtype=torch.uint8).long()
    batches = torch.Generator().manual_seed(args.seed)

    model = make_model().to(device)
    optimizer, schedule = make_optimizer(model, args)
    run = Run(model, optimizer, schedule, batches)
    start = load(args.checkpoints, run) if args.resume else 0

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    for step in range(start + 1, args.steps + 1):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(args.accumulate):
            contexts, targets = draw(data, args.batch_size // args.accumulate, batches, device)
            with autocast:
                loss = F.cross_entropy(model(contexts), targets) / args.accumulate
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        if step % args.log_every == 0:
            print(f"step {step:>5}  loss {float(total):.4f}  gradient norm {float(norm):.3f}  learning rate {rate:.5f}")
        if args.checkpoints is not None and (step % args.save_every == 0 or step == args.steps):
            save(args.checkpoints, step, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=200, help="of the optimizer, in all; default: %(default)s")
    add("--batch-size", type=int, default=256, help="examples per step; default: %(default)s")
    add("--accumulate", type=int, default=2, help="parts that a batch is computed in; default: %(default)s")
    add("--lr", type=float, default=0.01, help="largest learning rate; default: %(default)s")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of products (autocast)")
    add("--seed", type=int, default=0)
    add("--log-every", type=int, default=20, metavar="N", help="steps; default: %(default)s")
    add("--checkpoints", type=Path, metavar="FOLDER", help="where to save; default: nowhere")
    add("--save-every", type=int, default=100, metavar="N", help="steps; default: %(default)s")
    add("--resume", action="store_true", help="go on from FOLDER's last checkpoint")
    args = parser.parse_args()
    if args.resume and (args.checkpoints is None or not any(args.checkpoints.glob("step-*.pt"))):
        parser.error("--resume needs a FOLDER with a checkpoint")
    train(args)


if __name__ == "__main__":
    main()
