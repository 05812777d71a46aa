"""The inner Adam update: its forms agree, and an element's result does not depend on its neighbours."""

import pytest
import torch
from torch import Tensor

from emerging_optimizers.adam import REGISTER, adam_direction

OPTIONS = {"betas": (0.9, 0.95), "eps": 1e-8, "use_nesterov": False}


def tensors(size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    grad, exp_avg = torch.randn(2, size, generator=generator, dtype=dtype)
    return grad, exp_avg, torch.rand(size, generator=generator, dtype=dtype)


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("step", [1, 7, 10**9])
@pytest.mark.parametrize("size", [0, 1, REGISTER - 1, REGISTER, 3 * REGISTER + 5, 100_003])
def test_the_fused_form_equals_the_one_with_masks_and_the_one_for_any_strides(
    size: int, step: int, correct_bias: bool
) -> None:
    options = {**OPTIONS, "step": step, "correct_bias": correct_bias}
    fused, masked, strided = tensors(size), tensors(size), tuple(t.unsqueeze(1) for t in tensors(size))
    strided = tuple(torch.cat([t, t], dim=1)[:, :1] for t in strided)
    direction = adam_direction(*fused, **options)
    for others, mask in ((masked, torch.ones(size, dtype=torch.bool)), (strided, None)):
        other = adam_direction(*others, **options, finite=mask)
        torch.testing.assert_close(other.reshape(-1), direction, rtol=1e-14, atol=1e-14)
        for one, twin in zip(fused[1:], others[1:], strict=True):
            torch.testing.assert_close(twin.reshape(-1), one, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_element_gives_bit_for_bit_the_same_wherever_it_is(dtype: torch.dtype) -> None:
    size = 5 * REGISTER + 7
    whole = tensors(size, dtype)
    for start, stop in [(0, 1), (3, 12), (1, REGISTER + 1), (REGISTER + 5, size), (0, size - 1)]:
        part = tuple(t[start:stop].clone() for t in tensors(size, dtype))
        alone = adam_direction(*part, step=3, correct_bias=True, **OPTIONS)
        among = tensors(size, dtype)
        direction = adam_direction(*among, step=3, correct_bias=True, **OPTIONS)
        assert torch.equal(alone, direction[start:stop])
        assert torch.equal(part[1], among[1][start:stop])
        assert torch.equal(part[2], among[2][start:stop])
    assert torch.equal(whole[0], tensors(size, dtype)[0])


def test_the_gradient_is_only_read() -> None:
    grad, exp_avg, exp_avg_sq = tensors(REGISTER + 3)
    before = grad.clone()
    adam_direction(grad, exp_avg, exp_avg_sq, step=1, correct_bias=True, **OPTIONS)
    assert torch.equal(grad, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [REGISTER - 1, 3 * REGISTER, 3 * REGISTER + 5])
def test_the_direction_may_take_the_place_of_the_gradient_and_is_bit_for_bit_the_same(
    size: int, dtype: torch.dtype
) -> None:
    kept, given = tensors(size, dtype), tensors(size, dtype)
    for of_both in (kept, given):
        of_both[0][:2] = torch.tensor([0.0, torch.finfo(dtype).max ** 0.4], dtype=dtype)
    direction = adam_direction(*kept, step=3, correct_bias=True, **OPTIONS)
    in_place = adam_direction(*given, step=3, correct_bias=True, overwrite=True, **OPTIONS)
    assert in_place.data_ptr() == given[0].data_ptr()
    assert torch.equal(in_place, direction)
    assert torch.equal(given[1], kept[1])
    assert torch.equal(given[2], kept[2])
