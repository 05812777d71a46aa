"""The measurements: what can be known of an optimizer's state from its tensors, a parameter at a time.

A Kronecker factor ``K`` and its eigenbasis ``Q`` are (d, d), columns of ``Q`` are eigenvectors. The state's tensors are
views that training goes on with, so nothing is written to them. Arithmetic is in float32 or float64, at full matmul
precision, also inside autocast; beside the state it takes about four matrices of the largest axis at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from emerging_optimizers.health.diagnosis import Health
from emerging_optimizers.health.results import FactorHealth, TensorHealth
from emerging_optimizers.health.source import Entry, Names, entries
from emerging_optimizers.soap.incidents import incidents
from emerging_optimizers.soap.options import refresh_frequency
from emerging_optimizers.soap.precision import fp32_matmul_precision, without_autocast
from emerging_optimizers.soap.state import layout_for, packed_size, unpack


@torch.no_grad()
def examine(
    source: Optimizer | Mapping[str, Any],
    *,
    names: Names | None = None,
    weights: Mapping[str, Tensor] | None = None,
    exact_spectra: bool = True,
) -> Health:
    """Measures the state of a SOAP optimizer. Only reads; waits for the device.

    Args:
        source: A SOAP optimizer, which gives what this process works on, or what its ``state_dict()`` returned. Where
            that has DTensors, all processes must call this.
        names: A name per parameter in the optimizer's order, or, for a live optimizer, ``model.named_parameters()``.
            None: the names that the groups have (``param_names``), else "parameter 3".
        weights: Parameters by name, for the update ratio of a saved state. A live optimizer has its own.
        exact_spectra: Decompose each factor; otherwise its eigenvalues are taken to be ``diag(Q^T K Q)``, which costs
            nothing more and is exact where the residual is 0.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``source`` is not SOAP's, or a tensor in it has an impossible shape.
    """
    tensors, waiting, elsewhere = [], [], []
    for entry in entries(source, names, weights):
        if not entry.state:
            waiting.append(entry.name)
        elif entry.is_elsewhere:
            elsewhere.append(entry.name)
        else:
            tensors.append(_examine_tensor(entry, exact_spectra))
    survived = dict(incidents) if isinstance(source, Optimizer) else {}
    return Health(tuple(tensors), tuple(waiting), tuple(elsewhere), survived)


def _examine_tensor(entry: Entry, exact_spectra: bool) -> TensorHealth:
    options = entry.options
    exp_avg = entry.tensor("exp_avg")
    shape = tuple(exp_avg.shape)
    exp_avg_sq = entry.tensor("exp_avg_sq", shape)
    layout = layout_for(exp_avg, options)
    step, refresh_step, frequency = entry.count("step"), entry.count("refresh_step"), options["precondition_frequency"]
    with fp32_matmul_precision("highest"), without_autocast(exp_avg.device.type):
        factors = tuple(
            _examine_factor(entry, axis, layout.shape[axis], refresh_step > 0, exact_spectra)
            for axis in (layout.axes if "refresh_step" in entry.state else ())  # a piece of a tensor has none
        )
        finite = all(bool(t.isfinite().all()) for t in (exp_avg, exp_avg_sq)) and all(f.finite for f in factors)
        direction_rms = _direction_rms(exp_avg, exp_avg_sq, step, options) if finite else None
        weight = None if entry.weight is None or tuple(entry.weight.shape) != shape else entry.weight
        weight_rms = None if weight is None or not finite else _rms(weight.to(exp_avg_sq.dtype))
    learning_rate = float(options["lr"])
    update_rms = None if direction_rms is None else learning_rate * direction_rms
    known = callable(frequency) or isinstance(frequency, int)  # not if it was a callable when it was saved
    return TensorHealth(
        name=entry.name,
        shape=shape,
        preconditioned=bool(factors),
        weight_dtype=None if weight is None else _name_of(weight.dtype),
        step=step,
        skipped_steps=entry.count("skipped_steps"),
        failed_refreshes=entry.count("failed_refreshes"),
        frequency=refresh_frequency(frequency, max(step - 1, 0)) if factors and known else None,
        age=step - refresh_step if refresh_step > 0 else None,
        direction_rms=direction_rms,
        update_rms=update_rms,
        weight_rms=weight_rms,
        update_ratio=update_rms / weight_rms if update_rms is not None and weight_rms else None,
        learning_rate=learning_rate,
        dead=exp_avg_sq.numel() > 0 and not bool(exp_avg_sq.any()),
        finite=finite,
        adaptive=bool(options.get("use_adaptive_criteria", False)),
        factors=factors,
    )


def _examine_factor(entry: Entry, axis: int, size: int, has_basis: bool, exact_spectra: bool) -> FactorHealth:
    """Measures one axis of ``size`` indices, whose ``Q`` is the identity that it began as unless it ``has_basis``."""
    factor, basis = (
        entry.tensor(f"GG_{axis}", (size, size), (packed_size(size),)),
        entry.tensor(f"Q_{axis}", (size, size)),
    )
    if factor.dim() == 1:
        factor = unpack(factor.contiguous().unsqueeze(0), size)[0]
    dtype = torch.float64 if factor.dtype == torch.float64 else torch.float32
    basis_dtype = _name_of(basis.dtype)
    factor, basis = factor.to(dtype), basis.to(dtype)
    diagonal = factor.diagonal()
    dead_share = float((diagonal == 0).sum()) / size
    if not (bool(factor.isfinite().all()) and bool(basis.isfinite().all())):
        return FactorHealth(axis, size, None, None, None, None, dead_share, (), basis_dtype, False)

    orthogonality, residual = None, None
    if has_basis:
        gram = basis.mT @ basis
        gram.diagonal().sub_(1)
        orthogonality = float(gram.abs().max())
        del gram
    scale = float(diagonal.abs().max())
    if scale == 0:
        return FactorHealth(axis, size, orthogonality, None, None, None, dead_share, (0.0,) * size, basis_dtype, True)
    factor = factor / scale  # squares of small or large entries would leave float32
    eigenvalues = diagonal / scale
    if has_basis:
        rotated = basis.mT @ (factor @ basis)
        eigenvalues = rotated.diagonal().clone()
        rotated.fill_diagonal_(0.0)
        residual = float(torch.linalg.matrix_norm(rotated) / torch.linalg.matrix_norm(factor))
        del rotated
    if exact_spectra or not has_basis:
        with contextlib.suppress(RuntimeError):  # no convergence, or no memory for it
            eigenvalues = torch.linalg.eigvalsh(factor)
    eigenvalues = eigenvalues.clamp_min(0).sort(descending=True).values
    effective_rank = float(torch.special.entr(eigenvalues / eigenvalues.sum()).sum().exp())
    condition = float(eigenvalues[0]) / max(float(eigenvalues[-1]), torch.finfo(dtype).eps * float(eigenvalues[0]))
    spectrum = tuple(scale * value for value in eigenvalues.tolist())
    return FactorHealth(
        axis, size, orthogonality, residual, effective_rank, condition, dead_share, spectrum, basis_dtype, True
    )


def _direction_rms(exp_avg: Tensor, exp_avg_sq: Tensor, step: int, options: Mapping[str, Any]) -> float | None:
    """The RMS of ``Mh / (sqrt(Vh) + eps)``. Rotating it back would not change it: the bases are orthonormal."""
    if step == 0 or exp_avg.numel() == 0:
        return None
    corrections = [1 - beta**step if options.get("correct_bias", True) else 1.0 for beta in options["betas"]]
    denominator = (exp_avg_sq / corrections[1]).sqrt_().add_(options["eps"])
    value = _rms(torch.where(exp_avg == 0, 0.0, exp_avg.to(denominator.dtype) / corrections[0] / denominator))
    limit = options.get("max_update_rms", 0.0)
    value = min(value, limit) if limit > 0 else value
    return value if value < float("inf") else None


def _rms(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) / sqrt(max(tensor.numel(), 1))


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
