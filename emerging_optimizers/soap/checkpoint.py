"""What is saved of an optimizer, and how it is loaded: exactly, checked before anything changes, and copied.

A refresh frequency that is a callable is not saved, so that a checkpoint loads with ``torch.load(weights_only=True)``
whatever the callable is; :data:`NOT_SAVED` stands in its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from emerging_optimizers.soap.layout import layout_for
from emerging_optimizers.soap.options import name_of, validate_options
from emerging_optimizers.soap.state import HOST_KEYS, init_state, working_dtype

logger = logging.getLogger(__name__)

#: Stands in a saved group for a ``precondition_frequency`` that was a callable.
NOT_SAVED = "callable, not saved"

#: State that did not always exist: it starts afresh where a saved state does not have it.
LATER_KEYS = ("skipped_steps", "failed_refreshes")


def without_callables(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with every callable refresh frequency replaced by :data:`NOT_SAVED`."""
    groups = [
        {**group, "precondition_frequency": NOT_SAVED} if callable(group["precondition_frequency"]) else group
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def load_exactly(optimizer: Optimizer, load: Callable[[dict[str, Any]], None], state_dict: dict[str, Any]) -> None:
    """Runs ``load(state_dict)``, torch's own loading, between a check of everything and a restoration of dtypes.

    ``Optimizer.load_state_dict`` casts every floating-point state tensor to its parameter's dtype, which would turn
    the float32 factors of a bfloat16 parameter into bfloat16, and looks at no shape. Two temporary hooks, the last
    before and the first after, see the state dict that torch really loads, so that the user's own hooks keep working.

    Args:
        optimizer: The optimizer that is loaded.
        load: Its inherited ``load_state_dict``.
        state_dict: As returned by ``state_dict()``.

    Raises:
        TypeError: Something in it has the wrong type.
        ValueError: Groups, options, keys or shapes do not fit. The first misfit is named, and nothing has changed.
    """
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError("state_dict must be a dict with the keys 'state' and 'param_groups'")
    loaded: dict[Tensor, dict[str, Tensor]] = {}
    frequencies = [group["precondition_frequency"] for group in optimizer.param_groups]

    def check(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
        final = {**final, "param_groups": _groups_to_load(optimizer, final["param_groups"])}
        loaded.update(_states_to_load(optimizer, final))
        return final

    def restore(_: Optimizer) -> None:
        for parameter, state in loaded.items():
            optimizer.state[parameter] = state
        for group, frequency in zip(optimizer.param_groups, frequencies, strict=True):
            if callable(frequency):  # the object itself: torch deep-copies groups
                group["precondition_frequency"] = frequency

    handles = (
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    )
    try:
        load(state_dict)
    finally:
        for handle in handles:
            handle.remove()


def _groups_to_load(optimizer: Optimizer, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups with what they lack, each a complete and valid set of options."""
    if len(saved_groups) != len(optimizer.param_groups):
        raise ValueError(
            f"loaded state dict has {len(saved_groups)} parameter groups, the optimizer {len(optimizer.param_groups)}"
        )
    groups = []
    for index, (saved, live) in enumerate(zip(saved_groups, optimizer.param_groups, strict=True)):
        if len(saved["params"]) != len(live["params"]):
            raise ValueError(
                f"parameter group {index} has {len(saved['params'])} parameters in the loaded state dict, "
                f"{len(live['params'])} in the optimizer"
            )
        group = {**{name: live[name] for name in optimizer.defaults if name in live}, **saved}
        frequency, live_frequency = group["precondition_frequency"], live["precondition_frequency"]
        if frequency == NOT_SAVED or callable(live_frequency):
            if (frequency == NOT_SAVED) != callable(live_frequency):
                logger.warning(
                    "Parameter group %d was saved with precondition_frequency %s; the optimizer's own, %r, is kept.",
                    index,
                    "a callable" if frequency == NOT_SAVED else repr(frequency),
                    live_frequency,
                )
            group["precondition_frequency"] = live_frequency
        try:
            validate_options(group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"parameter group {index} of the loaded state dict: {error}") from error
        groups.append(group)
    return groups


def _states_to_load(optimizer: Optimizer, final: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Parameter and new state for each state that was saved: copies, with the dtype and device that they must have."""
    saved_ids = chain.from_iterable(group["params"] for group in final["param_groups"])
    places = (
        (parameter, options, name_of(live, index))
        for live, options in zip(optimizer.param_groups, final["param_groups"], strict=True)
        for index, parameter in enumerate(live["params"])
    )
    for saved_id, (parameter, options, name) in zip(saved_ids, places, strict=True):
        saved = final["state"].get(saved_id)
        if saved:
            yield parameter, _state_to_load(parameter, options, saved, name)


def _state_to_load(parameter: Tensor, options: dict[str, Any], saved: dict[str, Any], name: str) -> dict[str, Tensor]:
    layout = layout_for(parameter, options)
    wanted: dict[str, Any] = {}
    init_state(wanted, torch.empty(parameter.shape, dtype=working_dtype(parameter), device="meta"), layout)
    unknown = [key for key in saved if key not in wanted]
    missing = [key for key in wanted if key not in saved and key not in LATER_KEYS]
    if unknown or missing:
        raise ValueError(
            f"the loaded state of {name} has the keys {sorted(saved)}, wanted {sorted(wanted)}: "
            f"{'unknown' if unknown else 'missing'} {(unknown or missing)[0]!r}"
        )
    state: dict[str, Tensor] = {}
    for key, template in wanted.items():
        device = torch.device("cpu") if key in HOST_KEYS else parameter.device
        value = saved.get(key)
        if value is None and key in LATER_KEYS:
            state[key] = torch.zeros(template.shape, dtype=template.dtype, device=device)
            continue
        if key in HOST_KEYS and isinstance(value, int | float):
            value = torch.tensor(float(value))
        if not isinstance(value, Tensor):
            raise TypeError(f"the loaded state {key!r} of {name} must be a Tensor, got {type(value).__name__}")
        if value.shape != template.shape:
            raise ValueError(
                f"the loaded state {key!r} of {name} must have shape {tuple(template.shape)}, got {tuple(value.shape)}"
            )
        state[key] = value.detach().to(device, template.dtype, copy=True, memory_format=torch.contiguous_format)
    return state
