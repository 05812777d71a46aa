"""Where the state that is examined comes from: a live optimizer, or a state dict that was saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

#: Options that a parameter group has if it is SOAP's.
SOAP_OPTIONS = ("shampoo_beta", "precondition_frequency", "max_precond_dim", "merge_dims", "precondition_1d")

#: What a user may give as names: one per parameter in the optimizer's order, or ``model.named_parameters()``.
Names = Iterable[str] | Iterable[tuple[str, Tensor]]


class Entry(NamedTuple):
    """One parameter: its name, its group, its state (empty before its first step) and, where known, its weight."""

    name: str
    options: Mapping[str, Any]
    state: Mapping[str, Any]
    weight: Tensor | None

    @property
    def is_elsewhere(self) -> bool:
        """Whether another process has the tensors: those here are empty, also that of a counter."""
        counter = self.state.get("skipped_steps")
        return isinstance(counter, Tensor) and counter.dim() > 0

    def tensor(self, key: str, *shapes: tuple[int, ...]) -> Tensor:
        """A tensor of the state, of one of these shapes, if given. A DTensor is put together, which is a collective."""
        value: Any = self.state.get(key)
        dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        if not dense or not value.is_floating_point():
            got = "nothing" if value is None else str(getattr(value, "dtype", type(value).__name__))
            raise ValueError(f"the state {key!r} of {self.name} must be a dense tensor of real numbers, got {got}")
        if shapes and tuple(value.shape) not in shapes:
            wanted = next((shape for shape in shapes if len(shape) == value.dim()), shapes[0])
            raise ValueError(f"the state {key!r} of {self.name} must have shape {wanted}, got {tuple(value.shape)}")
        whole: Tensor = _whole(value.detach())
        return whole

    def count(self, key: str) -> int:
        """A counter of the state, 0 where it is not there: a tensor of one element, or a number in older states."""
        value = self.state.get(key, 0)
        try:
            return int(_whole(value.detach()).item() if isinstance(value, Tensor) else value)
        except (OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"the state {key!r} of {self.name} must be a whole number, got {value!r}") from error


def entries(
    source: Optimizer | Mapping[str, Any],
    names: Names | None,
    weights: Mapping[str, Tensor] | None,
) -> Iterator[Entry]:
    """The parameters of an optimizer or a state dict, in order; arguments and errors as of ``examine``."""
    if isinstance(source, Optimizer):
        groups: list[Mapping[str, Any]] = list(source.param_groups)
        states: Mapping[Any, Any] = source.state
    elif isinstance(source, Mapping):
        groups, states = _parts_of(source)
    else:
        raise TypeError(f"source must be a SOAP optimizer or its state dict, got {type(source).__name__}")
    for index, group in enumerate(groups):
        missing = [option for option in SOAP_OPTIONS if option not in group]
        if missing:
            raise ValueError(f"source must be SOAP's: parameter group {index} has no option {missing[0]!r}")
    options = [(key, group) for group in groups for key in group["params"]]
    for name, (key, group) in zip(_names([key for key, _ in options], groups, names), options, strict=True):
        state = states.get(key)  # never by [], which would make an entry
        mine: Any = key.to_local() if hasattr(key, "to_local") else key
        weight = mine if isinstance(mine, Tensor) else (weights or {}).get(name)
        if not isinstance(state, Mapping | None):
            raise ValueError(f"the state of {name} must be a dict, got {type(state).__name__}")
        yield Entry(name, group, state or {}, weight.detach() if isinstance(weight, Tensor) else None)


def _parts_of(source: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], Mapping[Any, Any]]:
    """The groups and states of a state dict."""
    groups, states = source.get("param_groups"), source.get("state")
    if not isinstance(groups, list | tuple) or not isinstance(states, Mapping):
        raise ValueError("source must have a list 'param_groups' and a dict 'state', as state_dict() returns them")
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            raise ValueError(f"parameter group {index} of source must be a dict with a list 'params'")
        if not all(isinstance(key, int | str) for key in group["params"]):
            raise ValueError(f"'params' of parameter group {index} of source must be numbers or names")
    return list(groups), states


def _names(keys: list[Any], groups: list[Mapping[str, Any]], names: Names | None) -> list[str]:
    """A name for each parameter."""
    own: list[Any] = []
    for group in groups:
        held = group.get("param_names")
        count = len(group["params"])
        own += held if isinstance(held, list | tuple) and len(held) == count else [None] * count
    found = [
        str(known) if known is not None else key if isinstance(key, str) else f"parameter {place}"
        for place, (key, known) in enumerate(zip(keys, own, strict=True))
    ]
    if names is None:
        return found
    given: list[Any] = list(names)
    if all(isinstance(name, str) for name in given):
        if len(given) != len(keys):
            raise ValueError(f"names must have one name per parameter, {len(keys)}, got {len(given)}")
        return given
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor) for pair in given):
        raise TypeError("names must be strings, or pairs of name and parameter as model.named_parameters() gives")
    by_identity = {id(parameter): name for name, parameter in given}
    return [by_identity.get(id(key), name) for key, name in zip(keys, found, strict=True)]


def _whole(value: Any) -> Any:
    """A tensor itself; of a DTensor, which is told by its methods, what its processes hold together."""
    if not hasattr(value, "full_tensor"):
        return value
    try:
        return value.to(value.device_mesh.device_type).full_tensor()
    except (RuntimeError, ValueError) as error:  # its processes are gone
        raise ValueError(
            "source has DTensors, which only their processes can put together: let each of them call this on "
            "optimizer.state_dict(), or save the full state"
        ) from error
