"""One phase of the resume tests: ``python -m tests.reliability.resume_worker PHASE FOLDER``, each phase a new process.

``first`` trains every mode and saves at each cut, ``second`` loads each cut and goes on. What a phase has to show goes
to ``FOLDER/PHASE.pt``; the checkpoints are files of their own.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler, SequentialLR

from emerging_optimizers.routing import route_parameters
from emerging_optimizers.soap import SOAP
from tests.algorithm.test_soap import MODES, Everything

STEPS = 14
CUTS = (2, 7)  # in a warm-up of 3 steps; in a refresh period of 10 (bases of steps 1 and 11), and half of the way
SAMPLES, BATCH = 48, 16

CASES: dict[str, tuple[dict[str, Any], torch.dtype]] = {mode: (MODES[mode], torch.float32) for mode in MODES}
CASES |= {
    f"{mode}, {name}": (MODES[mode], dtype)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float64", torch.float64))
    for mode in ("default", "kl, warm-up", "kronecker")
}
CASES |= dict.fromkeys(("two groups", "routed"), ({}, torch.float32))
CASES["maximize"] = {"maximize": True}, torch.float32


class Training:
    """All that a training consists of: model, optimizer, schedule, the order of the data, and torch's generator.

    Args:
        case: a key of `CASES`.
        seed: of the start weights; a resumed training starts from others, which loading replaces.
    """

    def __init__(self, case: str, seed: int) -> None:
        options, dtype = CASES[case]
        torch.manual_seed(seed)
        self.model = Everything().to(dtype)
        self.optimizer = SOAP(groups(case, self.model), **{"lr": 1e-2, **options})
        schedules: list[LRScheduler] = [
            LinearLR(self.optimizer, 0.1, 1.0, total_iters=4),
            LambdaLR(self.optimizer, lambda step: 1.0 / (1.0 + 0.1 * step)),
        ]
        self.scheduler = SequentialLR(self.optimizer, schedules, milestones=[4])
        self.generator = torch.Generator().manual_seed(seed)
        self.order: list[int] = []  # samples of this epoch that are still to come
        self.losses: list[float] = []

    def step(self) -> None:
        """Take one step, on data in an order that is drawn anew each epoch, with noise of the global generator."""
        if not self.order:
            self.order = torch.randperm(SAMPLES, generator=self.generator).tolist()
        chosen, self.order = self.order[:BATCH], self.order[BATCH:]
        tokens = torch.randint(0, 11, (SAMPLES, 6), generator=torch.Generator().manual_seed(1))[chosen]
        output = self.model(tokens)
        target = (tokens[:, 2:5].float().mean(1) - 5) / 2
        error = output.to(torch.promote_types(output.dtype, torch.float32)) - target
        loss = nn.functional.dropout(error, 0.2).square().mean()
        self.optimizer.zero_grad()
        (-loss if self.optimizer.param_groups[0]["maximize"] else loss).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append(loss.item())

    def state(self) -> dict[str, Any]:
        """What a user saves."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
            "order": self.order,
            "losses": self.losses,
        }

    def load(self, state: dict[str, Any]) -> None:
        """What a user does in a new process."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        self.order, self.losses = state["order"], state["losses"]


def groups(case: str, model: nn.Module) -> Any:
    """The parameters as the case has them."""
    if case == "routed":
        return route_parameters(model).param_groups(soap={"precondition_frequency": 3}, adamw={"lr": 3e-3})
    if case == "two groups":
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        slow = {"lr": 3e-3, "betas": (0.8, 0.9), "precondition_1d": True, "precondition_frequency": 3}
        return [{"params": matrices, "precondition_frequency": 10, "adam_warmup_steps": 3}, {"params": vectors, **slow}]
    return model.parameters()


def phase_first(case: str, path: str) -> Any:
    training = Training(case, seed=0)
    for step in range(1, STEPS + 1):
        training.step()
        if step in CUTS:
            torch.save(training.state(), f"{path}-{step}.pt")
    return training.state()


def phase_second(case: str, path: str) -> Any:
    shown = {}
    for cut in CUTS:
        training = Training(case, seed=5)
        training.load(torch.load(f"{path}-{cut}.pt", weights_only=True))
        loaded = copy.deepcopy(training.state())
        for _ in range(cut, STEPS):
            training.step()
        shown[cut] = {"loaded": loaded, "end": training.state()}
    return shown


def run(phase: str, folder: Path) -> None:
    """Go through all cases; an error is what that case shows."""
    work = {"first": phase_first, "second": phase_second}[phase]
    results = {}
    for number, case in enumerate(CASES):
        try:
            results[case] = work(case, str(folder / str(number)))
        except Exception as error:  # told by the test of that case, not of all
            results[case] = {"error": f"{type(error).__name__}: {error}"}
    torch.save(results, folder / f"{phase}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], Path(sys.argv[2]))
