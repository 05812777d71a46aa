"""QR by panels is LAPACK's QR: the same reflections, in wider groups."""

import pytest
import torch
from torch import Tensor

from emerging_optimizers.soap import decompositions
from emerging_optimizers.soap.decompositions import orthonormal_columns

PANEL = 4
KINDS = ("random", "singular", "zero", "identity", "graded", "tiny", "huge", "nearly diagonal")


def matrices(kind: str, size: int) -> Tensor:
    random = torch.randn(3, size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    columns = torch.arange(size)
    return {
        "random": random,
        "singular": torch.where((columns % 3 > 0) & (columns < size // 2), random, 0.0),
        "zero": 0 * random,
        "identity": torch.eye(size, dtype=torch.float64).repeat(3, 1, 1),
        "graded": random * torch.logspace(0, -30, size, dtype=torch.float64),
        "tiny": 1e-300 * random,
        "huge": 1e300 * random,
        "nearly diagonal": torch.diag_embed(torch.logspace(3, -3, size, dtype=torch.float64)) + 1e-9 * random,
    }[kind]


@pytest.fixture(params=[1000, 2 * PANEL], ids=["panels", "panels in tall panels"])
def panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompositions, "PANELS", {1: PANEL})
    monkeypatch.setattr(decompositions, "TALL", request.param)
    monkeypatch.setattr(decompositions, "NARROW", PANEL - 1)


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, PANEL, PANEL + 1, 3 * PANEL, 3 * PANEL + 2])
def test_the_columns_are_orthonormal_and_span_what_they_should(size: int, kind: str) -> None:
    stack = matrices(kind, size)
    before = stack.clone()
    q, failed = orthonormal_columns(stack, torch.zeros_like(stack))
    assert torch.equal(stack, before)
    assert not failed.any()
    torch.testing.assert_close(q.mT @ q, torch.eye(size, dtype=torch.float64).expand_as(q), rtol=0, atol=1e-13)
    scale = stack.abs().amax().clamp_min(1e-300)
    torch.testing.assert_close((q.mT @ (stack / scale)).tril(-1), torch.zeros_like(q), rtol=0, atol=1e-13)


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "singular"])  # where rounding chooses
def test_it_is_the_same_matrix_as_without_panels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = matrices(kind, 3 * PANEL + 2)
    by_panels, _ = orthonormal_columns(stack, stack)
    monkeypatch.setattr(decompositions, "PANELS", {100: PANEL})
    torch.testing.assert_close(by_panels, orthonormal_columns(stack, stack)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("panels_from", [1, 100])
def test_an_order_is_that_of_the_columns(panels_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompositions, "PANELS", {panels_from: PANEL})
    stack = matrices("random", 6)
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    stack[2, 0, 0] = float("nan")
    expected = torch.stack([matrix[:, one] for matrix, one in zip(stack, order, strict=True)])
    result, failed = orthonormal_columns(stack, 2 * stack.nan_to_num(), order)
    assert failed.tolist() == [False, False, True]
    torch.testing.assert_close(result[:2], orthonormal_columns(expected[:2], expected[:2])[0], rtol=0, atol=1e-13)
    assert torch.equal(result[2], 2 * stack[2].nan_to_num()[:, order[2]])


def test_tall_panels_go_by_narrower_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompositions, "TALL", 400)
    shapes: list[tuple[int, ...]] = []
    real = torch.geqrf

    def watch(matrix: Tensor) -> object:
        shapes.append(tuple(matrix.shape[1:]))
        return real(matrix)

    monkeypatch.setattr(torch, "geqrf", watch)
    stack = torch.randn(2, 450, 450, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, _ = orthonormal_columns(stack, stack)
    torch.testing.assert_close(q.mT @ q, torch.eye(450, dtype=torch.float64).expand_as(q), rtol=0, atol=2e-14)
    assert shapes == [(450, 32), (418, 32), (386, 32), (354, 96), (258, 96), (162, 96), (66, 66)]


def test_large_matrices_go_by_panels_in_both_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    size, widths = min(decompositions.PANELS), []
    real = torch.geqrf

    def watch(matrix: Tensor) -> object:
        widths.append(matrix.shape[-1])
        return real(matrix)

    monkeypatch.setattr(torch, "geqrf", watch)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 2e-14)):
        stack = torch.randn(1, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)
        q, _ = orthonormal_columns(stack, stack)
        torch.testing.assert_close(q.mT @ q, torch.eye(size, dtype=dtype).expand_as(q), rtol=0, atol=tolerance)
    assert max(widths) == decompositions.PANELS[size]
    assert sum(widths) == 2 * size
    orthonormal_columns(torch.eye(size - 1).unsqueeze(0), torch.zeros(1, size - 1, size - 1))
    assert widths[-1] == size - 1
