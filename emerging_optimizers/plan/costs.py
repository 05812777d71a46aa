"""What one tensor costs under SOAP, AdamW and Muon: bytes of state, FLOPs of a step, FLOPs of a refresh.

SOAP's bytes are those of the state it makes (``soap.state``), its FLOPs those by which it shares out its work
(``soap.ownership``, ``soap.timing``). AdamW and Muon are torch's, whose state has the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch

from emerging_optimizers.soap.costs import refresh_flops, step_flops
from emerging_optimizers.soap.state import Layout, layout_of, meta_state

#: Both moments 3 each, root, eps, division and bias corrections 4, weight decay 2, the weight 2.
ADAM_FLOPS_PER_ELEMENT = 14
#: Momentum and Nesterov 4, norm 3, weight decay 2, the weight 2.
MUON_FLOPS_PER_ELEMENT = 11
MUON_ITERATIONS = 5

#: The options that decide what state a tensor has.
STATE_OPTIONS = ("max_precond_dim", "precondition_1d", "merge_dims", "pack_factors", "state_dtype")


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


def layout_under(shape: tuple[int, ...], options: Mapping[str, Any]) -> Layout:
    """The layout of a tensor of this shape, in a group with these options."""
    return layout_of(shape, options["max_precond_dim"], options["precondition_1d"], options["merge_dims"])


def soap_cost(shape: tuple[int, ...], dtype: torch.dtype, options: Mapping[str, Any]) -> Cost:
    """SOAP, or the AdamW that it runs where nothing is preconditioned.

    Args:
        shape: The parameter's shape.
        dtype: The parameter's dtype.
        options: Of its group, complete.
    """
    return _soap_cost(shape, dtype, tuple(options[key] for key in STATE_OPTIONS))


@lru_cache(maxsize=8192)
def _soap_cost(shape: tuple[int, ...], dtype: torch.dtype, values: tuple[Any, ...]) -> Cost:
    options = dict(zip(STATE_OPTIONS, values, strict=True))
    layout = layout_under(shape, options)
    try:
        state = meta_state(torch.empty(shape, dtype=dtype, device="meta"), options)
    except (RuntimeError, OverflowError, TypeError) as error:  # no tensor counts so far, not even one without storage
        raise ValueError(f"a tensor of shape {shape} has more state than can be counted") from error
    return Cost(
        sum(value.numel() * value.element_size() for value in state.values()),
        step_flops(layout) + ADAM_FLOPS_PER_ELEMENT * prod(shape),
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
