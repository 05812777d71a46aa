"""A small training with one SOAP, the same for all: a network of three matrices learns what another one computes.

    python benchmarks/peers/training.py heavyball weights.pt '{"lr": 0.003}'
    python benchmarks/peers/training.py ours weights.pt '{"lr": 0.003}' skip-first

Prints the losses of three seeds; weights go to the file. With "skip-first" the first step has a learning rate of 0.
``behaviour.py`` runs it for all.
"""

import json
import sys
import warnings
from typing import Any

import torch
from subjects import Subject
from torch import Tensor, nn

WIDTHS = (16, 32, 32, 4)
BATCH, STEPS, SEEDS = 64, 200, (0, 1, 2)


def network(generator: torch.Generator) -> nn.Sequential:
    """Three matrices without biases, since not every implementation takes vectors."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(WIDTHS, WIDTHS[1:], strict=False):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.Tanh()]
        with torch.no_grad():
            layers[-2].weight.copy_(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)
    return nn.Sequential(*layers[:-1])


def train(subject: Subject, options: dict[str, Any], skip_first: bool, seed: int) -> tuple[float, list[Tensor]]:
    """The loss on new data after training on a teacher's outputs, and the weights after steps 0, 10 and 200."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = network(generator), network(generator)
    held_out = torch.randn(2048, WIDTHS[0], generator=generator)
    optimizer = subject.cls(student.parameters(), **options)
    rate = optimizer.param_groups[0]["lr"]
    snapshots = [nn.utils.parameters_to_vector(student.parameters()).detach()]
    for step in range(1, STEPS + 1):
        inputs = torch.randn(BATCH, WIDTHS[0], generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if skip_first and step == 1 else rate
        optimizer.zero_grad()
        (student(inputs) - teacher(inputs).detach()).square().mean().backward()
        optimizer.step()
        if step in (10, STEPS):
            snapshots.append(nn.utils.parameters_to_vector(student.parameters()).detach())
    with torch.no_grad():
        loss = (student(held_out) - teacher(held_out)).square().mean().item()
    return loss, snapshots


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    name, file, options, *flags = sys.argv[1:]
    runs = [train(Subject(name), json.loads(options), "skip-first" in flags, seed) for seed in SEEDS]
    torch.save([snapshots for _, snapshots in runs], file)
    print(json.dumps({"losses": [loss for loss, _ in runs]}))


if __name__ == "__main__":
    main()
