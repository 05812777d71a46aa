"""Where two states, or two files of them, differ in a bit."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Name the places where two states differ, by a bit, a dtype, a key or a type."""
    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys {sorted(map(str, a))} and {sorted(map(str, b))}"]
        return [found for key in a for found in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} entries"]
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{where}/{i}")]
    if isinstance(a, Tensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return [f"{where}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"]
        bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
        return [] if torch.equal(*bits) else [f"{where}: {int((bits[0] != bits[1]).sum())} bytes"]
    return [] if a == b else [f"{where}: {a!r} and {b!r}"]


def file_differences(a: Path, b: Path) -> list[str]:
    """:func:`differences` of what two files have that ``torch.save`` or safetensors wrote."""
    one, other = _read(a), _read(b)
    assert one, f"nothing is saved in {a}"
    return differences(one, other)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, weights_only=True)
