"""`digits`: a small convolutional network on scikit-learn's handwritten digits.

A batch is a pair: images (B, 1, 8, 8) float32 in [0, 1] and labels (B,) int64. Of the 1,797 images a fixed fifth is for
validation, the same for every seed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emerging_optimizers.lab.tasks import step_generator

BATCH = 128


class Digits:
    """Classification of 8 x 8 grey images into ten digits; start weights and batches follow from the seed."""

    name = "digits"
    metric = "validation cross-entropy, nats"
    steps = 300
    eval_every = 10

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits  # slow to import, and only this task needs it

        self.seed = seed
        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16.0
        labels = torch.tensor(data.target, dtype=torch.int64)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        held_out, training = order[: len(order) // 5], order[len(order) // 5 :]
        self._images, self._labels = images[training], labels[training]
        self._validation = images[held_out], labels[held_out]

    def model(self) -> nn.Module:
        """Make the network: two convolutions, one hidden layer, 38,000 parameters."""
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Draw BATCH training images with replacement, and their labels."""
        chosen = torch.randint(len(self._labels), (BATCH,), generator=step_generator(self.seed, step))
        return self._images[chosen], self._labels[chosen]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the mean cross-entropy, in nats."""
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> float:
        """Compute the same loss on the held-out images."""
        return self.loss(model, self._validation).item()
