"""The precision of float32 matrix products, as a context that always restores what it found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Any

import torch

#: What the names of ``torch.set_float32_matmul_precision`` mean to each backend: (CUDA, oneDNN on the CPU).
MATMUL_PRECISIONS: dict[str, tuple[str, str]] = {
    "highest": ("ieee", "ieee"),
    "high": ("tf32", "tf32"),
    "medium": ("tf32", "bf16"),
}

_lock = RLock()


class fp32_matmul_precision:  # noqa: N801 - used as a function, like contextlib.suppress
    """Runs the enclosed float32 matrix products at a precision.

    The setting belongs to the process, not to the thread, so only one thread at a time is inside: two would take
    each other's precision, and restore it. Do not wait for another thread in here. The per-backend switches are used
    rather than ``torch.set_float32_matmul_precision``, because reading the latter raises for users who have set the
    former.

    Args:
        precision: "highest" (IEEE float32), "high" (TensorFloat-32 where the device has it) or "medium"
            (bfloat16 products on CPUs that have them).

    Example:
        >>> with fp32_matmul_precision("highest"):
        ...     product = torch.eye(2) @ torch.eye(2)
    """

    def __init__(self, precision: str) -> None:
        if precision not in MATMUL_PRECISIONS:
            raise ValueError(f"Invalid matmul precision: {precision!r} (wanted one of {sorted(MATMUL_PRECISIONS)})")
        self._wanted = MATMUL_PRECISIONS[precision]
        self._before: list[tuple[Any, str]] = []

    def __enter__(self) -> None:
        _lock.acquire()
        backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        for backend, wanted in zip(backends, self._wanted, strict=True):
            before = backend.fp32_precision
            if before != wanted:
                self._before.append((backend, before))
                backend.fp32_precision = wanted

    def __exit__(self, *_: object) -> None:
        for backend, before in self._before:
            # A value that came from a more general setting must come from there again, and not be pinned here.
            backend.fp32_precision = "none"
            if backend.fp32_precision != before:
                backend.fp32_precision = before
        _lock.release()


@contextmanager
def without_autocast(*device_types: str) -> Iterator[None]:
    """Runs what is enclosed as if no ``torch.autocast`` were around it, on the CPU and the accelerator by default.

    A decorator too: ``@without_autocast()``.
    """
    if not device_types:
        accelerator = torch.accelerator.current_accelerator()
        device_types = ("cpu",) if accelerator is None else ("cpu", accelerator.type)
    with ExitStack() as stack:
        for device_type in device_types:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
