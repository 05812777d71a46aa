"""Names, defaults and positional order are the published ones."""

import inspect

import pytest

import emerging_optimizers.mixin
import emerging_optimizers.soap
from emerging_optimizers.soap import soap, soap_utils

PUBLISHED = {
    "SOAP": (
        "params, lr, betas=(0.9, 0.95), shampoo_beta=0.95, eps=1e-08, weight_decay=0.01, *, "
        "weight_decay_method='decoupled', use_nesterov=False, precondition_frequency=1, adam_warmup_steps=0, "
        "precondition_1d=False, correct_bias=True, fp32_matmul_prec='high', use_eigh=False, "
        "qr_fp32_matmul_prec='high', use_adaptive_criteria=False, adaptive_update_tolerance=1e-07, "
        "power_iter_steps=1, max_update_rms=0.0, use_kl_shampoo=False, correct_shampoo_beta_bias=None"
    ),
    "precondition": "grad, eigenbasis_list=None, dims=None",
    "init_kronecker_factors": "grad, precondition_1d=False",
    "update_kronecker_factors": "kronecker_factor_list, grad, shampoo_beta, precondition_1d=False",
    "update_kronecker_factors_kl_shampoo": (
        "kronecker_factor_list, grad, shampoo_beta, eigenbasis_list, eps, eigval_exp=-1.0"
    ),
    "update_eigenbasis_and_momentum": (
        "kronecker_factor_list, eigenbasis_list, exp_avg_sq, momentum, use_eigh=False, use_adaptive_criteria=False, "
        "adaptive_update_tolerance=None, power_iter_steps=1, convert_to_float=True"
    ),
    "get_eigenbasis_eigh": (
        "kronecker_factor_list, convert_to_float=True, eigenbasis_list=None, use_adaptive_criteria=False, "
        "adaptive_update_tolerance=None, eps=None"
    ),
    "get_eigenbasis_qr": (
        "kronecker_factor_list, eigenbasis_list, exp_avg_sq, convert_to_float=True, use_adaptive_criteria=False, "
        "adaptive_update_tolerance=None, power_iter_steps=1"
    ),
}
OWN_SOAP_OPTIONS = {
    "maximize": False,
    "max_precond_dim": 10000,
    "merge_dims": False,
    "second_moment_refresh": "rank",
    "nonfinite": "skip",
    "stagger_updates": False,
    "pack_factors": False,
    "state_dtype": None,
    "process_group": None,
}


def parameters_of(name: str) -> list[inspect.Parameter]:
    """Without annotations, which the published signature does not fix."""
    owner = soap if hasattr(soap, name) else soap_utils
    parameters = inspect.signature(getattr(owner, name)).parameters.values()
    return [p.replace(annotation=inspect.Parameter.empty) for p in parameters]


@pytest.mark.parametrize("name", PUBLISHED)
def test_signature_equals_the_published_one(name: str) -> None:
    parameters = parameters_of(name)
    if name == "SOAP":
        parameters = [p for p in parameters if p.name not in OWN_SOAP_OPTIONS]
    assert str(inspect.Signature(parameters)) == f"({PUBLISHED[name]})"


def test_our_own_options_follow_the_published_ones_and_are_keyword_only() -> None:
    last = parameters_of("SOAP")[-len(OWN_SOAP_OPTIONS) :]
    assert {p.name: p.default for p in last} == OWN_SOAP_OPTIONS
    assert all(p.kind is p.KEYWORD_ONLY for p in last)


def test_convenience_imports_are_the_same_objects() -> None:
    assert emerging_optimizers.soap.SOAP is soap.SOAP
    assert issubclass(soap.SOAP, emerging_optimizers.mixin.WeightDecayMixin)
