"""What is saved of an optimizer, and how it is loaded: exactly, checked before anything changes, and copied.

A refresh frequency that is a callable is not saved, so that a checkpoint loads with ``torch.load(weights_only=True)``
whatever the callable is; :data:`NOT_SAVED` stands in its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from emerging_optimizers.soap.options import name_of, validate_options
from emerging_optimizers.soap.state import HOST_KEYS, STATE_DTYPES, meta_state

if TYPE_CHECKING:
    from emerging_optimizers.soap.distributed.driver import SharedParameters

logger = logging.getLogger(__name__)

#: Stands in a saved group for a ``precondition_frequency`` that was a callable.
NOT_SAVED = "callable, not saved"

COUNTERS = ("step", "refresh_step", "skipped_steps", "failed_refreshes")
LARGEST_COUNT = 2**53  # float64 counts no further


def with_plain_options(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with options that load anywhere: plain numbers and texts, :data:`NOT_SAVED` for a callable."""
    groups = []
    for group in state_dict["param_groups"]:
        group = {name: _plain(value) for name, value in group.items()}
        if callable(group["precondition_frequency"]):
            group["precondition_frequency"] = NOT_SAVED
        groups.append(group)
    return {**state_dict, "param_groups": groups}


def _plain(value: Any) -> Any:
    """A number or text of a subclass (``numpy.float64``, a ``StrEnum``) as the base class: others do not load.

    A dtype as its name: torch's distributed state dicts have places for numbers and texts only.
    """
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, torch.dtype):
        return str(value)
    for base in (float, int, str):
        if isinstance(value, base) and type(value) not in (base, bool):
            return base(value)
    return value


def load_exactly(
    optimizer: Optimizer,
    load: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
    shared: SharedParameters | None,
) -> None:
    """Runs ``load(state_dict)``, torch's own loading, between a check of everything and a restoration of dtypes.

    ``Optimizer.load_state_dict`` casts every floating-point state tensor to its parameter's dtype, which would turn
    the float32 factors of a bfloat16 parameter into bfloat16, and looks at no shape. Two temporary hooks, the last
    before and the first after, see the state dict that torch really loads, so that the user's own hooks keep working.

    ``shared`` knows which part of a state this process keeps; None: all.

    Raises:
        TypeError, ValueError: Something does not fit. The first misfit is named, and nothing has changed.
    """
    given: object = state_dict
    if not isinstance(given, dict) or not {"state", "param_groups"} <= set(given):
        raise ValueError("state_dict must be a dict with the keys 'state' and 'param_groups'")
    loaded: dict[Tensor, dict[str, Tensor]] = {}
    frequencies = [group["precondition_frequency"] for group in optimizer.param_groups]

    def check(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
        _check_structure(final)
        try:
            groups = _groups_to_load(optimizer, final["param_groups"])
        except ValueError as error:
            raise _foreign(final, error) from error
        if shared is not None:
            live = zip(groups, optimizer.param_groups, strict=True)
            shared.prepare_loading([{**options, "params": g["params"]} for options, g in live])
        try:
            loaded.update(_states_to_load(optimizer, final, groups, shared))
        except ValueError as error:
            raise _foreign(final, error) from error
        return {**final, "param_groups": groups}

    def restore(_: Optimizer) -> None:
        for parameter, state in loaded.items():
            optimizer.state[parameter] = state
        for group, frequency in zip(optimizer.param_groups, frequencies, strict=True):
            if callable(frequency):  # the object itself: torch deep-copies groups
                group["precondition_frequency"] = frequency
        if shared is not None:
            shared.finish_loading()

    handles = (
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    )
    try:
        load(state_dict)
    finally:
        for handle in handles:
            handle.remove()


def _foreign(final: dict[str, Any], error: ValueError) -> ValueError:
    """The error, with a better reason for it where another optimizer wrote the state."""
    if any("shampoo_beta" in group for group in final["param_groups"]):
        return error
    return ValueError(
        f"{error}. The state dict is not SOAP's (no group has a 'shampoo_beta'): load the model's weights alone, and "
        "start SOAP anew"
    )


def _check_structure(final: dict[str, Any]) -> None:
    """Raises where the nesting is not that of a state dict, which torch and the other checks rely on."""
    _require("state_dict['state']", final["state"], dict)
    _require("state_dict['param_groups']", final["param_groups"], list | tuple)
    ids: set[Any] = set()
    for index, group in enumerate(final["param_groups"]):
        name = f"parameter group {index} of the loaded state dict"
        _require(name, group, dict)
        if "params" not in group:
            raise ValueError(f"{name} has no 'params'")
        _require(f"'params' of {name}", group["params"], list | tuple)
        for saved_id in group["params"]:
            _require(f"an entry of 'params' of {name}", saved_id, int | str)
            if saved_id in ids:
                raise ValueError(f"'params' of {name} has {saved_id!r}, which is in a group already")
            ids.add(saved_id)
    for saved_id, state in final["state"].items():
        if saved_id in ids:
            _require(f"the loaded state of parameter {saved_id!r}", state, dict)


def _require(name: str, value: object, kind: Any) -> None:
    if not isinstance(value, kind):
        wanted = getattr(kind, "__name__", None) or " or ".join(each.__name__ for each in kind.__args__)
        raise TypeError(f"{name} must be a {wanted}, got {type(value).__name__}")


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
        if "param_names" in saved:
            names = saved["param_names"]
            _require(f"'param_names' of parameter group {index} of the loaded state dict", names, list | tuple)
            if len(names) != len(saved["params"]) or not all(isinstance(name, str) for name in names):
                raise ValueError(
                    f"'param_names' of parameter group {index} of the loaded state dict must be "
                    f"{len(saved['params'])} strings, got {names!r}"
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
        if isinstance(group["state_dtype"], str):
            dtypes = {str(dtype): dtype for dtype in STATE_DTYPES}
            group["state_dtype"] = dtypes.get(group["state_dtype"], group["state_dtype"])
        try:
            validate_options(group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"parameter group {index} of the loaded state dict: {error}") from error
        groups.append(group)
    return groups


def _states_to_load(
    optimizer: Optimizer, final: dict[str, Any], groups: list[dict[str, Any]], shared: SharedParameters | None
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Parameter and new state for each state that was saved: copies, with the dtype and device that they must have."""
    saved_ids = chain.from_iterable(group["params"] for group in groups)
    members = (
        (parameter, options, name_of(live, index))
        for live, options in zip(optimizer.param_groups, groups, strict=True)
        for index, parameter in enumerate(live["params"])
    )
    for saved_id, (parameter, options, name) in zip(saved_ids, members, strict=True):
        saved = final["state"].get(saved_id)
        if saved:
            yield parameter, _state_to_load(parameter, options, saved, name, shared)


def _state_to_load(
    parameter: Tensor, options: dict[str, Any], saved: dict[str, Any], name: str, shared: SharedParameters | None
) -> dict[str, Tensor]:
    wanted = meta_state(parameter, options)
    saved = dict(saved)
    if saved.pop("unrotated", 0) != 0:
        raise ValueError(
            f"the loaded state of {name} is of an earlier version, which kept the first moment outside of its basis "
            "('unrotated' is not 0): start SOAP anew"
        )
    unknown = [key for key in saved if key not in wanted]
    missing = [key for key in wanted if key not in saved and (key in HOST_KEYS or key not in COUNTERS)]
    if unknown or missing:
        raise ValueError(
            f"the loaded state of {name} has the keys {sorted(map(str, saved))}, wanted {sorted(wanted)}: "
            f"{'unknown' if unknown else 'missing'} {(unknown or missing)[0]!r}"
        )
    state: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    for key, template in wanted.items():
        device = torch.device("cpu") if key in HOST_KEYS else parameter.device
        value = saved.get(key)
        if key not in saved:  # a count of what went wrong, of which the state is from before it was counted
            value = torch.zeros(template.shape, dtype=template.dtype, device=device)
        if key in HOST_KEYS and isinstance(value, int | float) and not isinstance(value, bool):
            value = torch.tensor(float(min(value, 2 * LARGEST_COUNT)), dtype=torch.float64)  # no float holds 10**400
        if not isinstance(value, Tensor):
            raise TypeError(f"the loaded state {key!r} of {name} must be a Tensor, got {type(value).__name__}")
        if value.shape != template.shape:
            raise ValueError(
                f"the loaded state {key!r} of {name} must have shape {tuple(template.shape)}, got {tuple(value.shape)}"
            )
        if value.layout != torch.strided or value.is_complex() or value.dtype == torch.bool or value.is_meta:
            raise TypeError(
                f"the loaded state {key!r} of {name} must be a dense Tensor of numbers, got {value.layout} "
                f"{value.dtype} on {value.device}"
            )
        if key in COUNTERS:  # before any collective: all processes must come to the same answer
            number = counts[key] = value.item()
            if not (0 <= number <= LARGEST_COUNT and number % 1 == 0):
                raise ValueError(f"the loaded state {key!r} of {name} must be an integer >= 0, got {number}")
        if shared is not None or hasattr(value, "device_mesh"):  # a DTensor may come where no parameter is shared
            from emerging_optimizers.soap.distributed.state_dicts import held_part

            ownership = None if shared is None else shared.loading.get(parameter)
            value = held_part(value, f"the loaded state {key!r} of {name}", key, parameter, ownership)
        state[key] = value.detach().to(device, template.dtype, copy=True, memory_format=torch.contiguous_format)
    if counts.get("refresh_step", 0) > counts["step"]:
        raise ValueError(
            f"the loaded state 'refresh_step' of {name} must not be after 'step' ({counts['step']:g}), got "
            f"{counts['refresh_step']:g}"
        )
    return state
