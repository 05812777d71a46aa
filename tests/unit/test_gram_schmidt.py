"""Gram-Schmidt gives what Householder's QR gives, wherever it is used, and is not used where it would not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from emerging_optimizers.soap import decompositions, gram_schmidt
from emerging_optimizers.soap.decompositions import orthonormal_columns
from emerging_optimizers.soap.eigenbasis import refresh_bases
from emerging_optimizers.soap.functional import update_eigenbasis_and_momentum
from emerging_optimizers.soap.soap_utils import get_eigenbasis_qr

PANEL = 4


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompositions, "GRAM_SCHMIDT_FROM", 1)
    monkeypatch.setattr(gram_schmidt, "PANELS", {1: PANEL})


@pytest.fixture
def by_householder(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices went to Householder's QR, call by call."""
    counts: list[int] = []
    real = decompositions._householder

    def watch(stack: Tensor) -> Tensor:
        counts.append(len(stack))
        return real(stack)

    monkeypatch.setattr(decompositions, "_householder", watch)
    return counts


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def hardly_turned(size: int, count: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Bases and products whose columns are about 17 degrees away from theirs, of lengths from 1 to 1e-3."""
    bases = torch.linalg.qr(normal(count, size, size, seed=size)).Q
    turned = bases + 0.3 / size**0.5 * normal(count, size, size, seed=1)
    return bases.to(dtype), (turned * torch.logspace(0, -3, size, dtype=torch.float64)).to(dtype)


def quotients(bases: Tensor, products: Tensor) -> Tensor:
    return (bases * products).sum(-2)


def assert_orthonormal_factor(q: Tensor, products: Tensor, tolerance: float) -> None:
    """``Q^T Q = I``, and ``Q^T A`` is upper triangular relative to the lengths of the columns."""
    q, products = q.double(), products.double()
    identity = torch.eye(q.shape[-1], dtype=torch.float64).expand_as(q)
    torch.testing.assert_close(q.mT @ q, identity, rtol=0, atol=tolerance)
    unit = products / torch.linalg.vector_norm(products, dim=-2, keepdim=True)
    torch.testing.assert_close((q.mT @ unit).tril(-1), torch.zeros_like(q), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 3e-6)], ids=str)
@pytest.mark.parametrize("size", [1, 3, PANEL, PANEL + 1, 3 * PANEL, 5 * PANEL + 2, 70])
def test_it_is_the_orthonormal_factor_whose_columns_point_as_before(
    size: int, dtype: torch.dtype, tolerance: float, by_householder: list[int]
) -> None:
    bases, products = hardly_turned(size, dtype=dtype)
    before = products.clone()
    q, failed = orthonormal_columns(products, bases, None, quotients(bases, products))
    assert torch.equal(products, before)
    assert not failed.any()
    assert by_householder == []
    assert q.dtype == dtype
    assert_orthonormal_factor(q, products, tolerance)
    assert ((q * bases).sum(-2) > 0.5).all()
    expected, _ = orthonormal_columns(products, bases)
    assert by_householder == [3]
    torch.testing.assert_close(q.abs(), expected.abs(), rtol=0, atol=tolerance)


def test_an_order_is_that_of_the_columns(by_householder: list[int]) -> None:
    bases, products = hardly_turned(9)
    order = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    ordered = [matrices.gather(-1, order.unsqueeze(-2).expand_as(matrices)) for matrices in (products, bases)]
    q, _ = orthonormal_columns(products, bases, order, quotients(bases, products))
    expected, _ = orthonormal_columns(*ordered, None, quotients(*ordered[::-1]))
    assert by_householder == []
    torch.testing.assert_close(q, expected, rtol=0, atol=1e-14)


DIFFICULT: dict[str, Callable[[Tensor], None]] = {
    "a column almost in the span of an earlier panel": lambda a: a[..., 13].copy_(a[..., 2] + 1e-9 * a[..., 13]),
    "of its own panel": lambda a: a[..., 14].copy_(a[..., 13] + 1e-9 * a[..., 14]),
    "in it but for rounding": lambda a: a[..., 13].copy_(a[..., 2]),
    "two of them": lambda a: a[..., 13:15].copy_(a[..., 2:4]),
    "two equal ones": lambda a: a[..., 13:15].copy_(a[..., 2:3]),
    "in the first panel": lambda a: a[..., 2].copy_(a[..., 1]),
    "columns of rounding": lambda a: a[..., 12:].copy_(1e-17 * normal(3, 24, 12, seed=5)),
}


@pytest.mark.parametrize("which", [slice(None), slice(1, 2), slice(0, 3, 2)], ids=["all", "one", "two"])
@pytest.mark.parametrize("kind", DIFFICULT)
def test_columns_of_which_one_pass_leaves_little_have_another(
    kind: str, which: slice, monkeypatch: pytest.MonkeyPatch, by_householder: list[int]
) -> None:
    bases, products = hardly_turned(24)
    spoiled = products / torch.linalg.vector_norm(products, dim=-2, keepdim=True)
    DIFFICULT[kind](spoiled)
    products[which] = spoiled[which]
    monkeypatch.setattr(gram_schmidt, "TURNED", 1.0)
    q, failed = orthonormal_columns(products, bases, None, quotients(bases, products))
    assert not failed.any()
    assert by_householder == []
    assert_orthonormal_factor(q, products, 5e-14)


@pytest.mark.parametrize("kind", ["turned", "zero column", "NaN", "Inf", "squares overflow", "rounding throughout"])
def test_others_are_left_to_householder(kind: str, by_householder: list[int]) -> None:
    bases, products = hardly_turned(12)
    if kind == "turned":
        products[1] = normal(12, 12, seed=3)
    elif kind == "rounding throughout":
        products[1, :, 1:] *= 1e-20
    else:
        products[1, :, 5] = {"zero column": 0.0, "NaN": torch.nan, "Inf": torch.inf, "squares overflow": 1e200}[kind]
    norms = products.square().sum(-2).sqrt()
    assert gram_schmidt.hardly_turned(quotients(bases, products), norms).tolist() == [True, False, True]
    q, failed = orthonormal_columns(products, bases, None, quotients(bases, products))
    usable = kind not in ("NaN", "Inf")
    assert failed.tolist() == [False, not usable, False]
    assert by_householder == ([1] if usable else [1, 1, 1, 1])  # with the retries
    torch.testing.assert_close(q.mT @ q, torch.eye(12, dtype=torch.float64).expand_as(q), rtol=0, atol=1e-14)
    assert torch.equal(q[1], orthonormal_columns(products, bases)[0][1])
    assert_orthonormal_factor(q[::2], products[::2], 1e-14)


def test_a_matrix_gets_the_same_bits_alone_and_among_others() -> None:
    bases, products = hardly_turned(24, count=6)
    products[1] = normal(24, 24, seed=3)
    products[2, :, 13] = products[2, :, 2] + 1e-9 * products[2, :, 13]
    products[4, :, 3] = 0
    products[5, :, 13] = products[5, :, 2]
    among, _ = orthonormal_columns(products, bases, None, quotients(bases, products))
    for index in range(6):
        one = slice(index, index + 1)
        alone, _ = orthonormal_columns(products[one], bases[one], None, quotients(bases[one], products[one]))
        assert torch.equal(alone, among[one])


def test_what_is_not_orthonormal_in_the_end_goes_to_householder(
    monkeypatch: pytest.MonkeyPatch, by_householder: list[int]
) -> None:
    bases, products = hardly_turned(24)
    products[1, :, 13] = products[1, :, 2] + 1e-9 * products[1, :, 13]
    monkeypatch.setattr(gram_schmidt, "GROWTH", 1e30)  # nothing has another pass
    q, _ = orthonormal_columns(products, bases, None, quotients(bases, products))
    assert by_householder == [1]
    assert_orthonormal_factor(q, products, 1e-14)


def test_the_departure_from_orthonormality_is_about_its_frobenius_norm() -> None:
    stack = torch.linalg.qr(normal(20, 50, 50)).Q + 1e-3 * normal(20, 50, 50, seed=1)
    found = gram_schmidt._departure(stack)
    true = torch.linalg.matrix_norm(stack.mT @ stack - torch.eye(50, dtype=torch.float64))
    assert ((found / true - 1).abs() < 0.3).all()


def test_the_global_random_state_is_left_alone() -> None:
    bases, products = hardly_turned(9)
    before = torch.get_rng_state()
    orthonormal_columns(products, bases, None, quotients(bases, products))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("power_iter_steps", [1, 3])
def test_a_refresh_uses_it(power_iter_steps: int, monkeypatch: pytest.MonkeyPatch, by_householder: list[int]) -> None:
    spectrum = torch.logspace(0, -2, 20, dtype=torch.float64)
    vectors = torch.linalg.qr(normal(2, 20, 20)).Q
    factors = (vectors * spectrum) @ vectors.mT
    bases = torch.linalg.qr(vectors + 0.01 * normal(2, 20, 20, seed=1)).Q
    ours = refresh_bases(factors, bases, power_iter_steps=power_iter_steps)
    assert by_householder == []
    monkeypatch.setattr(decompositions, "GRAM_SCHMIDT_FROM", 1000)
    theirs = refresh_bases(factors, bases, power_iter_steps=power_iter_steps)
    assert by_householder == [2] * power_iter_steps
    assert torch.equal(ours.order, theirs.order)
    torch.testing.assert_close(ours.bases.abs(), theirs.bases.abs(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("routine", ["cholesky_ex", "solve_triangular"])
@pytest.mark.parametrize("failure", [RuntimeError("planted"), torch.OutOfMemoryError("planted"), torch.nan, torch.inf])
def test_a_failing_routine_leaves_the_work_to_householder(
    routine: str, failure: Exception | float, monkeypatch: pytest.MonkeyPatch, by_householder: list[int]
) -> None:
    real, calls = getattr(torch.linalg, routine), []

    def fail(*arguments: Tensor, **options: bool) -> object:
        calls.append(routine)
        if isinstance(failure, Exception):
            raise failure
        result = real(*arguments, **options)
        (result[0] if isinstance(result, tuple) else result).fill_(failure)
        return result

    bases, products = hardly_turned(12)
    monkeypatch.setattr(torch.linalg, routine, fail)
    q, failed = orthonormal_columns(products, bases, None, quotients(bases, products))
    assert calls
    assert not failed.any()
    assert by_householder == [3]
    assert_orthonormal_factor(q, products, 1e-14)


def test_no_memory_for_trying_it_leaves_the_work_to_householder(
    monkeypatch: pytest.MonkeyPatch, by_householder: list[int]
) -> None:
    def no_memory(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("planted")

    bases, products = hardly_turned(12)
    monkeypatch.setattr(decompositions, "column_products", no_memory)
    q, failed = orthonormal_columns(products, bases, None, quotients(bases, products))
    assert not failed.any()
    assert by_householder == [3]
    assert_orthonormal_factor(q, products, 1e-14)


@pytest.mark.parametrize("size", [9, 16, 70])
def test_bases_that_are_handed_out_have_memory_of_their_own_size(size: int, by_householder: list[int]) -> None:
    exact = torch.linalg.qr(normal(size, size, seed=size)).Q
    factor = (exact * torch.linspace(2, 1, size, dtype=torch.float64)) @ exact.mT
    basis = torch.linalg.qr(exact + 0.01 * normal(size, size)).Q.contiguous()
    moments = normal(size), normal(size, seed=1).square()
    (alone,), _ = get_eigenbasis_qr([factor], [basis], moments[1])
    (with_moments,), *_ = update_eigenbasis_and_momentum([factor], [basis], *moments[::-1], convert_to_float=False)
    assert by_householder == []
    for new in (alone, with_moments):
        assert new.is_contiguous()
        assert new.untyped_storage().nbytes() == new.nbytes
