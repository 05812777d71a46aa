"""The contenders of a race: each optimizer behind the same few methods, set up as its users would set it up."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from emerging_optimizers.lab.common import LabError
from emerging_optimizers.routing import route_parameters
from emerging_optimizers.soap import SOAP

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01  # the same for everyone, so that no one wins by regularisation


class Contender:
    """One or two torch optimizers, at their peak rates, that together train every parameter of a model once."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self._peaks = [[float(group["lr"]) for group in o.param_groups] for o in optimizers]

    def schedule(self, factor: float) -> None:
        """Set every learning rate to ``factor`` times its peak."""
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = factor * peak

    def step(self) -> None:
        """Take one step with every optimizer."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop every gradient."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Collect the optimizers' states, safe for ``torch.load(weights_only=True)``."""
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(i)])

    def state_bytes(self) -> int:
        """Count the bytes of all state tensors."""
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY)


def _soap(model: nn.Module, lr: float, frequency: int, **options: Any) -> Contender:
    groups = route_parameters(model).param_groups()
    return Contender(SOAP(groups, lr, BETAS, weight_decay=WEIGHT_DECAY, precondition_frequency=frequency, **options))


def _muon(model: nn.Module, lr: float, rest_lr: float) -> Contender:
    """Muon for the matrices that routing gives to SOAP, AdamW at its own tuned rate for everything else."""
    if not hasattr(torch.optim, "Muon"):
        raise LabError(f"torch {torch.__version__} has no Muon: leave it out with --optimizers, or upgrade torch")
    routing = route_parameters(model)
    matrices = [parameter for _, parameter in routing.soap if parameter.ndim == 2]
    rest = [parameter for _, parameter in [*routing.soap, *routing.adamw] if parameter.ndim != 2]
    rest += [parameter for _, parameter in routing.adamw if parameter.ndim == 2]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=WEIGHT_DECAY))
    if rest:
        optimizers.append(_adamw(rest, rest_lr))
    return Contender(*optimizers)


# name -> (model, learning rate, AdamW's tuned rate, SOAP's refresh frequency) -> Contender
_MAKERS: dict[str, Callable[[nn.Module, float, float, int], Contender]] = {
    "soap": lambda model, lr, _, f: _soap(model, lr, f),
    "soap-kronecker": lambda model, lr, _, f: _soap(model, lr, f, second_moment_refresh="kronecker"),
    "kl-soap": lambda model, lr, _, f: _soap(model, lr, f, use_kl_shampoo=True),
    "adamw": lambda model, lr, _, __: Contender(_adamw(model.parameters(), lr)),
    "muon": lambda model, lr, rest_lr, _: _muon(model, lr, rest_lr),
}
OPTIMIZERS = tuple(_MAKERS)
DEFAULT_OPTIMIZERS = ("soap", "soap-kronecker", "adamw", "muon")


def make_contender(name: str, model: nn.Module, lr: float, task: str, frequency: int) -> Contender:
    """Set up one of `OPTIMIZERS` for a model, at a peak rate; what Muon leaves to AdamW gets the task's tuned rate.

    Raises:
        LabError: this torch does not have the optimizer.
    """
    return _MAKERS[name](model, lr, tuned_rate(task, "adamw"), frequency)


def tuned_rate(task: str, optimizer: str) -> float:
    """Look up the peak learning rate from the committed sweep; a task without one gets the row ``untuned``."""
    table = _rates()
    return float(table.get(task, table["untuned"])[optimizer])


def is_tuned(task: str) -> bool:
    """Tell whether the committed sweep covers a task."""
    return task in _rates()


def _rates() -> Any:
    return json.loads(files("emerging_optimizers.lab").joinpath("learning_rates.json").read_text(encoding="utf-8"))
