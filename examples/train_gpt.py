"""Trains a small GPT with SOAP on one process or many, with checkpoints that another number of processes can resume.

On one process, on two with DDP, on two with FSDP2:

    python examples/train_gpt.py
    torchrun --nproc_per_node 2 examples/train_gpt.py --parallel ddp
    torchrun --nproc_per_node 2 examples/train_gpt.py --parallel fsdp

All three learn from the same bytes in the same order and end with the same loss, up to rounding. SOAP needs to know one
thing: that DDP's plain tensors are the same on every rank (``process_group=``). FSDP2's DTensors say where they are.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from emerging_optimizers.routing import route_parameters
from emerging_optimizers.soap import SOAP

VOCABULARY = 256  # bytes
CONTEXT = 128  # bytes that the model sees
HEAD_WIDTH = 32
VALIDATION_BATCHES = 4
WARMUP = 0.1  # of the steps

# What torch says when there is no process group, which is what running without torchrun means.
warnings.filterwarnings("ignore", message="torch.distributed is .*assuming the intent")


class Block(nn.Module):
    """One pre-norm transformer layer: causal attention, then a GELU MLP of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        # Separate matrices rather than one of 3C x C: each has an eigenbasis of its own, and all have one shape.
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, C/H)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder-only language model with learned positions and an untied output head."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Map tokens and the tokens that follow them, both (B, T), to the mean cross-entropy in nats."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def this_rank() -> tuple[int, int]:
    """This process's rank and the number of ranks; 0 of 1 without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def report(message: str) -> None:
    if this_rank()[0] == 0:
        print(message, flush=True)


def mean_over_ranks(value: Tensor) -> float:
    """The mean of a number over the ranks, whose slices of a batch are equally large."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)  # the sum: gloo has no mean
    return value.item() / this_rank()[1]


def read_text() -> tuple[Tensor, Tensor]:
    """The language reference that every Python carries, as bytes; the last tenth is for validation."""
    text = "\n\n".join(topics[key] for key in sorted(topics)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return data[: -len(data) // 10], data[-len(data) // 10 :]


def windows(data: Tensor, starts: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """This rank's slice of a global batch that starts at these bytes (B,): tokens and targets, both (B / ranks, T)."""
    rank, world_size = this_rank()
    mine = starts.chunk(world_size)[rank]
    tokens = data[mine[:, None] + torch.arange(CONTEXT + 1)].to(device)
    return tokens[:, :-1], tokens[:, 1:]


def training_batch(data: Tensor, step: int, args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """This rank's slice of the step's global batch, which follows from the seed and the step alone.

    So neither the number of ranks nor an interruption changes what is learned, and a checkpoint needs no random state.
    """
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    return windows(data, torch.randint(len(data) - CONTEXT, (args.batch_size,), generator=generator), device)


def state_of(model: nn.Module, optimizer: SOAP, schedule: LambdaLR) -> dict[str, Any]:
    """What a checkpoint holds. Every rank must ask: SOAP's ranks hand each other their parts of its state."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "schedule": schedule.state_dict(), "step": schedule.last_epoch}


def save_checkpoint(root: Path, model: nn.Module, optimizer: SOAP, schedule: LambdaLR) -> None:
    """Write a folder ``step-000123``, then publish it: the file ``latest`` names the last complete checkpoint.

    ``latest`` is replaced in one operation of the file system, after all ranks have written all they had. So a run
    that is killed, at whatever moment, leaves it on a complete checkpoint.
    """
    rank, folder = this_rank()[0], root / f"step-{schedule.last_epoch:06d}"
    if rank == 0 and folder.exists():  # never published: what a run left that was killed while it wrote here
        shutil.rmtree(folder)
    dcp.save(state_of(model, optimizer, schedule), checkpoint_id=folder)
    if rank == 0:  # where dcp.save returns when all ranks have written
        (root / "latest.new").write_text(f"{folder.name}\n")
        os.replace(root / "latest.new", root / "latest")


def load_checkpoint(root: Path, model: nn.Module, optimizer: SOAP, schedule: LambdaLR) -> int:
    """Load the last checkpoint, whatever ranks and parallelism it was written with. Returns its step."""
    state = state_of(model, optimizer, schedule)  # tells every rank which parts it needs
    dcp.load(state, checkpoint_id=root / (root / "latest").read_text().strip())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["step"]


def train(args: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(args.seed)  # the same start on all ranks
    gpt = GPT(args.layers, args.width).to(device)
    model, replicas, kind = gpt, None, "one process"
    if dist.is_initialized():
        kind = f"{args.parallel} on {dist.get_world_size()} ranks"
        if args.parallel == "ddp":
            model, replicas = DistributedDataParallel(gpt), dist.group.WORLD
        else:
            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
            for module in [*gpt.blocks, gpt]:
                fully_shard(module, mesh=mesh)

    # Embeddings, head, biases and norms go to AdamW, the blocks' matrices to SOAP. Asked after fully_shard, which
    # replaces the parameters, and of the bare model: DDP's prefix "module." would go into the names and checkpoints.
    groups = route_parameters(gpt).param_groups()
    # The gradient of one step does not span a factor of 4C rows: in the rest, rounding would choose the eigenbasis.
    # Those of ten steps of Adam do, and so the loss depends on the number of ranks no more than its rounding does.
    optimizer = SOAP(groups, lr=args.lr, precondition_frequency=10, adam_warmup_steps=10, process_group=replicas)
    warmup, decay = round(WARMUP * args.steps), args.steps - round(WARMUP * args.steps)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / (warmup + 1), (args.steps - step) / decay))

    start = 0
    report(f"{sum(p.numel() for p in gpt.parameters()):,} parameters, {kind}, {device.type}, {args.dtype}")
    if args.checkpoint is not None and (args.checkpoint / "latest").exists():
        if not args.resume:
            raise SystemExit(f"{args.checkpoint} has checkpoints: add --resume, or name another folder")
        start = load_checkpoint(args.checkpoint, gpt, optimizer, schedule)
        report(f"resumed after step {start}")

    training, validation = read_text()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    reported, clock = start, time.perf_counter()
    for step in range(start + 1, args.steps + 1):
        with autocast:
            loss = model(*training_batch(training, step, args, device))
        optimizer.zero_grad()
        loss.backward()  # averages the gradients over the ranks
        optimizer.step()
        schedule.step()
        if step % args.log_every == 0 or step == args.steps:
            mean = mean_over_ranks(loss)
            seconds = (time.perf_counter() - clock) / (step - reported)
            speed = args.batch_size * CONTEXT / seconds
            report(f"step {step:>6}  loss {mean:.4f}  {1000 * seconds:8.1f} ms/step  {speed:>11,.0f} tokens/s")
            reported, clock = step, time.perf_counter()
        if args.checkpoint is not None and (step % args.save_every == 0 or step == args.steps):
            save_checkpoint(args.checkpoint, gpt, optimizer, schedule)

    starts = torch.linspace(0, len(validation) - CONTEXT - 1, VALIDATION_BATCHES * args.batch_size).long()
    with torch.no_grad(), autocast:
        losses = [model(*windows(validation, chunk, device)) for chunk in starts.split(args.batch_size)]
    report(f"validation loss {mean_over_ranks(torch.stack(losses).mean()):.6f} nats/byte")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parallel", choices=["ddp", "fsdp"], default="ddp", help="under torchrun; default: ddp")
    add("--steps", type=int, default=300, metavar="N", help="in all, before and after resuming; default: 300")
    add("--batch-size", type=int, default=24, metavar="N", help="windows per step, over all ranks; default: 24")
    add("--layers", type=int, default=3, metavar="N", help="transformer blocks; default: 3")
    add("--width", type=int, default=128, metavar="N", help=f"a multiple of {HEAD_WIDTH}; default: 128")
    add("--lr", type=float, default=0.01, metavar="X", help="peak learning rate; default: 0.01")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of products (autocast); default: float32")
    add("--seed", type=int, default=0, metavar="N", help="of the start weights and the batches; default: 0")
    add("--log-every", type=int, default=20, metavar="N", help="steps from line to line; default: 20")
    add("--checkpoint", type=Path, metavar="DIR", help="save there, where all ranks can read; default: nowhere")
    add("--save-every", type=int, default=100, metavar="N", help="steps from save to save; default: 100")
    add("--resume", action="store_true", help="continue from DIR's last checkpoint, if it has one")
    args = parser.parse_args()
    for name in ("steps", "batch_size", "layers", "width", "log_every", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.width % HEAD_WIDTH:
        parser.error(f"--width must be a multiple of {HEAD_WIDTH}, got {args.width}")
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint DIR")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world_size:
        parser.error(f"--batch-size must be a multiple of the {world_size} ranks, got {args.batch_size}")
    return args


def main() -> None:
    args = parse_arguments()
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(args, device)
    if dist.is_initialized():
        dist.destroy_process_group()
        # Threads of gloo's outlive the group, and now and then abort Python's shutdown, when all is done and saved.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
