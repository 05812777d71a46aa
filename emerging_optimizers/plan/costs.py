"""What one tensor costs under SOAP, AdamW and Muon: bytes of state, FLOPs of a step, FLOPs of a refresh.

SOAP's bytes are those of the state it makes (``soap.state``), its FLOPs those by which it shares out its work
(``soap.costs``). AdamW and Muon are torch's, whose state has the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch

from emerging_optimizers.soap.costs import refresh_flops, step_flops
from emerging_optimizers.soap.state import Layout, layout_for, meta_state

#: The options that decide what state a tensor has.
STATE_OPTIONS = ("max_precond_dim", "precondition_1d", "merge_dims", "pack_factors", "state_dtype")
#: What a process keeps of a matrix that another one owns: its counter ``step``.
COUNTER_BYTES = 8

#: Both moments 3 each, root, eps, division and bias corrections 4, weight decay 2, the weight 2.
ADAM_FLOPS_PER_ELEMENT = 14
#: Momentum and Nesterov 4, norm 3, weight decay 2, the weight 2.
MUON_FLOPS_PER_ELEMENT = 11
MUON_ITERATIONS = 5


@dataclass(frozen=True)
class Cost:
    """What an optimizer costs for one tensor, or for several.

    Attributes:
        state_bytes: Bytes of optimizer state.
        step_flops: FLOPs of a step without a refresh.
        refresh_flops: FLOPs that come on top where all eigenbases are refreshed; 0 but for SOAP.
    """

    state_bytes: int = 0
    step_flops: int = 0
    refresh_flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        """The cost of both."""
        return Cost(
            self.state_bytes + other.state_bytes,
            self.step_flops + other.step_flops,
            self.refresh_flops + other.refresh_flops,
        )

    def mean_flops(self, frequency: int) -> float:
        """FLOPs of a step, with a refresh every ``frequency`` steps spread over them."""
        return self.step_flops + self.refresh_flops / frequency


class Work(NamedTuple):
    """A part of what SOAP does for one axis of a tensor.

    Attributes:
        kind: "products" at the optimizer's precision, "full_products" in float32, or "decompositions".
        flops: FLOPs.
        size: The shorter side of the matrices.
    """

    kind: str
    flops: int
    size: int


def step_work(layout: Layout) -> list[Work]:
    """A step's products, along each axis; their FLOPs add up to ``soap.costs.step_flops``."""
    numel, sizes = prod(layout.shape), [layout.shape[axis] for axis in layout.axes]
    return [Work("products", 6 * numel * size, min(size, numel // size)) for size in sizes]


def refresh_work(layout: Layout, axis: int) -> list[Work]:
    """A refresh of one axis: the moment carried, ``K Q`` and its QR; together ``soap.costs.refresh_flops``."""
    size, numel = layout.shape[axis], prod(layout.shape)
    return [
        Work("products", refresh_flops(layout, axis) - 6 * size**3, min(size, numel // size)),
        Work("full_products", 2 * size**3, size),
        Work("decompositions", 4 * size**3, size),
    ]


@lru_cache(maxsize=8192)
def _shape_under(shape: tuple[int, ...], dtype: torch.dtype, values: tuple[Any, ...]) -> tuple[Layout, dict[str, int]]:
    options, parameter = dict(zip(STATE_OPTIONS, values, strict=True)), torch.empty(shape, dtype=dtype, device="meta")
    state = meta_state(parameter, options)
    return layout_for(parameter, options), {key: value.numel() * value.element_size() for key, value in state.items()}


def layout_and_bytes(
    shape: tuple[int, ...], dtype: torch.dtype, options: Mapping[str, Any]
) -> tuple[Layout, Mapping[str, int]]:
    """How SOAP treats a parameter of a group with these options, and the bytes of each entry of its state.

    Raises:
        ValueError: There are more bytes than torch can count.
    """
    try:
        return _shape_under(shape, dtype, tuple(options[key] for key in STATE_OPTIONS))
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"a tensor of shape {shape} has more state than can be counted") from error


def soap_cost(layout: Layout, state: Mapping[str, int]) -> Cost:
    """SOAP, or the AdamW that it runs where nothing is preconditioned, from :func:`layout_and_bytes`."""
    return Cost(
        sum(state.values()),
        step_flops(layout) + ADAM_FLOPS_PER_ELEMENT * prod(layout.shape),
        sum(refresh_flops(layout, axis) for axis in layout.axes),
    )


def adamw_cost(shape: tuple[int, ...], dtype: torch.dtype) -> Cost:
    """AdamW of torch: two moments in the parameter's dtype, and a float32 counter."""
    return Cost(2 * prod(shape) * dtype.itemsize + 4, ADAM_FLOPS_PER_ELEMENT * prod(shape))


def muon_cost(shape: tuple[int, ...], dtype: torch.dtype) -> Cost:
    """Muon of torch, for a matrix: momentum, and five iterations ``aX + (bA + cA^2) X`` with ``A = X X^T``."""
    short, long = sorted(shape)
    products = MUON_ITERATIONS * (4 * short**2 * long + 2 * short**3)
    return Cost(prod(shape) * dtype.itemsize, products + MUON_FLOPS_PER_ELEMENT * prod(shape))


def held(shape: tuple[int, ...], ranks: int) -> list[int]:
    """How many elements of a sharded tensor each rank holds: a chunk of the first axis, as ``torch.chunk`` cuts it.

    Example:
        >>> held((5, 3), 4)
        [6, 6, 3, 0]
    """
    if not shape:
        return [1] * ranks
    chunk = -(-shape[0] // ranks)
    return [max(0, min(chunk, shape[0] - rank * chunk)) * prod(shape[1:]) for rank in range(ranks)]
