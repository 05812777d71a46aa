"""SOAP in timm: made under a registered name by timm's factory, with its layer and weight decay and its schedule.

    python examples/trainers/timm_registry.py

A small vision transformer of timm's learns scikit-learn's digits, 8 x 8 pixels, which come with scikit-learn. Half-way
all is saved, and a second model, optimizer and schedule, loaded from that, must end where the first ones end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry  # where it is: no public module has it
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from emerging_optimizers.soap import SOAP

EPOCHS = 6
BATCH_SIZE = 64
TEST = 360  # of the 1,797 images


class TimmSOAP(SOAP):
    """SOAP that runs as plain AdamW for the groups that timm marks with ``use_fallback``."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with ``max_precond_dim=0`` if it is marked."""
        fallback = {"max_precond_dim": 0} if param_group.get("use_fallback") else {}
        super().add_param_group({**param_group, **fallback})


def register() -> None:
    """Make "emergingsoap" a name of timm's, which looks up what comes after the last "_" of one."""
    if "emergingsoap" not in timm.optim.list_optimizers():
        info = OptimInfo(
            name="emergingsoap",
            opt_class=TimmSOAP,
            description="SOAP of emerging_optimizers",
            has_eps=True,
            has_momentum=False,  # no such argument: the momentum is betas[0]
            has_betas=True,
            second_order=False,  # of first derivatives: backward() needs no create_graph
            defaults={"precondition_frequency": 10},
        )
        default_registry.register(info)


def build(updates_per_epoch: int) -> tuple[nn.Module, Optimizer, Scheduler]:
    """Model, optimizer and schedule."""
    torch.manual_seed(0)
    options = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=3, **options)
    optimizer = create_optimizer_v2(
        model,
        "emergingsoap",
        lr=0.02,
        weight_decay=0.05,
        layer_decay=0.9,
        fallback_list=["head.*"],
        fallback_no_weight_decay=True,  # class token and positions
    )
    # layer_decay only writes lr_scale into the groups; the schedule multiplies by it.
    schedule, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=EPOCHS,
        warmup_epochs=1,
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return model, optimizer, schedule


def train(
    model: nn.Module, optimizer: Optimizer, schedule: Scheduler, epochs: range, images: Tensor, labels: Tensor
) -> None:
    """Train for these epochs, whose order of images follows from their number alone."""
    updates = len(images) // BATCH_SIZE
    model.train()
    for epoch in epochs:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for update, chosen in enumerate(order[: updates * BATCH_SIZE].split(BATCH_SIZE)):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step_update(epoch * updates + update + 1)


def main() -> None:
    register()
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(digits.target)
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    training, test = shuffled[TEST:], shuffled[:TEST]
    updates, data = len(training) // BATCH_SIZE, (images[training], labels[training])

    model, optimizer, schedule = build(updates)
    train(model, optimizer, schedule, range(EPOCHS // 2), *data)
    for group in optimizer.param_groups:
        kind = "SOAP" if any("Q_0" in optimizer.state[p] for p in group["params"]) else "AdamW"
        size = sum(p.numel() for p in group["params"])
        scale, decay = group["lr_scale"], group["weight_decay"]
        print(f"{kind:<5}  lr x {scale:.2f}  weight decay {decay:.2f}  {size:>6,} parameters")
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(checkpoint, Path("half-way.pt"))
    train(model, optimizer, schedule, range(EPOCHS // 2, EPOCHS), *data)

    resumed, optimizer, schedule = build(updates)
    saved = torch.load("half-way.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    train(resumed, optimizer, schedule, range(EPOCHS // 2, EPOCHS), *data)

    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    pairs = zip(model.parameters(), resumed.parameters(), strict=True)
    same = all(torch.equal(*pair) for pair in pairs)
    print(f"{accuracy:.1%} of {TEST} test images; resumed half-way: weights {'equal' if same else 'DIFFER'}")


if __name__ == "__main__":
    main()
