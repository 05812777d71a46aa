"""Trains in the mode that argv names, and prints by how much memory grew between the two steps that it names next.

A process of its own, because what other tests leave to the garbage collector would be counted too.
"""

import contextlib
import ctypes
import gc
import json
import logging
import sys
import tracemalloc
from pathlib import Path

import torch
from torch import Tensor, nn

from emerging_optimizers.soap import SOAP

PAGE = 4096
MODES = {
    "default": {},
    "l2, bfloat16": {"weight_decay_method": "l2", "max_update_rms": 1.0, "precondition_1d": True},
    "packed, 16-bit state": {"pack_factors": True, "state_dtype": torch.bfloat16, "precondition_frequency": 3},
    "kl, eigh, schedule": {
        "use_kl_shampoo": True,
        "use_eigh": True,
        "use_adaptive_criteria": True,
        "precondition_frequency": lambda step: 4 + step % 4,
    },
}


def resident_bytes() -> int:
    """What the process holds, once malloc has been asked to return what it keeps for later."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def live_tensors() -> int:
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def measure() -> dict[str, int]:
    """Bytes of Python objects, live tensors, resident bytes."""
    gc.collect()
    return {"python": tracemalloc.get_traced_memory()[0], "tensors": live_tensors(), "resident": resident_bytes()}


def growth(mode: str, first: int, last: int, leak: list[Tensor] | None = None) -> dict[str, int]:
    dtype = torch.bfloat16 if "bfloat16" in mode else torch.float32
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in [(6, 10), (5,)]]
    optimizer = SOAP(parameters, lr=0.01, **MODES[mode])
    generator = torch.Generator().manual_seed(0)
    before: dict[str, int] = {}
    for step in range(1, last + 1):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            if step % 50 == 7:
                parameter.grad.view(-1)[0] = float("nan")
        optimizer.step()
        if leak is not None:
            leak.append(torch.zeros(1))
        if step % 100 == 0:
            optimizer.load_state_dict(optimizer.state_dict())
        if step == first:
            before = measure()
    after = measure()
    return {name: after[name] - before[name] for name in before}


if __name__ == "__main__":
    logging.disable()
    tracemalloc.start()
    mode, first, last = sys.argv[1:4]
    print(json.dumps(growth(mode, int(first), int(last), [] if "leak" in sys.argv else None)))
