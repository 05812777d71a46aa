"""SOAP in a LightningModule: routed parameter groups, OneCycleLR, gradient clipping, mixed precision, exact resuming.

    python examples/trainers/lightning_module.py
    python examples/trainers/lightning_module.py --precision 32-true bf16-mixed bf16-true
    python examples/trainers/lightning_module.py --resume 2      # again, from the end of epoch 2 of the run before
    python examples/trainers/lightning_module.py --devices 2     # DDP: SOAP's work and state divided between two

The model guesses the next byte of the language reference that every Python carries. It needs no network and no GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, TensorDataset

from emerging_optimizers.routing import route_parameters
from emerging_optimizers.soap import SOAP

CONTEXT = 16  # bytes that the model sees
BATCH_SIZE = 256
STEPS_PER_EPOCH = 20
VALIDATION_WINDOWS = 2048


class NextByte(L.LightningModule):
    """An embedding, three layers and a head: the next byte from the last sixteen."""

    def __init__(self, lr: float, width: int = 96) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tokens = nn.Embedding(256, 12)
        self.layers = nn.Sequential(
            nn.Linear(CONTEXT * 12, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)

    def loss(self, windows: Tensor) -> Tensor:
        """Map windows of bytes (B, CONTEXT + 1) to the mean cross-entropy of the last one, in nats."""
        x = self.tokens(windows[:, :-1]).flatten(1)
        return F.cross_entropy(self.head(self.norm(self.layers(x))).float(), windows[:, -1])

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The loss, for Lightning to differentiate."""
        return self.loss(batch[0])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Log the loss."""
        self.log("validation", self.loss(batch[0]), sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        """SOAP, and its schedule, which moves after every step."""
        replicas = dist.group.WORLD if isinstance(self.trainer.strategy, DDPStrategy) else None
        optimizer = SOAP(
            route_parameters(self).param_groups(),  # the layers' matrices to SOAP, all else to AdamW
            lr=self.hparams["lr"],
            precondition_frequency=10,
            process_group=replicas,
        )
        schedule = OneCycleLR(
            optimizer,
            max_lr=self.hparams["lr"],
            total_steps=int(self.trainer.estimated_stepping_batches),
            cycle_momentum=False,  # or betas[0] goes from 0.95 to 0.85 and back
        )
        by_step = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": by_step}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put divided state together. Every rank comes here; only what rank 0 has is written."""
        whole = tree_map_only(DTensor, DTensor.full_tensor, checkpoint["optimizer_states"])
        checkpoint["optimizer_states"] = whole


class ReferenceText(L.LightningDataModule):
    """Windows of the text; which ones an epoch sees, and in which order, follows from its number alone."""

    def __init__(self) -> None:
        super().__init__()
        text = "\n\n".join(topics[key] for key in sorted(topics)).encode()
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.windows = data.unfold(0, CONTEXT + 1, 1)

    def train_dataloader(self) -> DataLoader:
        """The loader of one epoch, which the trainer asks for at the start of each.

        Lightning saves no random state. With an order of its own for each epoch a resumed run sees what the
        uninterrupted one would have seen.
        """
        generator = torch.Generator().manual_seed(self.trainer.current_epoch)
        limit = len(self.windows) * 9 // 10
        starts = torch.randint(limit, (STEPS_PER_EPOCH * BATCH_SIZE,), generator=generator)
        return DataLoader(TensorDataset(self.windows[starts]), BATCH_SIZE)

    def val_dataloader(self) -> DataLoader:
        """One batch, from the last tenth of the text."""
        starts = torch.linspace(len(self.windows) * 9 // 10, len(self.windows) - 1, VALIDATION_WINDOWS).long()
        return DataLoader(TensorDataset(self.windows[starts]), VALIDATION_WINDOWS)


def train(precision: str, args: argparse.Namespace) -> None:
    L.seed_everything(0, verbose=False)
    folder = args.checkpoints / precision
    trainer = L.Trainer(
        max_epochs=args.epochs,
        precision=precision,
        gradient_clip_val=1.0,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, enable_version_counter=False)],
        accelerator="cpu",
        devices=args.devices,
        strategy="auto" if args.devices == 1 else "ddp",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    resumed = None if args.resume is None else folder / f"epoch={args.resume - 1}.ckpt"
    model = NextByte(lr=args.lr)
    trainer.fit(model, ReferenceText(), ckpt_path=resumed, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    loss = trainer.callback_metrics["validation"]
    trainer.print(f"{precision}: {trainer.global_step} steps, validation loss {loss:.4f} nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--precision", nargs="+", default=["32-true"], metavar="P", help="Lightning's names; default: 32-true")
    add("--epochs", type=int, default=4, metavar="N", help=f"of {STEPS_PER_EPOCH} steps; default: 4")
    add("--lr", type=float, default=0.01, metavar="X", help="peak learning rate; default: 0.01")
    add("--devices", type=int, default=1, metavar="N", help="processes, with one --precision; default: 1")
    add("--checkpoints", type=Path, default=Path("checkpoints"), metavar="DIR", help="default: checkpoints")
    add("--resume", type=int, metavar="N", help="from the checkpoint after N epochs")
    args = parser.parse_args()
    if args.devices > 1 and len(args.precision) > 1:
        parser.error("several devices take one --precision: each trainer starts processes that run all of this script")
    for precision in args.precision:
        train(precision, args)


if __name__ == "__main__":
    main()
