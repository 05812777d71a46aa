"""Packing of symmetric matrices: every entry of the lower triangle kept once, and nothing else looked at."""

import pytest
import torch

from emerging_optimizers.soap.state import pack, packed_size, unpack


def lower_triangles(count: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that differ everywhere, with NaN above the diagonal, which nothing may read."""
    matrices = torch.arange(1, count * size * size + 1, dtype=dtype).view(count, size, size)
    above = torch.ones(size, size, dtype=torch.bool).triu(1)
    return matrices.masked_fill(above, torch.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 17])
def test_the_lower_triangle_goes_there_and_back_exactly(size: int, count: int, dtype: torch.dtype) -> None:
    matrices = lower_triangles(count, size, dtype)
    packed = pack(matrices)
    assert packed.shape == (count, packed_size(size)) == (count, size * (size + 1) // 2)
    for one, entries in zip(matrices, packed, strict=True):  # each entry of the triangle once
        assert torch.equal(entries.sort().values, one[one.isfinite()].sort().values)
    unpacked = unpack(packed, size)
    assert torch.equal(unpacked.tril(), matrices.nan_to_num(0.0))
    assert torch.equal(unpacked, unpacked.mT)
    assert torch.equal(pack(unpacked), packed)


def test_the_pictures_in_the_modules_docstring() -> None:
    pictures = {"a...bc..def.gjhi": "fhaibcdegj", "a....bc...dej..klmg.nophi": "aghbcidejklmnop"}
    for matrix, rectangle in pictures.items():
        size = round(len(matrix) ** 0.5)
        packed = pack(torch.tensor([ord(letter) for letter in matrix]).view(1, size, size))
        assert "".join(map(chr, packed[0].tolist())) == rectangle


def test_packing_into_a_part_of_a_stack_touches_nothing_else() -> None:
    stack = torch.full((4, packed_size(5)), -1.0)
    matrices = lower_triangles(2, 5, torch.float64)
    assert pack(matrices, out=stack[1:3]).data_ptr() == stack[1].data_ptr()
    assert (stack[[0, 3]] == -1).all()
    assert torch.equal(stack[1:3], pack(matrices).float())


def test_signs_of_zero_and_infinities_survive() -> None:
    values = torch.full((1, 5, 5), -0.0).tril()
    values[0, 1, 0], values[0, 3, 1], values[0, 4, 3] = torch.inf, torch.nan, -torch.inf
    unpacked = unpack(pack(values), 5)
    torch.testing.assert_close(unpacked, values + values.mT, rtol=0, atol=0, equal_nan=True)
    finite = unpacked.isfinite()
    assert unpacked[finite].signbit().all()
