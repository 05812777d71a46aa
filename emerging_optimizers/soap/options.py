"""The options of a parameter group: one table of rules, wording as in ``torch.optim``.

Defaults stand in the constructor's signature, meanings in its docstring; ``docs/options.md`` is made of the three.
"""

from __future__ import annotations

import logging
import operator
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.mixin import WEIGHT_DECAY_METHODS
from emerging_optimizers.soap.precision import MATMUL_PRECISIONS
from emerging_optimizers.soap.state import STATE_DTYPES

logger = logging.getLogger(__name__)

#: The arithmetic is float32, where a larger one overflows.
LARGEST_EPS = torch.finfo(torch.float32).max
#: No float holds a larger integer.
LARGEST = sys.float_info.max

#: A plain 1-D parameter with more elements than this is taken for several that an engine has laid end to end.
LONGEST_VECTOR = 2**20


class Rule(NamedTuple):
    """What an option may be.

    Attributes:
        wanted: In words.
        types: Of which type; a bool is no number.
        accepts: Whether a value of that type is possible.
        label: What an error calls it; None: its name.
    """

    wanted: str
    types: Any
    accepts: Callable[[Any], bool] = lambda value: True
    label: str | None = None

    def check(self, name: str, value: object) -> None:
        """Raises a TypeError or ValueError that says what was got and what was wanted."""
        if not isinstance(value, self.types) or (isinstance(value, bool) and self.types is not bool):
            raise TypeError(f"Invalid {self.label or name}: {value!r} (wanted {self.wanted})")
        if not self.accepts(value):
            raise ValueError(f"Invalid {self.label or name}: {value} (wanted {self.wanted})")


def _number(wanted: str, accepts: Callable[[float], bool], label: str | None = None) -> Rule:
    return Rule(f"a number {wanted}", int | float, accepts, label)


def _integer(low: int) -> Rule:
    return Rule(f"an integer >= {low}", int, lambda value: value >= low)


_FLAG = Rule("True or False", bool)
_PRECISION = tuple(MATMUL_PRECISIONS)
_BETA = _number("in [0, 1)", lambda beta: 0.0 <= beta < 1.0)

#: The rule of every option, in the order of the constructor's signature; a tuple is of the texts that it may be.
OPTIONS: dict[str, Rule | tuple[str, ...]] = {
    "lr": Rule("a number >= 0 or a 1-element Tensor", int | float, lambda lr: 0.0 <= lr <= LARGEST, "learning rate"),
    "betas": Rule("a pair of numbers in [0, 1)", object, lambda b: isinstance(b, tuple | list) and len(b) == 2),
    "shampoo_beta": _number("below 1; negative: betas[1]", lambda beta: beta < 1.0),
    "eps": _number("finite, at least 0", lambda eps: 0.0 <= eps <= LARGEST_EPS, "epsilon value"),
    "weight_decay": _number("finite, at least 0", lambda decay: 0.0 <= decay <= LARGEST, "weight_decay value"),
    "weight_decay_method": WEIGHT_DECAY_METHODS,
    "use_nesterov": _FLAG,
    "precondition_frequency": Rule("an integer >= 1 or a callable step -> integer", int, lambda value: value >= 1),
    "adam_warmup_steps": _integer(0),
    "precondition_1d": _FLAG,
    "correct_bias": _FLAG,
    "fp32_matmul_prec": _PRECISION,
    "use_eigh": _FLAG,
    "qr_fp32_matmul_prec": _PRECISION,
    "use_adaptive_criteria": _FLAG,
    "adaptive_update_tolerance": _number("in [0, 1]", lambda tolerance: 0.0 <= tolerance <= 1.0),
    "power_iter_steps": _integer(1),
    "max_update_rms": _number("finite, 0: no clipping", lambda rms: 0.0 <= rms <= LARGEST),
    "use_kl_shampoo": _FLAG,
    "correct_shampoo_beta_bias": Rule("True, False or None", bool),
    "maximize": _FLAG,
    "max_precond_dim": _integer(0),
    "merge_dims": _FLAG,
    "second_moment_refresh": ("rank", "kronecker"),
    "nonfinite": ("skip", "raise", "propagate"),
    "stagger_updates": _FLAG,
    "pack_factors": _FLAG,
    "state_dtype": Rule(f"None or one of {STATE_DTYPES}", torch.dtype, lambda dtype: dtype in STATE_DTYPES),
}

#: Options that are off where they are None.
_MAY_BE_NONE = ("correct_shampoo_beta_bias", "state_dtype")


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


def validate_options(options: Mapping[str, Any]) -> None:
    """Checks every option of one parameter group; keys that are not SOAP's are not looked at.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option has an impossible value.
    """
    for name, rule in OPTIONS.items():
        value = options[name]
        if name == "lr" and isinstance(value, Tensor):
            value = _number_in(value)
        if (value is None and name in _MAY_BE_NONE) or (name == "precondition_frequency" and callable(value)):
            continue
        if isinstance(rule, Rule):
            rule.check(name, value)
        elif not isinstance(value, str) or value not in rule:
            raise ValueError(f"Invalid {name}: {value!r} (wanted one of {rule})")
        if name == "betas":
            for index, beta in enumerate(value):
                _BETA.check(f"beta parameter at index {index}", beta)
    if options["eps"] == 0 and options["use_kl_shampoo"]:
        raise ValueError("Invalid epsilon value: 0 (KL factors divide by it: wanted a number > 0 with use_kl_shampoo)")
    if "stagger_processes" in options:
        _integer(1).check("stagger_processes", options["stagger_processes"])


def _number_in(lr: Tensor) -> object:
    """The learning rate in a tensor of one element; 0 where looking at it would wait for its device."""
    if lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if lr.layout != torch.strided or lr.is_complex() or lr.dtype == torch.bool:
        raise TypeError(f"Invalid learning rate: {lr} (wanted a number or a 1-element real dense Tensor)")
    return lr.item() if lr.device.type == "cpu" else 0.0


def refresh_frequency(frequency: int | Callable[[int], int], step: int) -> int:
    """The refresh frequency at ``step`` (0-based).

    Raises:
        TypeError: A callable returned something other than an integer.
        ValueError: The frequency is below 1.
    """
    value = frequency(step) if callable(frequency) else frequency
    if hasattr(value, "__index__") and not isinstance(value, bool):
        value = operator.index(value)  # an integer of NumPy's, say
    _integer(1).check(f"precondition_frequency at step {step}", value)
    return value


def warn_of_misspelt_options(group: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Logs a warning for each entry of a parameter group that is no option but is spelt much like one.

    Entries of any other name are the user's own, or a learning-rate scheduler's, as with torch's optimizers.
    """
    for key in group:
        if key not in options and (close := get_close_matches(str(key), options, n=1, cutoff=0.8)):
            logger.warning(
                "A parameter group has %r, which is no option and has no effect. Did you mean %r?", key, close[0]
            )


def warn_of_flat_parameters(group: Mapping[str, Any]) -> None:
    """Logs a warning for each parameter in which an engine has laid matrices end to end, so that they are gone."""
    for index, parameter in enumerate(group["params"]):
        by_fsdp1 = type(parameter).__name__ == "FlatParameter" or getattr(parameter, "_fsdp_flattened", False)
        if by_fsdp1 or (parameter.dim() == 1 and parameter.numel() > LONGEST_VECTOR):
            logger.warning(
                "%s is a vector of %d elements%s: its matrices are gone, and it gets plain AdamW. Give SOAP the "
                "matrices: shard with FSDP2 (torch.distributed.fsdp.fully_shard), or pass the unflattened parameters.",
                name_of(group, index),
                parameter.numel(),
                " that FSDP1 made" if by_fsdp1 else "",
            )


def name_of(group: Mapping[str, Any], index: int) -> str:
    """What to call a group's parameter in an error: its name where the group has names, else its place and shape."""
    if "param_names" in group:
        return f"parameter {group['param_names'][index]!r}"
    return f"parameter {index} of its group, shape {tuple(group['params'][index].shape)}"
