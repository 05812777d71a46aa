"""Small things to optimize: loose parameters with made-up gradients, and a network with real ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SHAPES: tuple[tuple[int, ...], ...] = ((), (5,), (4, 3), (2, 3, 2, 2))


def seeded(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def new_parameters(shapes: Sequence[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(seeded(shape, 1000 + index, dtype)) for index, shape in enumerate(shapes)]


def give_gradients(parameters: Iterable[Tensor], step: int) -> None:
    for index, p in enumerate(parameters):
        p.grad = seeded(p.shape, 100 * step + index, p.dtype)


def take_steps(optimizer: Optimizer, parameters: Sequence[Tensor], steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        give_gradients(parameters, step)
        optimizer.step()


def snapshot(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def same(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Whether they are equal, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


class Net(nn.Module):
    """A convolution, a hidden layer and a head: parameters of four, two and one axes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2)
        self.hidden = nn.Linear(3, 4)
        self.head = nn.Linear(4, 1)
        for index, p in enumerate(self.parameters()):
            p.data = seeded(p.shape, seed + index) / 2

    def forward(self, images: Tensor) -> Tensor:
        features = torch.tanh(self.conv(images)).mean((2, 3))
        return self.head(torch.tanh(self.hidden(features))).squeeze(1)


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    images = seeded((size, 1, 3, 3), step)
    return images, images[:, 0, 0, 0] - images[:, 0, 1, 1]


def loss_of(model: nn.Module, step: int) -> Tensor:
    images, targets = batch(step)
    return (model(images).float() - targets).square().mean()


def train(optimizer: Optimizer, model: nn.Module, steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
