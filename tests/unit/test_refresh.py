"""The first moment is carried from basis to basis by as few products as can be, which change nothing but rounding."""

import pytest
import torch
from torch import Tensor

from emerging_optimizers.soap import refresh
from emerging_optimizers.soap.costs import carried_by_rotation, carry_flops
from emerging_optimizers.soap.kronecker import project, project_back


def orthogonal(count: int, size: int, seed: int) -> Tensor:
    random = torch.randn(count, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(random).Q


@pytest.mark.parametrize("axes", ["all", "first", "last"])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4), (3, 4), (5, 3, 2), (2, 9, 2), (6,)])
def test_a_stack_is_carried_as_out_of_the_old_bases_and_into_the_new_ones(shape: tuple[int, ...], axes: str) -> None:
    stack = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = {"all": range(len(shape)), "first": [0], "last": [len(shape) - 1]}[axes]
    old = [orthogonal(2, size, axis) if axis in chosen else None for axis, size in enumerate(shape)]
    new = [orthogonal(2, size, 10 + axis) if axis in chosen else None for axis, size in enumerate(shape)]
    expected = project(project_back(stack, old), new)
    torch.testing.assert_close(refresh._carry(stack, old, new), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(refresh._carry(stack, None, new), project(stack, new), rtol=0, atol=0)


def test_the_products_are_those_that_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def count(left: Tensor, right: Tensor) -> Tensor:
        done.append(2 * left.shape[1] * left.shape[2] * right.shape[2])
        return torch.bmm(left, right)

    monkeypatch.setattr("emerging_optimizers.soap.kronecker.matrix_product", count)
    monkeypatch.setattr(refresh, "matrix_product", count)
    for shape in [(3, 7), (7, 3), (4, 4), (5, 3, 2), (2, 9, 2)]:
        old = [orthogonal(1, size, axis) for axis, size in enumerate(shape)]
        new = [orthogonal(1, size, 10 + axis) for axis, size in enumerate(shape)]
        stack = torch.randn(1, *shape, dtype=torch.float64)
        done.clear()
        refresh._carry(stack, old, new)
        assert sum(done) == sum(carry_flops(size, stack.numel()) for size in shape)
    assert carried_by_rotation(3, 21)
    assert not carried_by_rotation(7, 21)
