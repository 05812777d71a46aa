"""Trains a small network on text with SOAP and Hugging Face's accelerate, on one process or several.

    python examples/trainers/accelerate_loop.py --checkpoints runs/accelerate
    python examples/trainers/accelerate_loop.py --checkpoints runs/accelerate --resume
    torchrun --nproc_per_node 2 examples/trainers/accelerate_loop.py

The network guesses each byte of Python's language reference from the 16 bytes before it. ``save_state`` writes all that
a run depends on; one that is resumed on as many processes ends with the same bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from emerging_optimizers.routing import route_parameters
from emerging_optimizers.soap import SOAP

CONTEXT = 16  # bytes that the network sees
WARMUP = 10  # steps
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


def make_examples(stride: int) -> TensorDataset:
    """Contexts (N, CONTEXT) of the language reference that every Python carries, and the bytes (N,) that follow."""
    data = torch.frombuffer(bytearray("\n\n".join(topics.values()).encode()), dtype=torch.uint8).long()
    windows = data.unfold(0, CONTEXT + 1, stride)
    return TensorDataset(windows[:, :-1], windows[:, -1])


def make_optimizer(model: nn.Module, args: argparse.Namespace, processes: int) -> tuple[SOAP, LambdaLR]:
    """SOAP for hidden matrices, AdamW for the rest, of the model before ``prepare``.

    There is no ``process_group``: every process computes every update, as with
    AdamW, and any one can save.
    """
    groups = route_parameters(model).param_groups(adamw={"weight_decay": 0.0})
    optimizer = SOAP(groups, lr=args.lr, weight_decay=0.01, precondition_frequency=10)
    # accelerate steps a schedule once per process and step: it counts their batches.
    warmup, end = WARMUP * processes, args.steps * processes
    schedule = LambdaLR(optimizer, lambda i: min((i + 1) / warmup, 1 - i / end))
    return optimizer, schedule


def train(args: argparse.Namespace) -> None:
    accelerator = Accelerator(
        # Several processes without GPUs are one run only if this is said.
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=args.accumulate,
        mixed_precision=args.mixed_precision,
        # The order of the examples follows from the seed and the epoch alone.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    set_seed(args.seed)
    model = make_model()
    optimizer, schedule = make_optimizer(model, args, accelerator.num_processes)
    # Without a generator of its own, a loader takes a number from dropout's
    # whenever a loop over it begins.
    examples, own = make_examples(args.stride), torch.Generator()
    loader = DataLoader(examples, args.batch_size, shuffle=True, drop_last=True, generator=own)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    set_seed(args.seed, device_specific=True)  # each process has its own dropout

    step = 0
    if args.resume:
        last = max(args.checkpoints.glob("step-*"))
        accelerator.load_state(last)
        step = int(last.name.removeprefix("step-"))

    batches_per_epoch = len(loader) // args.accumulate * args.accumulate
    while step < args.steps:
        epoch, done = divmod(step * args.accumulate, batches_per_epoch)
        loader.set_epoch(epoch)
        rest = accelerator.skip_first_batches(loader, done)
        for index, (contexts, targets) in enumerate(rest, start=done):
            if index == batches_per_epoch or step == args.steps:
                break
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = F.cross_entropy(model(contexts), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            if step % args.log_every == 0:
                mean, rate = accelerator.reduce(loss.detach(), "mean"), schedule.get_last_lr()[0]
                accelerator.print(f"step {step:>5}  loss {mean.item():.4f}  learning rate {rate:.5f}")
            if args.checkpoints is not None and (step % args.save_every == 0 or step == args.steps):
                accelerator.save_state(args.checkpoints / f"step-{step:06d}")  # by all processes
    accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=200, help="of the optimizer, in all; default: %(default)s")
    add("--batch-size", type=int, default=128, help="examples per batch and process; default: %(default)s")
    add("--stride", type=int, default=7, help="bytes from one example to the next; default: %(default)s")
    add("--accumulate", type=int, default=2, help="batches per step; default: %(default)s")
    add("--lr", type=float, default=0.01, help="largest learning rate; default: %(default)s")
    add("--mixed-precision", choices=["no", "bf16"], default="no", help="default: %(default)s")
    add("--seed", type=int, default=0)
    add("--log-every", type=int, default=20, metavar="N", help="steps; default: %(default)s")
    add("--checkpoints", type=Path, metavar="FOLDER", help="where to save; default: nowhere")
    add("--save-every", type=int, default=100, metavar="N", help="steps; default: %(default)s")
    add("--resume", action="store_true", help="go on from FOLDER's last checkpoint")
    args = parser.parse_args()
    if args.resume and (args.checkpoints is None or not any(args.checkpoints.glob("step-*"))):
        parser.error("--resume needs a FOLDER with a checkpoint")
    train(args)


if __name__ == "__main__":
    main()
