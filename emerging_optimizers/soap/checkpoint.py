"""Loading optimizer state in the dtype in which it was saved."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def load_state_dict_exactly(
    optimizer: Optimizer, load: Callable[[dict[str, Any]], None], state_dict: dict[str, Any]
) -> None:
    """Runs ``load(state_dict)``, torch's own loading, and then restores what it casts.

    ``Optimizer.load_state_dict`` casts every floating-point state tensor to its parameter's dtype, which would turn
    the float32 factors of a bfloat16 parameter into bfloat16. Two temporary hooks, the last before and the first
    after, see the state dict that torch really loads and put copies of its tensors in place, so that the
    user's own hooks keep working.

    Args:
        optimizer: The optimizer that is loaded.
        load: Its inherited ``load_state_dict``.
        state_dict: As returned by ``state_dict()``.
    """
    loaded: dict[str, Any] = {}

    def remember(_: Optimizer, final: dict[str, Any]) -> None:
        loaded.update(final)

    def restore(_: Optimizer) -> None:
        saved_ids = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            for key, value in loaded["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    device = value.device if value.device.type == "cpu" and _lives_on_cpu(key) else parameter.device
                    optimizer.state[parameter][key] = value.detach().to(device, copy=True).contiguous()

    handles = (
        optimizer.register_load_state_dict_pre_hook(remember),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    )
    try:
        load(state_dict)
    finally:
        for handle in handles:
            handle.remove()


def _lives_on_cpu(key: str) -> bool:
    """Whether this state is a counter that the host reads in every step."""
    return key in ("step", "refresh_step")
