"""Eigenbases of stacks: a stack equals its members, and no decomposition failure stops a run."""

import logging
import types

import pytest
import torch
from torch import Tensor

from emerging_optimizers.soap import eigenbasis
from emerging_optimizers.soap.eigenbasis import basis_holds, eigh_bases, refresh_bases
from emerging_optimizers.soap.kronecker import (
    project,
    project_back,
    rayleigh_quotients,
    update_factors,
    update_factors_kl,
)
from emerging_optimizers.soap.refresh import refresh_eigenbasis_and_moments


def stack_of_factors(count: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(count, d, d, generator=generator, dtype=torch.float64)).Q
    return (basis * torch.logspace(0, -3, d, dtype=torch.float64)) @ basis.mT


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("use_eigh", [True, False])
@pytest.mark.parametrize("second_moment_refresh", ["rank", "kronecker"])
@pytest.mark.parametrize("tolerance", [None, 0.3])
@pytest.mark.parametrize("axes", [(0, 1), (0,), (1,)])
def test_a_stack_of_b_equals_b_single_tensors(
    use_eigh: bool, second_moment_refresh: str, tolerance: float | None, axes: tuple[int, ...]
) -> None:
    count, shape = 4, (3, 5)
    grad, exp_avg, exp_avg_sq = normal(count, *shape), normal(count, *shape, seed=1), normal(count, *shape, seed=2) ** 2
    factors = [stack_of_factors(count, d) if k in axes else None for k, d in enumerate(shape)]
    bases = [None if f is None else eigh_bases(stack_of_factors(count, f.shape[-1], seed=9)) for f in factors]
    bases = [None if b is None else torch.cat([b[:2], eigh_bases(f)[2:]]) for b, f in zip(bases, factors, strict=True)]

    def whole_step(which: slice) -> list[Tensor]:
        some_factors = [None if f is None else f[which].clone() for f in factors]
        some_bases = [None if b is None else b[which] for b in bases]
        update_factors_kl(some_factors, grad[which], 0.9, some_bases, 1e-8)
        update_factors(some_factors, grad[which], 0.9)
        refreshed = refresh_eigenbasis_and_moments(
            some_factors,
            some_bases,
            exp_avg[which],
            exp_avg_sq[which],
            use_eigh=use_eigh,
            adaptive_tolerance=tolerance,
            second_moment_refresh=second_moment_refresh,
        )
        inside = project(grad[which], refreshed.bases)
        back = project_back(inside, refreshed.bases)
        torch.testing.assert_close(back, grad[which])
        return [
            refreshed.exp_avg_sq,
            refreshed.exp_avg.abs(),
            inside.abs(),
            *(f for f in some_factors if f is not None),
        ]

    together = whole_step(slice(None))
    one_by_one = [torch.cat(parts) for parts in zip(*(whole_step(slice(b, b + 1)) for b in range(count)), strict=True)]
    torch.testing.assert_close(together, one_by_one, rtol=1e-10, atol=1e-12)


def test_the_criterion_is_an_equality_for_the_exact_basis() -> None:
    factors = stack_of_factors(2, 6)
    exact = eigh_bases(factors)
    assert basis_holds(factors, rayleigh_quotients(factors, exact), 1e-12).tolist() == [True, True]
    assert basis_holds(factors, rayleigh_quotients(factors, exact.flip(0)), 1e-3).tolist() == [False, False]


@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1.0, 1e20])
def test_the_criterion_does_not_depend_on_the_scale_of_a_float32_factor(scale: float) -> None:
    factors = (scale * stack_of_factors(1, 6)).float()
    exact, other = eigh_bases(factors), eigh_bases(stack_of_factors(1, 6, seed=5)).float()
    assert basis_holds(factors, rayleigh_quotients(factors, exact), 1e-5).tolist() == [True]
    assert basis_holds(factors, rayleigh_quotients(factors, other), 1e-5).tolist() == [False]


def test_a_stack_that_holds_is_returned_as_it_is() -> None:
    factors = stack_of_factors(2, 6)
    exact = eigh_bases(factors)
    bases, order, refreshed = refresh_bases(factors, exact, adaptive_tolerance=1e-9)
    assert bases is exact
    assert order is None
    assert not refreshed.any()


@pytest.mark.parametrize(
    ("failures", "name"), [(("float32", "stack"), ""), (("float32",), "float64"), (("float32", "float64"), "kept")]
)
@pytest.mark.parametrize("silently", [False, True])  # some libraries raise, some return NaN
def test_a_failing_eigh_is_retried_logged_once_and_counted(
    failures: tuple[str, ...],
    name: str,
    silently: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real_eigh = torch.linalg.eigh

    def failing_eigh(matrices: Tensor) -> object:
        fails = str(matrices.dtype).removeprefix("torch.") in failures
        if fails and (matrices.dim() == 3 or "stack" not in failures):
            if silently:
                return types.SimpleNamespace(eigenvectors=torch.full_like(matrices, float("nan")))
            raise torch.linalg.LinAlgError("planted")
        return real_eigh(matrices)

    factors, last_good = stack_of_factors(2, 4).float(), eigh_bases(stack_of_factors(2, 4, seed=5)).float()
    monkeypatch.setattr(torch.linalg, "eigh", failing_eigh)
    monkeypatch.setattr(eigenbasis, "eigh_fallbacks", type(eigenbasis.eigh_fallbacks)())
    with caplog.at_level(logging.WARNING, logger=eigenbasis.logger.name):
        bases = eigh_bases(factors, last_good=last_good)
    if name == "kept":
        assert torch.equal(bases, last_good)
    else:
        rotated = bases.mT @ factors @ bases
        assert (rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))).abs().max() < 1e-6
    assert eigenbasis.eigh_fallbacks == ({name: 2} if name else {})
    assert len(caplog.records) == (1 if name else 0)


def test_a_factor_with_nan_keeps_the_last_good_basis_and_leaves_its_neighbours_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eigenbasis, "eigh_fallbacks", type(eigenbasis.eigh_fallbacks)())
    factors = stack_of_factors(2, 4)
    expected = eigh_bases(factors)
    factors[0, 2, 1] = float("nan")
    bases = eigh_bases(factors, last_good=torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    assert torch.equal(bases[0], torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(bases[1].abs(), expected[1].abs())
    assert eigenbasis.eigh_fallbacks == {"kept": 1}
