"""Trains in every mode, and prints by how much memory grew between the two steps that argv names.

A process of its own, because what other tests leave to the garbage collector would be counted too.
"""

import ctypes
import gc
import json
import logging
import sys

import torch
from torch import Tensor, nn

from emerging_optimizers.soap import SOAP

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


class MallocInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]


def measure() -> dict[str, int]:
    """Python objects, tensors, and the bytes that malloc has handed out, where C++ keeps what Python does not see."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallocInfo
    info = mallinfo2()
    tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    return {"objects": sys.getallocatedblocks(), "tensors": tensors, "bytes": info.uordblks + info.hblkhd}


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
    first, last = map(int, sys.argv[1:])
    print(
        json.dumps({mode: growth(mode, first, last) for mode in MODES} | {"leak": growth("default", first, last, [])})
    )
