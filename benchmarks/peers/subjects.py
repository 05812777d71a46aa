"""The implementations of SOAP that ``behaviour.py`` looks at, and what it looks at them with.

Like the scripts that use it, this imports nothing of the repository: they also run in an environment in which the name
``emerging_optimizers`` stands for NVIDIA's package, and find each other because they lie in one folder.
"""

import typing
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

#: What each implementation calls the options that the experiments set; an option that is missing here it does not have.
SHAPES = {"frequency": "precondition_frequency", "one_d": "precondition_1d", "merge": "merge_dims"}
NAMES: dict[str, dict[str, str]] = {
    "ours": {**SHAPES, "limit": "max_precond_dim", "method": "weight_decay_method", "maximize": "maximize"},
    "heavyball": {**SHAPES, "limit": "max_precond_dim"},
    "pytorch-optimizer": {**SHAPES, "limit": "max_precondition_dim", "maximize": "maximize"},
    "emerging-optimizers": {"method": "weight_decay_method"},
}
SHARED = ("lr", "betas", "eps", "weight_decay", "shampoo_beta")


class NoSuchOption(Exception):
    """The implementation does not have an option that the experiment needs."""


def optimizer_class(name: str) -> Any:
    if name == "adamw":
        return torch.optim.AdamW
    if name == "heavyball":
        import heavyball

        heavyball.utils.compile_mode = None  # its default would compile anew for every shape, for minutes
        return heavyball.SOAP
    if name == "pytorch-optimizer":
        import pytorch_optimizer

        return pytorch_optimizer.SOAP
    if name == "emerging-optimizers" and not hasattr(typing, "override"):
        typing.override = lambda method: method  # what it needs of Python 3.12
    from emerging_optimizers.soap import SOAP

    return SOAP


class Subject:
    """One implementation, with the experiments' names for its options."""

    def __init__(self, name: str) -> None:
        self.name, self.cls = name, optimizer_class(name)

    def make(self, parameters: Any, **options: Any) -> torch.optim.Optimizer:
        """An optimizer with these options, the rest as it comes."""
        translated = {"lr": 1e-2}
        for option, value in options.items():
            if option not in SHARED and option not in NAMES[self.name]:
                raise NoSuchOption(option)
            translated[NAMES[self.name].get(option, option)] = value
        if self.name == "heavyball" and "frequency" in options:
            translated["use_precond_schedule"] = False  # its schedule would overrule the frequency
        return self.cls(parameters, **translated)


# --- a tensor and what is seen of it --------------------------------------------------------------------------------

SHAPE = (6, 4)


def weight(shape: tuple[int, ...] = SHAPE, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradient(step: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + step))


def steps(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, first: int, last: int) -> list[Tensor]:
    """Takes the steps with these numbers; the weights after each."""
    path = []
    for step in range(first, last + 1):
        parameter.grad = gradient(step, tuple(parameter.shape)).to(parameter.dtype)
        optimizer.step()
        path.append(parameter.detach().clone())
    return path


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a state reaches."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from tensors(entry, f"{path}/{key if isinstance(key, str | int) else '*'}")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from tensors(entry, f"{path}/{index}")


def bases(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The orthonormal matrices of the state, but for identities."""
    found = {}
    for path, tensor in tensors(dict(optimizer.state)):
        matrix = tensor.detach().double()
        if matrix.ndim == 3 and len(matrix) == 1:
            matrix = matrix[0]
        if matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 1:
            one = torch.eye(len(matrix), dtype=torch.float64)
            if (matrix.T @ matrix - one).abs().max() < 1e-3 and (matrix - one).abs().max() > 1e-3:
                found[path] = matrix.clone()
    return found


def factor_sizes(optimizer: torch.optim.Optimizer) -> list[int]:
    """The sizes of the orthonormal matrices in the state."""
    return sorted({len(matrix) for matrix in bases(optimizer).values()})


def as_adamw(subject: Subject, shape: tuple[int, ...], **options: Any) -> str:
    """Whether five steps of a tensor are those of torch's AdamW, at once or one step late."""
    mine, theirs = weight(shape), weight(shape)
    common = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    optimizer = subject.make([mine], **common, **options)
    path = steps(optimizer, mine, 1, 5)
    adamw = torch.optim.AdamW([theirs], lr=1e-2, **common)
    if all(torch.allclose(a, b, atol=1e-5) for a, b in zip(path, steps(adamw, theirs, 1, 5), strict=True)):
        return "equals AdamW"
    late = weight(shape)
    adamw = torch.optim.AdamW([late], lr=1e-2, **common)
    late_path = [late.detach().clone(), *steps(adamw, late, 2, 5)]
    if all(torch.allclose(a, b, atol=1e-5) for a, b in zip(path, late_path, strict=True)):
        return "does nothing in step 1, then equals AdamW that starts at step 2"
    matrices = factor_sizes(optimizer)
    return f"differs from AdamW; bases of sizes {matrices}" if matrices else "differs from AdamW, without a basis"
