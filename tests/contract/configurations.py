"""The optimizers that the contract is tested on, described as torch's own test harness describes its optimizers.

Six configurations of SOAP, and ``torch.optim.AdamW`` as the control: what torch's own optimizer does not do is marked
as an expected failure, strictly, so that the suite proves that it does not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optim_db,
)

from emerging_optimizers.soap import SOAP

# Importing torch's harness forbids everybody in the process to set torch.backends' flags, which other tests do.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

#: The six configurations of SOAP.
SOAP_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "kl": {"use_kl_shampoo": True},
    "eigh": {"use_eigh": True},
    "warm-up": {"adam_warmup_steps": 2, "precondition_frequency": 3},
    "1-D": {"precondition_1d": True},
    "merged": {"merge_dims": True},
}

#: Variants of the default that torch's list for Adam has too, and the other methods of weight decay.
SOAP_VARIANTS: dict[str, dict[str, Any]] = {
    "tensor lr": {"lr": torch.tensor(0.01)},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "weight decay": {"weight_decay": 0.1},
    "independent weight decay": {"weight_decay": 0.01, "weight_decay_method": "independent"},
    "l2": {"weight_decay": 0.1, "weight_decay_method": "l2"},
    "l2, maximize": {"weight_decay": 0.1, "weight_decay_method": "l2", "maximize": True},
}

#: An impossible value for an option that both optimizers have, and what the error says.
SHARED_INVALID: dict[str, tuple[Any, str]] = {
    "lr": (-1.0, "Invalid learning rate: -1.0"),
    "lr nan": (float("nan"), "Invalid learning rate: nan"),
    "negative lr tensor": (torch.tensor(-1.0), "Invalid learning rate: "),
    "lr tensor": (torch.ones(2), "Tensor lr must be 1-element"),
    "beta 1": ((1.0, 0.9), "Invalid beta parameter at index 0: 1.0"),
    "beta 2": ((0.9, -0.5), "Invalid beta parameter at index 1: -0.5"),
    "eps": (-1e-8, "Invalid epsilon value: -1e-08"),
    "weight_decay": (-0.1, "Invalid weight_decay value: -0.1"),
}

#: The same for SOAP's own options.
SOAP_INVALID: dict[str, tuple[Any, str]] = {
    "shampoo_beta": (1.0, "Invalid shampoo_beta: 1.0"),
    "weight_decay_method": ("adam", "Invalid weight_decay_method: 'adam'"),
    "use_nesterov": (1, "Invalid use_nesterov: 1"),
    "precondition_frequency": (0, "Invalid precondition_frequency: 0"),
    "adam_warmup_steps": (-1, "Invalid adam_warmup_steps: -1"),
    "precondition_1d": ("yes", "Invalid precondition_1d: 'yes'"),
    "correct_bias": (None, "Invalid correct_bias: None"),
    "fp32_matmul_prec": ("tf32", "Invalid fp32_matmul_prec: 'tf32'"),
    "use_eigh": (0, "Invalid use_eigh: 0"),
    "qr_fp32_matmul_prec": ("low", "Invalid qr_fp32_matmul_prec: 'low'"),
    "use_adaptive_criteria": (0, "Invalid use_adaptive_criteria: 0"),
    "adaptive_update_tolerance": (-1.0, "Invalid adaptive_update_tolerance: -1.0"),
    "power_iter_steps": (0, "Invalid power_iter_steps: 0"),
    "max_update_rms": (-1.0, "Invalid max_update_rms: -1.0"),
    "use_kl_shampoo": ("kl", "Invalid use_kl_shampoo: 'kl'"),
    "correct_shampoo_beta_bias": (1, "Invalid correct_shampoo_beta_bias: 1"),
    "maximize": (None, "Invalid maximize: None"),
    "max_precond_dim": (-1, "Invalid max_precond_dim: -1"),
    "merge_dims": (2, "Invalid merge_dims: 2"),
    "second_moment_refresh": ("rotate", "Invalid second_moment_refresh: 'rotate'"),
    "nonfinite": ("ignore", "Invalid nonfinite: 'ignore'"),
    "stagger_updates": (1, "Invalid stagger_updates: 1"),
    "pack_factors": (1, "Invalid pack_factors: 1"),
    "state_dtype": (torch.float16, "Invalid state_dtype: torch.float16"),
}


def option_of(case: str) -> str:
    """The option that a case of :data:`SHARED_INVALID` or :data:`SOAP_INVALID` is about."""
    return "lr" if "lr" in case else "betas" if case.startswith("beta ") else case


def soap_inputs(device: object, dtype: object = None) -> list[OptimizerInput]:
    named = SOAP_OPTIONS | SOAP_VARIANTS
    return [OptimizerInput(params=None, kwargs={"lr": 0.01, **named[desc]}, desc=desc) for desc in named]


def soap_error_inputs(device: object, dtype: object) -> list[ErrorOptimizerInput]:
    own = [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs={"lr": 0.01, option_of(case): value}, desc=f"invalid {case}"),
            error_type=(TypeError, ValueError),
            error_regex=message,
        )
        for case, (value, message) in (SHARED_INVALID | SOAP_INVALID).items()
    ]
    return get_error_inputs_for_all_optims(device, dtype) + own


ADAMW = next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)
SOAP_INFO = OptimizerInfo(
    SOAP,
    optim_inputs_func=soap_inputs,
    optim_error_inputs_func=soap_error_inputs,
    scheduler_inputs=ADAMW.scheduler_inputs,
    supported_impls=(),
    not_og_supported_flags=("maximize",),
    supports_complex=False,
)


@dataclass(frozen=True)
class Configuration:
    """One optimizer and its options, as one of torch's ``OptimizerInput`` objects."""

    info: OptimizerInfo
    input: OptimizerInput

    @property
    def id(self) -> str:
        return f"{self.info.name}-{self.input.desc}"

    def optimizer(self, params: Iterable[Any], **overrides: object) -> Optimizer:
        return self.info.optim_cls(params, **{"lr": 0.01, **copy.deepcopy(self.input.kwargs), **overrides})


INPUTS = [Configuration(info, one) for info in (ADAMW, SOAP_INFO) for one in info.optim_inputs_func("cpu")]
CONFIGURATIONS = [
    one for one in INPUTS if one.id == "AdamW-default" or (one.info is SOAP_INFO and one.input.desc in SOAP_OPTIONS)
]

FAILURE = (AssertionError, pytest.fail.Exception)


def over(
    configurations: list[Configuration], adamw_fails: str = "", raises: type[Exception] | tuple = FAILURE
) -> pytest.MarkDecorator:
    """Parametrises a test by ``configuration``.

    Args:
        configurations: :data:`CONFIGURATIONS` or :data:`INPUTS`.
        adamw_fails: What AdamW does instead, where it is known not to do what is tested.
        raises: How the test fails for it.
    """
    return pytest.mark.parametrize(
        "configuration",
        [
            pytest.param(
                one,
                id=one.id,
                marks=[pytest.mark.xfail(strict=True, reason=adamw_fails, raises=raises)]
                if adamw_fails and one.info is ADAMW
                else [],
            )
            for one in configurations
        ],
    )


def every_configuration(adamw_fails: str = "", raises: type[Exception] | tuple = FAILURE) -> pytest.MarkDecorator:
    """AdamW and the six configurations of SOAP."""
    return over(CONFIGURATIONS, adamw_fails, raises)


def every_input(adamw_fails: str = "", raises: type[Exception] | tuple = FAILURE) -> pytest.MarkDecorator:
    """Every ``OptimizerInput`` of both: torch's own five for AdamW, and SOAP's configurations and variants."""
    return over(INPUTS, adamw_fails, raises)


def error_cases() -> Iterator[Any]:
    """Torch's and our own ``ErrorOptimizerInput`` objects, as parameters ``info`` and ``error``."""
    for info in (ADAMW, SOAP_INFO):
        for number, error in enumerate(info.optim_error_inputs_func("cpu", torch.float32)):
            yield pytest.param(info, error, id=f"{info.name}-{number}-{error.optimizer_error_input.desc}")
