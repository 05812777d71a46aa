"""What must not change a trajectory: rotation, transposition, order, grouping, scale of the loss, storage precision.

Each test runs SOAP twice, on a problem and on its image, and compares. In a null space of a factor the basis is
arbitrary and so is the trajectory; the problems here have none: either every axis is no longer than the product of
the others and the gradients are generic, or an Adam warm-up (which breaks the rotation, and nothing else) bridges
the first steps.
"""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from emerging_optimizers.soap import SOAP

STEPS = 8
#: What a rounding comes to: an eigenvector turns by it over its gap, 1e-4 say, and Adam divides by eps, in each step.
ROUNDING = STEPS * torch.finfo(torch.float64).eps / 1e-4 / 1e-5
LR = 0.02
PROFILE = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors]
)

seeds = st.integers(0, 10_000)
full_rank_shapes = st.sampled_from([(2, 2), (3, 3), (5, 5), (2, 3, 4), (3, 3, 2), (2, 2, 3, 2)])
options_for_every_path = st.fixed_dictionaries(
    {
        "use_eigh": st.booleans(),
        "use_kl_shampoo": st.booleans(),
        "use_nesterov": st.booleans(),
        "weight_decay_method": st.sampled_from(["decoupled", "independent", "l2"]),
        "second_moment_refresh": st.sampled_from(["rank", "kronecker"]),
        "precondition_frequency": st.sampled_from([1, 2]),
        "max_update_rms": st.sampled_from([0.0, 0.5]),
        "power_iter_steps": st.sampled_from([1, 2]),
    }
)

Gradient = Callable[[Tensor], Tensor]


class Valley:
    """``f(W) = sum_j log cosh(<C_j, W> - y_j) + |W|^2 / 20``: smooth, generic, its gradients of order one."""

    def __init__(self, shape: Sequence[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        terms = 2 * math.prod(shape) + 3
        self.directions = torch.randn((terms, *shape), generator=generator, dtype=torch.float64)
        self.offsets = 2 * torch.randn(terms, generator=generator, dtype=torch.float64)
        self.start = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.rotations = [torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q for d in shape]

    def gradient(self, w: Tensor) -> Tensor:
        inner = (self.directions * w).reshape(len(self.offsets), -1).sum(1) - self.offsets
        return torch.tensordot(torch.tanh(inner), self.directions, dims=1) + w / 10


def train(
    starts: Sequence[Tensor],
    gradients: Sequence[Gradient],
    options: dict,
    groups: Sequence[Sequence[int]] | None = None,
    steps: int = STEPS,
) -> list[Tensor]:
    """The final weights, in the order of ``starts``; ``groups`` lists which of them make a parameter group."""
    params = [torch.nn.Parameter(w.clone()) for w in starts]
    groups = [range(len(params))] if groups is None else groups
    defaults = {"lr": LR, "fp32_matmul_prec": "highest", "qr_fp32_matmul_prec": "highest"}
    soap = SOAP([{"params": [params[i] for i in group]} for group in groups], **(defaults | options))
    for _ in range(steps):
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient(p.detach())
        soap.step()
    return [p.detach() for p in params]


def rotate(w: Tensor, rotations: Sequence[Tensor]) -> Tensor:
    """``R_k`` applied to each axis of ``w``: ``U W V^T`` for a matrix."""
    for rotation in rotations:  # each turn takes the first axis and puts it last
        w = torch.tensordot(w, rotation, dims=([0], [1]))
    return w


def assert_same(actual: Tensor, expected: Tensor, start: Tensor) -> None:
    """Equal, measured by how far the weights have moved."""
    moved = (expected - start).abs().max()
    assert moved > 0.1 * LR, "nothing moved, so nothing was tested"
    gap = (actual - expected).abs().max() / moved
    assert gap <= ROUNDING, f"relative gap {gap:.1e}"


@PROFILE
@given(
    seed=seeds,
    shape=full_rank_shapes,
    use_kl_shampoo=st.booleans(),
    use_nesterov=st.booleans(),
    weight_decay_method=st.sampled_from(["decoupled", "independent", "l2"]),
    second_moment_refresh=st.sampled_from(["rank", "kronecker"]),
)
def test_rotating_the_parameter_space_rotates_the_trajectory(
    seed: int, shape: tuple[int, ...], **options: object
) -> None:
    valley = Valley(shape, seed)
    back = [r.T for r in valley.rotations]
    options |= {"use_eigh": True, "precondition_frequency": 1, "eps": 1e-4}
    (plain,) = train([valley.start], [valley.gradient], options)
    (rotated,) = train(
        [rotate(valley.start, valley.rotations)],
        [lambda w: rotate(valley.gradient(rotate(w, back)), valley.rotations)],
        options,
    )
    assert_same(rotate(rotated, back), plain, valley.start)


@PROFILE
@given(seed=seeds, shape=st.one_of(full_rank_shapes, st.sampled_from([(5, 2), (2, 6)])), options=options_for_every_path)
def test_transposing_the_parameter_transposes_the_trajectory(seed: int, shape: tuple[int, ...], options: dict) -> None:
    valley = Valley(shape, seed)
    options |= {"adam_warmup_steps": 3, "eps": 1e-5}
    backwards = tuple(reversed(range(len(shape))))
    (plain,) = train([valley.start], [valley.gradient], options)
    (transposed,) = train(
        [valley.start.permute(backwards).contiguous()],
        [lambda w: valley.gradient(w.permute(backwards)).permute(backwards).contiguous()],
        options,
    )
    assert_same(transposed.permute(backwards), plain, valley.start)


@PROFILE
@given(seed=seeds, factor=st.sampled_from([1e-3, 0.1, 7.0, 1e4]), options=options_for_every_path)
def test_scaling_the_loss_leaves_the_trajectory_where_eps_vanishes(seed: int, factor: float, options: dict) -> None:
    valley = Valley((4, 3), seed)
    if options["weight_decay_method"] == "l2":
        options |= {"weight_decay": 0.0}  # l2 adds a term that does not scale with the loss
    # Plain factors scale with the square of the loss. KL factors settle at its first power but start, with S = I / d,
    # at the second, so that the mixture of both has no scale: KL-SOAP, as defined, is not invariant.
    options |= {"use_kl_shampoo": False}
    options |= {"adam_warmup_steps": 3, "eps": 1e-30}
    (plain,) = train([valley.start], [valley.gradient], options)
    (scaled,) = train([valley.start], [lambda w: factor * valley.gradient(w)], options)
    assert_same(scaled, plain, valley.start)


MIXED_SHAPES = [(4, 4), (5, 2), (4, 4), (3,), (), (2, 3, 2), (5, 2), (4, 4)]


@PROFILE
@given(seed=seeds, order=st.permutations(range(len(MIXED_SHAPES))), options=options_for_every_path)
def test_the_order_of_the_parameters_does_not_matter(seed: int, order: list[int], options: dict) -> None:
    valleys = [Valley(shape, seed + i) for i, shape in enumerate(MIXED_SHAPES)]
    options |= {"adam_warmup_steps": 3, "precondition_1d": True, "max_precond_dim": 4, "eps": 1e-5}
    plain = train([v.start for v in valleys], [v.gradient for v in valleys], options)
    shuffled = train([valleys[i].start for i in order], [valleys[i].gradient for i in order], options)
    for place, i in enumerate(order):
        assert_same(shuffled[place], plain[i], valleys[i].start)


@PROFILE
@given(seed=seeds, owner=st.lists(st.integers(0, 2), min_size=8, max_size=8), options=options_for_every_path)
def test_splitting_the_parameters_into_groups_does_not_matter(seed: int, owner: list[int], options: dict) -> None:
    valleys = [Valley(shape, seed + i) for i, shape in enumerate(MIXED_SHAPES)]
    starts, gradients = [v.start for v in valleys], [v.gradient for v in valleys]
    options |= {"adam_warmup_steps": 3, "eps": 1e-5}
    groups = [[i for i, o in enumerate(owner) if o == group] for group in sorted(set(owner))]
    together = train(starts, gradients, options)
    apart = train(starts, gradients, options, groups)
    for actual, expected, valley in zip(apart, together, valleys, strict=True):
        assert_same(actual, expected, valley.start)


@PROFILE
@given(
    seed=seeds,
    count=st.integers(2, 5),
    shape=st.sampled_from([(4, 4), (5, 2), (3, 2, 2)]),
    options=options_for_every_path,
)
def test_several_tensors_of_one_shape_equal_as_many_optimizers(
    seed: int, count: int, shape: tuple[int, ...], options: dict
) -> None:
    # scales far apart, so that a statistic, a clip or a norm taken over the stack instead of the tensor shows
    valleys = [Valley(shape, seed + i) for i in range(count)]
    scales = [10.0 ** (i - 1) for i in range(count)]
    gradients = [lambda w, v=v, s=s: s * v.gradient(w) for v, s in zip(valleys, scales, strict=True)]
    options |= {"adam_warmup_steps": 3, "eps": 1e-5, "use_adaptive_criteria": True, "adaptive_update_tolerance": 0.01}
    stacked = train([v.start for v in valleys], gradients, options)
    for i, valley in enumerate(valleys):
        (single,) = train([valley.start], [gradients[i]], options)
        assert_same(stacked[i], single, valley.start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@PROFILE
@given(seed=seeds, shape=st.sampled_from([(4, 4), (5, 2), (3, 2, 2), (3,), ()]), options=options_for_every_path)
def test_low_precision_weights_take_the_float32_step_and_are_rounded_once(
    dtype: torch.dtype, seed: int, shape: tuple[int, ...], options: dict
) -> None:
    valley = Valley(shape, seed)
    options |= {"lr": 0.05, "weight_decay": 0.1, "fp32_matmul_prec": "highest", "qr_fp32_matmul_prec": "highest"}
    low = torch.nn.Parameter(valley.start.to(dtype))
    full = torch.nn.Parameter(low.detach().to(torch.float32))
    soap_low, soap_full = SOAP([low], **options), SOAP([full], **options)
    for _ in range(STEPS):
        low.grad = valley.gradient(low.detach().to(torch.float64)).to(dtype)
        full.grad = low.grad.to(torch.float32)
        full.data.copy_(low.detach())
        soap_low.step()
        soap_full.step()
        assert torch.equal(low.detach(), full.detach().to(dtype))
    kept = [value for key, value in soap_low.state[low].items() if value.is_floating_point() and "step" not in key]
    assert all(value.dtype == torch.float32 for value in kept)
