"""The precision of float32 matrix products, as a context that always restores what it found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch

#: What the names of ``torch.set_float32_matmul_precision`` mean to each backend: (CUDA, oneDNN on the CPU).
MATMUL_PRECISIONS: dict[str, tuple[str, str]] = {
    "highest": ("ieee", "ieee"),
    "high": ("tf32", "tf32"),
    "medium": ("tf32", "bf16"),
}

_lock = RLock()


@contextmanager
def fp32_matmul_precision(precision: str) -> Iterator[None]:
    """Runs the enclosed float32 matrix products at ``precision``.

    The setting belongs to the process, not to the thread, so only one thread at a time is inside: two would take
    each other's precision, and restore it. Do not wait for another thread in here. The per-backend switches are used
    rather than ``torch.set_float32_matmul_precision``, because reading the latter raises for users who have set the
    former.

    Args:
        precision: "highest" (IEEE float32), "high" (TensorFloat-32 where the device has it) or "medium"
            (bfloat16 products on CPUs that have them).

    Raises:
        ValueError: ``precision`` is none of these.

    Example:
        >>> with fp32_matmul_precision("highest"):
        ...     product = torch.eye(2) @ torch.eye(2)
    """
    if precision not in MATMUL_PRECISIONS:
        raise ValueError(f"Invalid matmul precision: {precision!r} (wanted one of {sorted(MATMUL_PRECISIONS)})")
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    wanted = MATMUL_PRECISIONS[precision]
    with _lock:
        before = tuple(backend.fp32_precision for backend in backends)
        if before == wanted:
            yield
            return
        try:
            for backend, value in zip(backends, wanted, strict=True):
                backend.fp32_precision = value
            yield
        finally:
            for backend, value in zip(backends, before, strict=True):
                # A value that came from a more general setting must come from there again, and not be pinned here.
                backend.fp32_precision = "none"
                if backend.fp32_precision != value:
                    backend.fp32_precision = value
