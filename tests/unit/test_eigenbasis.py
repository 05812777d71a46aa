"""Eigenbases of stacks: a stack equals its members, and the criterion means what it says."""

import pytest
import torch
from torch import Tensor

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


@pytest.mark.parametrize("shape", [(3, 8), (3, 9), (9, 3), (4, 4), (1, 3)])
@pytest.mark.parametrize("present", [(True, True), (True, False), (False, True)])
def test_projections_are_what_the_formulas_say_of_tall_and_of_wide_matrices(
    shape: tuple[int, int], present: tuple[bool, bool]
) -> None:
    stack = normal(4, *shape)
    bases = [normal(4, d, d, seed=d) if has else None for d, has in zip(shape, present, strict=True)]
    left, right = (
        torch.eye(d, dtype=torch.float64) if basis is None else basis for d, basis in zip(shape, bases, strict=True)
    )
    torch.testing.assert_close(project(stack, bases), left.mT @ stack @ right)
    back = project_back(stack, bases)
    torch.testing.assert_close(back, left @ stack @ right.mT)
    assert back.is_contiguous()
    alone = [project_back(stack[i : i + 1], [None if b is None else b[i : i + 1] for b in bases]) for i in range(4)]
    assert torch.equal(torch.cat(alone), back)


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
    bases = [None if f is None else eigh_bases(stack_of_factors(count, f.shape[-1], seed=9))[0] for f in factors]
    for basis, factor in zip(bases, factors, strict=True):
        if basis is not None:
            basis[2:] = eigh_bases(factor)[0][2:]

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
    exact, _ = eigh_bases(factors)
    assert basis_holds(factors, rayleigh_quotients(factors, exact), 1e-12).tolist() == [True, True]
    assert basis_holds(factors, rayleigh_quotients(factors, exact.flip(0)), 1e-3).tolist() == [False, False]


@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1.0, 1e20])
def test_the_criterion_does_not_depend_on_the_scale_of_a_float32_factor(scale: float) -> None:
    factors = (scale * stack_of_factors(1, 6)).float()
    exact, other = eigh_bases(factors)[0], eigh_bases(stack_of_factors(1, 6, seed=5))[0].float()
    assert basis_holds(factors, rayleigh_quotients(factors, exact), 1e-5).tolist() == [True]
    assert basis_holds(factors, rayleigh_quotients(factors, other), 1e-5).tolist() == [False]


def test_a_stack_that_holds_is_returned_as_it_is() -> None:
    factors = stack_of_factors(2, 6)
    exact, _ = eigh_bases(factors)
    result = refresh_bases(factors, exact, adaptive_tolerance=1e-9)
    assert result.bases is exact
    assert result.order is None
    assert not result.refreshed.any()
    assert not result.failed.any()
