"""A parameter's optimizer state: which tensors it has, of what shape and dtype, and where they live."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.soap.layout import Layout, layout_for
from emerging_optimizers.soap.packing import packed_size

#: State that the host reads at every step and that is therefore on the CPU.
HOST_KEYS = ("step", "refresh_step")

#: What ``state_dtype`` may be besides None.
STATE_DTYPES = (torch.float32, torch.bfloat16)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of arithmetic, and of state unless an option says otherwise: float64 if any tensor is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def init_state(
    state: dict[str, Any],
    parameter: Tensor,
    layout: Layout,
    pack_factors: bool = False,
    state_dtype: torch.dtype | None = None,
) -> None:
    """Fills an empty state. Its keys depend on the layout alone, so every process that trains a model has the same.

    ``step`` and ``refresh_step`` (the value of ``step`` after the last refresh that was due, 0 without a basis) are on
    the CPU, where the host reads them without waiting, and float64: a float32 counter stands still at 2**24, and with
    it the refreshes. Everything else is on the parameter's device. ``Q_k`` is the identity until there is a basis.

    Args:
        state: Is filled.
        parameter: The parameter.
        layout: Its layout.
        pack_factors: Keep ``GG_k`` as one triangle (``packing``), (d (d + 1) / 2,) instead of (d, d).
        state_dtype: Of ``exp_avg`` and ``Q_k``; None: the working dtype. The others are always in the working dtype.
            Where no gradient comes, ``exp_avg_sq`` and the factors change by ``1 - beta`` of themselves in a step, and
            bfloat16 rounds a change of less than 0.2% away: with a beta of 0.999 they would never decay. For
            ``exp_avg_sq`` no harm was measured (``benchmarks/state_size.py``), but it would save 2 bytes of 21.
    """
    like: dict[str, Any] = {"dtype": working_dtype(parameter), "device": parameter.device}
    kept = {**like, "dtype": state_dtype or working_dtype(parameter)}
    state["step"] = torch.zeros((), dtype=torch.float64, device="cpu")
    state["exp_avg"] = torch.zeros(parameter.shape, **kept)
    state["exp_avg_sq"] = torch.zeros(parameter.shape, **like)
    state["skipped_steps"] = torch.zeros((), dtype=torch.int64, device=parameter.device)
    if layout.axes:
        state["refresh_step"] = torch.zeros((), dtype=torch.float64, device="cpu")
        state["failed_refreshes"] = torch.zeros((), dtype=torch.int64, device=parameter.device)
    for axis in layout.axes:
        size = layout.shape[axis]
        state[f"GG_{axis}"] = torch.zeros(factor_shape(size, pack_factors), **like)
        state[f"Q_{axis}"] = torch.eye(size, **kept)


def factor_shape(size: int, pack_factors: bool) -> tuple[int, ...]:
    """The shape of a factor of an axis of this size, as it is kept."""
    return (packed_size(size),) if pack_factors else (size, size)


def meta_state(parameter: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """The state that a parameter must have under these options, as meta tensors: keys, whole shapes and dtypes."""
    state: dict[str, Any] = {}
    meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    init_state(state, meta, layout_for(parameter, options), options["pack_factors"], options["state_dtype"])
    return state


def init_elsewhere(state: dict[str, Any], parameter: Tensor, options: dict[str, Any]) -> None:
    """Fills the state of a parameter that another process works on: ``step``, and empty tensors for everything else.

    So every process has the same keys, which tools rely on that go through a state.
    """
    whole = meta_state(parameter, options)
    state["step"] = whole.pop("step")
    for key, value in whole.items():
        device = "cpu" if key in HOST_KEYS else parameter.device
        state[key] = torch.zeros(0, dtype=value.dtype, device=device)


def is_elsewhere(state: dict[str, Any]) -> bool:
    """Whether another process has the rest of this state."""
    return "skipped_steps" in state and state["skipped_steps"].dim() > 0


def fits(state: dict[str, Any], layout: Layout, parameter: Tensor, pack_factors: bool = False) -> bool:
    """Whether the state was made for this layout and way of packing, and for a parameter of this shape."""
    wanted, shape = _factor_shapes(layout, pack_factors), parameter.shape
    for key, value in state.items():
        if key in wanted:
            if value.shape != wanted[key]:
                return False
        elif key.startswith("GG_") or (key.startswith("exp_avg") and value.shape != shape):
            return False
    return wanted.keys() <= state.keys()


@lru_cache(maxsize=4096)
def _factor_shapes(layout: Layout, pack_factors: bool) -> dict[str, tuple[int, ...]]:
    return {f"GG_{axis}": factor_shape(layout.shape[axis], pack_factors) for axis in layout.axes}


def masks_on(device: torch.device) -> bool:
    """Whether to decide on the device, with masks, what could be branched on: yes where asking would mean waiting."""
    return device.type != "cpu"
