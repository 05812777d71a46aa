"""The documented functions: formulas against einsum in float64, dtypes, and errors that name the argument."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from emerging_optimizers.soap.soap import init_kronecker_factors as init
from emerging_optimizers.soap.soap import precondition
from emerging_optimizers.soap.soap import update_eigenbasis_and_momentum as refresh
from emerging_optimizers.soap.soap import update_kronecker_factors as plain
from emerging_optimizers.soap.soap import update_kronecker_factors_kl_shampoo as kl
from emerging_optimizers.soap.soap_utils import get_eigenbasis_eigh as eigh
from emerging_optimizers.soap.soap_utils import get_eigenbasis_qr as qr


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def orthogonal(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def symmetric(d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    basis = orthogonal(d, seed)
    return (basis * torch.logspace(0, -2, d, dtype=torch.float64) @ basis.T).to(dtype)


# --- precondition -------------------------------------------------------------------------------------------------


def test_precondition_projects_a_matrix_in_and_back_out() -> None:
    grad, q1, q2 = normal(3, 4), orthogonal(3), orthogonal(4)
    inside = precondition(grad, [q1, q2])
    torch.testing.assert_close(inside, q1.T @ grad @ q2)
    torch.testing.assert_close(precondition(inside, [q1, q2], dims=[[0], [1]]), grad)


def test_precondition_contracts_every_axis_of_a_tensor() -> None:
    grad, bases = normal(2, 3, 4), [orthogonal(2), orthogonal(3), orthogonal(4)]
    torch.testing.assert_close(precondition(grad, bases), torch.einsum("abc,ai,bj,ck->ijk", grad, *bases))


def test_an_empty_basis_skips_its_axis() -> None:
    grad, q2 = normal(3, 4), orthogonal(4)
    torch.testing.assert_close(precondition(grad, [torch.empty(0), q2]), grad @ q2)
    assert torch.equal(precondition(grad, [torch.empty(0), torch.empty(0)]), grad)


def test_precondition_without_bases_returns_the_gradient() -> None:
    grad = normal(3, 4)
    assert precondition(grad) is grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precondition_computes_low_precision_gradients_in_float32(dtype: torch.dtype) -> None:
    grad, bases = normal(3, 4, dtype=dtype), [orthogonal(3).float(), orthogonal(4).float()]
    result = precondition(grad, bases)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, bases[0].T @ grad.float() @ bases[1])


# --- factors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "expected"), [((), []), ((3,), [(0,)]), ((2, 3), [(2, 2), (3, 3)])])
def test_init_kronecker_factors_are_zeros_one_square_per_axis(shape: tuple, expected: list) -> None:
    factors = init(normal(*shape))
    assert [tuple(f.shape) for f in factors] == expected
    assert all(f.dtype == torch.float64 and not f.any() for f in factors)


def test_a_vector_has_one_square_factor_when_asked() -> None:
    (factor,) = init(torch.zeros(3), precondition_1d=True)
    assert factor.shape == (3, 3)
    grad = normal(3, dtype=torch.float32)
    plain([factor], grad, 0.9)
    assert not factor.any(), "without precondition_1d nothing happens"
    plain([factor], grad, 0.9, precondition_1d=True)
    torch.testing.assert_close(factor, 0.1 * torch.outer(grad, grad))


def test_update_kronecker_factors_accumulates_each_matricisation_in_place() -> None:
    grad = normal(2, 3, 4)
    factors = [symmetric(2), symmetric(3), symmetric(4)]
    equations = ["abc,ibc->ai", "abc,aic->bi", "abc,abi->ci"]
    expected = [0.7 * f + 0.3 * torch.einsum(e, grad, grad) for f, e in zip(factors, equations, strict=True)]
    plain(factors, grad, 0.7)
    torch.testing.assert_close(factors, expected)


def test_half_precision_factors_are_written_back() -> None:
    factors = [torch.zeros(2, 2, dtype=torch.bfloat16), torch.empty(0)]
    plain(factors, torch.ones(2, 3), 0.0)
    assert torch.equal(factors[0], torch.full((2, 2), 3.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("eigval_exp", [-1.0, -0.5])
def test_kl_factors_are_whitened_by_the_other_axes(eigval_exp: float) -> None:
    grad, factors = normal(2, 3, 4), [symmetric(2), symmetric(3), symmetric(4)]
    bases, eps = [orthogonal(2, 1), orthogonal(3, 1), orthogonal(4, 1)], 0.05
    s = []
    for factor, q in zip(factors, bases, strict=True):
        lam = torch.diag(q.T @ factor @ q).clamp(min=eps)
        s.append(q @ torch.diag(lam**eigval_exp) @ q.T / len(q))
    expected = [
        0.6 * factors[0] + 0.4 * torch.einsum("abc,bj,ck,ijk->ai", grad, s[1], s[2], grad),
        0.6 * factors[1] + 0.4 * torch.einsum("abc,aj,ck,jik->bi", grad, s[0], s[2], grad),
        0.6 * factors[2] + 0.4 * torch.einsum("abc,aj,bk,jki->ci", grad, s[0], s[1], grad),
    ]
    kl(factors, grad, 0.6, bases, eps, eigval_exp)
    torch.testing.assert_close(factors, expected)


def test_kl_factors_of_a_vector_are_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"grad must have at least 2 axes.*\(3,\)"):
        kl([torch.eye(3)], torch.zeros(3), 0.9, [torch.eye(3)], 1e-8)


# --- eigenbases ---------------------------------------------------------------------------------------------------


def require_diagonal(basis: Tensor, factor: Tensor, eps: float) -> None:
    """An eigenbasis with the largest eigenvalue first, of a factor of norm 1, to its own rounding."""
    rotated = basis.double().T @ factor.double() @ basis.double()
    error = 2 * len(basis) * eps  # d products per entry, on either side of the factor
    assert (rotated - torch.diag(torch.diag(rotated))).abs().max() < error
    assert (torch.diag(rotated).diff() < error).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("convert_to_float", [True, False])
def test_eigh_basis_is_orthonormal_descending_and_of_the_asked_dtype(
    dtype: torch.dtype, convert_to_float: bool
) -> None:
    factor = symmetric(5, dtype=dtype)
    (basis,) = eigh([factor], convert_to_float)
    assert basis.dtype == (torch.float32 if convert_to_float else dtype)
    require_diagonal(basis, factor, torch.finfo(basis.dtype).eps)


def test_a_diagonal_factor_gives_exactly_a_permutation() -> None:
    (basis,) = eigh([torch.diag(torch.tensor([1e-3, 7.0, 0.0, 7.0, 3.0]))])
    assert torch.equal(basis, torch.eye(5)[:, [1, 3, 4, 0, 2]])
    assert torch.equal(eigh([torch.zeros(3, 3)])[0], torch.eye(3))


def test_the_eigh_of_a_small_factor_is_as_good_as_that_of_a_large_one() -> None:
    # An absolute shift of 1e-7 erases a factor of gradients of 1e-5: this is why the shift is relative.
    factor = symmetric(8)
    (basis,) = eigh([(1e-12 * factor).float()])
    require_diagonal(basis, factor, torch.finfo(torch.float32).eps)


def test_an_empty_factor_has_an_empty_basis() -> None:
    bases = eigh([torch.empty(0), symmetric(3)])
    assert bases[0].numel() == 0
    assert bases[1].shape == (3, 3)
    bases, exp_avg_sq = qr([torch.empty(0), symmetric(3)], bases, torch.ones(2, 3))
    assert bases[0].numel() == 0
    assert exp_avg_sq.shape == (2, 3)


def test_the_adaptive_criterion_returns_the_old_basis_where_it_holds() -> None:
    factor = symmetric(4)
    exact, other = eigh([factor], convert_to_float=False)[0].neg(), orthogonal(4, seed=3)
    arguments = {"convert_to_float": False, "use_adaptive_criteria": True, "adaptive_update_tolerance": 1e-7}
    bases = eigh([factor, factor], eigenbasis_list=[exact, other], **arguments)
    assert torch.equal(bases[0], exact)
    assert not torch.equal(bases[1], other)
    bases, exp_avg_sq = qr([factor, factor], [exact, other], normal(4, 4), **arguments)
    assert torch.equal(bases[0], exact)
    assert not torch.equal(bases[1], other)
    torch.testing.assert_close(exp_avg_sq.sum(1), normal(4, 4).sum(1))  # the first axis was left alone


@pytest.mark.parametrize("steps", [1, 3])
def test_qr_sorts_permutes_and_iterates(steps: int) -> None:
    factor, basis, exp_avg_sq = symmetric(4), orthogonal(4, seed=5), normal(4, 2).abs()
    order = torch.argsort(torch.diag(basis.T @ factor @ basis), descending=True)
    assert order.tolist() != [0, 1, 2, 3], "the case must permute"
    expected = basis[:, order]
    for _ in range(steps):
        expected = torch.linalg.qr(factor @ expected).Q
    (result, _), permuted = qr(
        [factor, torch.empty(0)], [basis, torch.empty(0)], exp_avg_sq, convert_to_float=False, power_iter_steps=steps
    )
    torch.testing.assert_close(result.abs(), expected.abs())
    assert torch.equal(permuted, exp_avg_sq[order])


# --- the whole refresh ----------------------------------------------------------------------------------------------


def test_a_refresh_keeps_the_first_moment_in_the_original_space() -> None:
    factors, bases = [symmetric(3), symmetric(4)], [orthogonal(3, 1), orthogonal(4, 1)]
    momentum = normal(3, 4)
    before = precondition(momentum, bases, dims=[[0], [1]])
    exp_avg_sq = normal(3, 4).abs()
    new_bases, new_momentum, new_exp_avg_sq = refresh(factors, bases, exp_avg_sq, momentum, convert_to_float=False)
    assert new_momentum is momentum
    assert new_exp_avg_sq is exp_avg_sq
    torch.testing.assert_close(precondition(momentum, new_bases, dims=[[0], [1]]), before)
    assert sorted(exp_avg_sq.flatten().tolist()) == sorted(normal(3, 4).abs().flatten().tolist())


def test_the_first_refresh_spreads_the_second_moment_by_the_eigenvalues() -> None:
    factors, exp_avg_sq = [symmetric(3), symmetric(4)], normal(3, 4).abs()
    total = exp_avg_sq.sum()
    _, _, result = refresh(factors, None, exp_avg_sq, normal(3, 4), convert_to_float=False)
    product = torch.outer(*(torch.linalg.eigvalsh(f).flip(0) for f in factors))
    torch.testing.assert_close(result, total * product / product.sum())


def test_an_axis_without_a_factor_keeps_its_own_marginal_at_the_first_refresh() -> None:
    exp_avg_sq = normal(3, 4).abs()
    before = exp_avg_sq.sum(0)
    refresh([symmetric(3), torch.empty(0)], None, exp_avg_sq, normal(3, 4))
    torch.testing.assert_close(exp_avg_sq.sum(0), before)


def test_with_eigh_the_second_moment_stays_by_rank() -> None:
    factors = [symmetric(3), symmetric(4)]
    bases = eigh([symmetric(3, 8), symmetric(4, 8)], convert_to_float=False)
    exp_avg_sq = normal(3, 4).abs()
    before = exp_avg_sq.clone()
    refresh(factors, bases, exp_avg_sq, normal(3, 4), use_eigh=True)
    assert torch.equal(exp_avg_sq, before)


def test_scalars_have_nothing_to_refresh() -> None:
    bases, momentum, exp_avg_sq = refresh([], None, torch.tensor(2.0), torch.tensor(3.0))
    assert (bases, momentum.item(), exp_avg_sq.item()) == ([], 3.0, 2.0)


def test_the_updates_build_no_graph() -> None:
    grad, momentum = normal(3, 4).requires_grad_(), normal(3, 4).requires_grad_()
    factors = init(grad)
    plain(factors, grad, 0.9)
    bases, _, _ = refresh(factors, None, normal(3, 4).square(), momentum)
    kl(factors, grad, 0.9, bases, 1e-8)
    assert not any(t.requires_grad for t in [*factors, *bases])
    assert precondition(grad, bases).requires_grad


# --- errors -------------------------------------------------------------------------------------------------------

G = torch.zeros(2, 3)
E2, E3 = torch.eye(2), torch.eye(3)
#: A function, its arguments, and the error.
WRONG: list[tuple[Callable, tuple, dict, type[Exception], str]] = [
    (precondition, (G, [E2, E3]), {"dims": [[1], [0]]}, ValueError, "dims must be"),
    (precondition, (G, [E2, E3]), {"dims": 5}, ValueError, "dims must be"),
    (precondition, (G, [E2]), {}, ValueError, "eigenbasis_list must have one entry per axis"),
    (precondition, (G, [E2, E2]), {}, ValueError, r"eigenbasis_list\[1\].*\(3, 3\).*\(2, 2\)"),
    (precondition, ([1.0], [E2]), {}, TypeError, "grad must be a Tensor, got list"),
    (precondition, (torch.zeros(2, dtype=torch.int64),), {}, TypeError, "grad must.*int64"),
    (init, (None,), {}, TypeError, "grad must be a Tensor, got NoneType"),
    (init, (G.to_sparse(),), {}, TypeError, "grad must be dense"),
    (plain, ([E2, torch.zeros(3, 2)], G, 0.9), {}, ValueError,
     r"kronecker_factor_list\[1\] must be a square matrix or empty, got shape \(3, 2\)"),
    (plain, (E2, G, 0.9), {}, TypeError, "kronecker_factor_list must be a list"),
    (plain, ([E2, E3], G, 1.5), {}, ValueError, "shampoo_beta.*between 0 and 1.*1.5"),
    (plain, ([E2, E3], G, "x"), {}, TypeError, "shampoo_beta must be a number"),
    (kl, ([E2, E3], G, 0.9, [E3, E3], 1e-8), {}, ValueError, r"eigenbasis_list\[0\] must have shape \(2, 2\)"),
    (kl, ([E2, E3], G, 0.9, [E2, E3], -1.0), {}, ValueError, "eps must be finite and greater than 0, got -1.0"),
    (eigh, ([E2],), {"eigenbasis_list": [E2], "use_adaptive_criteria": True}, ValueError,
     "adaptive_update_tolerance must be a number"),
    (eigh, ([E2],), {"use_adaptive_criteria": True, "adaptive_update_tolerance": 0.1}, ValueError,
     "eigenbasis_list must be given"),
    (eigh, ([E2],), {"eigenbasis_list": [E2, E2]}, ValueError,
     r"eigenbasis_list must be as long as kronecker_factor_list \(1\), got 2"),
    (qr, ([E2, E3], [E2, E2], G), {}, ValueError,
     r"eigenbasis_list\[1\] must have the shape of kronecker_factor_list\[1\], \(3, 3\), got \(2, 2\)"),
    (qr, ([E2], [E2], G), {}, ValueError, "one entry per axis of exp_avg_sq"),
    (qr, ([E2, E3], [E2, E3], G), {"power_iter_steps": 0}, ValueError, "power_iter_steps"),
    (qr, ([E2, E3], [E2, E3], G), {"power_iter_steps": 1.5}, TypeError, "power_iter_steps must be an integer, got f"),
    (refresh, ([E2, E3], None, G, torch.zeros(3, 2)), {}, ValueError,
     r"momentum must have the shape of exp_avg_sq, \(2, 3\), got \(3, 2\)"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "options", "error", "message"), WRONG)
def test_an_error_names_the_argument_what_it_got_and_what_it_wanted(
    function: Callable, arguments: tuple, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(*arguments, **options)


# --- autocast -----------------------------------------------------------------------------------------------------


def results(name: str) -> list[Tensor]:
    """What a function returns or changes, on fresh arguments in float32."""
    grad, factors = normal(40, 24, dtype=torch.float32), [symmetric(d, dtype=torch.float32) for d in (40, 24)]
    bases, exp_avg_sq = [orthogonal(d, seed=1).float() for d in (40, 24)], grad.square() + 1
    match name:
        case "precondition":
            return [precondition(grad, bases), precondition(grad, bases, dims=[[0], [1]])]
        case "factors":
            plain(factors, grad, 0.9)
            return factors
        case "KL factors":
            kl(factors, grad, 0.9, bases, 1e-8)
            return factors
        case "qr":
            found, moment = qr(factors, bases, exp_avg_sq, power_iter_steps=2)
            return [*found, moment]
        case "eigh":
            return eigh(factors)
    found, *moments = refresh(factors, bases, exp_avg_sq, grad.clone(), use_eigh=name.endswith("eigh"))
    return [*found, *moments]


@pytest.mark.parametrize(
    "name", ["precondition", "factors", "KL factors", "refresh by qr", "refresh by eigh", "qr", "eigh"]
)
def test_autocast_around_a_function_changes_nothing(name: str) -> None:
    expected = results(name)
    with torch.autocast("cpu", torch.bfloat16):
        seen = results(name)
        assert torch.is_autocast_enabled("cpu")
    for one, other in zip(seen, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
