"""Validation of a parameter group's options: one rule per option, wording as in ``torch.optim``."""

from __future__ import annotations

import logging
import operator
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.mixin import WeightDecayMixin
from emerging_optimizers.precision import MATMUL_PRECISIONS
from emerging_optimizers.soap.refresh import SECOND_MOMENT_REFRESHES
from emerging_optimizers.soap.state import STATE_DTYPES

logger = logging.getLogger(__name__)

NONFINITE_POLICIES = ("skip", "raise", "propagate")

#: The arithmetic is float32, where a larger one overflows.
LARGEST_EPS = torch.finfo(torch.float32).max
#: No float holds a larger integer.
LARGEST = sys.float_info.max

_FLAGS = (
    "use_nesterov",
    "precondition_1d",
    "correct_bias",
    "use_eigh",
    "use_adaptive_criteria",
    "use_kl_shampoo",
    "maximize",
    "merge_dims",
    "stagger_updates",
    "pack_factors",
)
_CHOICES = {
    "fp32_matmul_prec": tuple(MATMUL_PRECISIONS),
    "qr_fp32_matmul_prec": tuple(MATMUL_PRECISIONS),
    "second_moment_refresh": SECOND_MOMENT_REFRESHES,
    "nonfinite": NONFINITE_POLICIES,
}


def check_params(params: object) -> None:
    """Raises a TypeError for what has parameters and is none: torch's own words name neither it nor a way out."""
    name = type(params).__name__
    if isinstance(params, torch.nn.Module):
        raise TypeError(
            f"params is a module, {name}: give its parameters() or, with embeddings, head and vectors left to AdamW, "
            "emerging_optimizers.routing.route_parameters(module).param_groups()"
        )
    if callable(getattr(params, "param_groups", None)):
        raise TypeError(f"params is a {name}: give its param_groups()")


def validate_options(options: dict[str, Any]) -> None:
    """Checks every option of one parameter group, in the order of the constructor's signature.

    Args:
        options: A complete group; keys that are not SOAP's are not looked at.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option has an impossible value.
    """
    _validate_lr(options["lr"])
    betas = options["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r} (wanted a pair of numbers in [0, 1))")
    for index, beta in enumerate(betas):
        _require_number(f"beta parameter at index {index}", beta, lambda b: 0.0 <= b < 1.0, "in [0, 1)")
    _require_number("shampoo_beta", options["shampoo_beta"], lambda b: b < 1.0, "below 1; negative: betas[1]")
    _require_number("epsilon value", options["eps"], lambda e: 0.0 <= e <= LARGEST_EPS, "finite, at least 0")
    if options["eps"] == 0 and options["use_kl_shampoo"] is True:
        raise ValueError("Invalid epsilon value: 0 (KL factors divide by it: wanted a number > 0 with use_kl_shampoo)")
    WeightDecayMixin.validate_weight_decay(options["weight_decay"], options["weight_decay_method"])
    frequency = options["precondition_frequency"]
    if not callable(frequency):
        _require_integer("precondition_frequency", frequency, 1, "or a callable step -> integer")
    _require_integer("adam_warmup_steps", options["adam_warmup_steps"], 0)
    _require_number(
        "adaptive_update_tolerance",
        options["adaptive_update_tolerance"],
        lambda tolerance: 0.0 <= tolerance <= 1.0,
        "in [0, 1]",
    )
    _require_integer("power_iter_steps", options["power_iter_steps"], 1)
    _require_number(
        "max_update_rms", options["max_update_rms"], lambda rms: 0.0 <= rms <= LARGEST, "finite, 0: no clipping"
    )
    if options["correct_shampoo_beta_bias"] is not None:
        _require_flag("correct_shampoo_beta_bias", options["correct_shampoo_beta_bias"], "True, False or None")
    _require_integer("max_precond_dim", options["max_precond_dim"], 0)
    if "stagger_processes" in options:
        _require_integer("stagger_processes", options["stagger_processes"], 1)
    for name in _FLAGS:
        _require_flag(name, options[name], "True or False")
    for name, choices in _CHOICES.items():
        if not isinstance(options[name], str) or options[name] not in choices:
            raise ValueError(f"Invalid {name}: {options[name]!r} (wanted one of {choices})")
    state_dtype = options["state_dtype"]
    if state_dtype is not None:
        if not isinstance(state_dtype, torch.dtype):
            raise TypeError(f"Invalid state_dtype: {state_dtype!r} (wanted None or one of {STATE_DTYPES})")
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"Invalid state_dtype: {state_dtype} (wanted None or one of {STATE_DTYPES})")


def refresh_frequency(frequency: int | Callable[[int], int], step: int) -> int:
    """The refresh frequency at ``step`` (0-based).

    Raises:
        TypeError: A callable returned something other than an integer.
        ValueError: The frequency is below 1.
    """
    value = frequency(step) if callable(frequency) else frequency
    if hasattr(value, "__index__") and not isinstance(value, bool):
        value = operator.index(value)  # an integer of NumPy's, say
    _require_integer(f"precondition_frequency at step {step}", value, 1)
    return value


def _validate_lr(lr: object) -> None:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if lr.layout != torch.strided or lr.is_complex() or lr.dtype == torch.bool:
            raise TypeError(f"Invalid learning rate: {lr} (wanted a number or a 1-element real dense Tensor)")
        if lr.device.type != "cpu":
            return  # looking at it would wait for the device
        lr = lr.item()
    elif isinstance(lr, bool) or not isinstance(lr, int | float):
        raise TypeError(f"Invalid learning rate: {lr!r} (wanted a number or a 1-element Tensor)")
    if not 0.0 <= lr <= LARGEST:
        raise ValueError(f"Invalid learning rate: {lr}")


def _require_number(name: str, value: object, accepts: Callable[[float], bool], wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"Invalid {name}: {value!r} (wanted a number {wanted})")
    if not accepts(value):
        raise ValueError(f"Invalid {name}: {value} (wanted a number {wanted})")


def _require_integer(name: str, value: object, low: int, also: str = "") -> None:
    wanted = f"an integer >= {low} {also}".rstrip()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Invalid {name}: {value!r} (wanted {wanted})")
    if value < low:
        raise ValueError(f"Invalid {name}: {value} (wanted {wanted})")


def _require_flag(name: str, value: object, wanted: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"Invalid {name}: {value!r} (wanted {wanted})")


def warn_of_misspelt_options(group: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Logs a warning for each entry of a parameter group that is no option but is spelt much like one.

    Entries of any other name are the user's own, or a learning-rate scheduler's, as with torch's optimizers.

    Args:
        group: The group as given.
        options: The options that there are.
    """
    for key in group:
        if key not in options and (close := get_close_matches(str(key), options, n=1, cutoff=0.8)):
            logger.warning(
                "A parameter group has %r, which is no option and has no effect. Did you mean %r?", key, close[0]
            )


def name_of(group: dict[str, Any], index: int) -> str:
    """What to call a group's parameter in an error: its name where the group has names, else its place and shape."""
    if "param_names" in group:
        return f"parameter {group['param_names'][index]!r}"
    return f"parameter {index} of its group, shape {tuple(group['params'][index].shape)}"
