"""SOAP in torchtitan: a container that knows it by name, with torchtitan's schedule and checkpoints.

    python examples/trainers/torchtitan_optimizer.py
    torchrun --nproc_per_node 2 examples/trainers/torchtitan_optimizer.py

Two processes shard the model with FSDP2, as torchtitan does. The model has the names of torchtitan's, whose own need a
GPU; it learns the next byte of the language reference that every Python carries. Half-way all is saved, and a second
model, optimizer and schedule, loaded from that, must end where the first ones end. Runs with torchtitan 0.3.0.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim import Optimizer
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

from emerging_optimizers.soap import SOAP

CONTEXT = 16  # bytes that the model sees
BATCH_SIZE = 256
STEPS = 40


class SOAPOptimizersContainer(OptimizersContainer):
    """torchtitan's container, which also makes an optimizer of the name "SOAP"."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """As torchtitan's; its ``build`` makes this container."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name == "SOAP":
            return SOAP
        return OptimizersContainer._resolve_optimizer_factory(name)


def soap_config(lr: float, **options: object) -> SOAPOptimizersContainer.Config:
    """What ``Trainer.Config(optimizer=...)`` takes: SOAP, as plain AdamW for embedding and head.

    What all groups share, and the ``lr`` that SOAP must be given, goes to its constructor.
    """
    return SOAPOptimizersContainer.Config(
        param_groups=[
            ParamGroupConfig(
                pattern=r"(tok_embeddings|lm_head)\.",
                optimizer_name="SOAP",
                optimizer_kwargs={"max_precond_dim": 0},
            ),
            ParamGroupConfig(pattern=r".*", optimizer_name="SOAP"),
        ],
        optimizer_factory_kwargs_by_name={"SOAP": {"lr": lr, **options}},
        implementation="for-loop",  # of "fused" SOAP would make nothing
    )


class NextByte(nn.Module):
    """An embedding, two layers and a head, under the names that they have in torchtitan's models."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(256, 12)
        self.layers = nn.ModuleList([nn.Linear(CONTEXT * 12, width), nn.Linear(width, width)])
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, 256)

    def forward(self, windows: Tensor) -> Tensor:
        """Map windows of bytes (B, CONTEXT + 1) to the mean cross-entropy of the last one, in nats."""
        x = self.tok_embeddings(windows[:, :-1]).flatten(1)
        for layer in self.layers:
            x = F.gelu(layer(x))
        return F.cross_entropy(self.lm_head(self.norm(x)), windows[:, -1])


def build() -> tuple[nn.Module, OptimizersContainer, LRSchedulersContainer]:
    """Model, optimizers and schedules, in the order in which torchtitan's trainer makes them."""
    torch.manual_seed(0)
    model = NextByte()
    if dist.is_initialized():
        for module in [*model.layers, model]:
            fully_shard(module)
    optimizers = soap_config(lr=0.01, precondition_frequency=10).build(model_parts=[model])
    schedule = LRSchedulersContainer.Config(warmup_steps=5, decay_type="cosine")
    return model, optimizers, schedule.build(optimizers=optimizers, training_steps=STEPS)


def train(
    model: nn.Module, optimizers: OptimizersContainer, schedules: LRSchedulersContainer, steps: range, windows: Tensor
) -> float:
    """The mean loss over these steps' batches, which follow from the step's number and the rank alone."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * step + rank)
        loss = model(windows[torch.randint(len(windows), (BATCH_SIZE,), generator=generator)])
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()
        schedules.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


def main() -> None:
    rank = int(os.environ.get("RANK", 0))
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
    text = "\n\n".join(topics[key] for key in sorted(topics)).encode()
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, CONTEXT + 1, 1)
    first, second = range(STEPS // 2), range(STEPS // 2, STEPS)
    folder = Path("checkpoints") / f"step-{len(first)}"

    model, optimizers, schedules = build()
    print(f"rank {rank}: loss {train(model, optimizers, schedules, first, windows):.4f} nats in the first half")
    dcp.save({"model": model, "optimizer": optimizers, "lr_scheduler": schedules}, checkpoint_id=folder)
    loss = train(model, optimizers, schedules, second, windows)

    resumed, optimizers, schedules = build()
    dcp.load({"model": resumed, "optimizer": optimizers, "lr_scheduler": schedules}, checkpoint_id=folder)
    again = train(resumed, optimizers, schedules, second, windows)
    pairs = zip(model.parameters(), resumed.parameters(), strict=True)
    same = all(torch.equal(*(p.to_local() if dist.is_initialized() else p for p in pair)) for pair in pairs)
    print(f"rank {rank}: loss {loss:.4f} in the second, {again:.4f} resumed; weights {'equal' if same else 'DIFFER'}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
