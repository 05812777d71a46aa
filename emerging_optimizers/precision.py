"""The precision of float32 matrix products, and who computes them, as a context that always restores what it found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache
from threading import RLock
from typing import Any

import torch
from torch import Tensor

#: What the names of ``torch.set_float32_matmul_precision`` mean to each backend: (CUDA, oneDNN on the CPU).
MATMUL_PRECISIONS: dict[str, tuple[str, str]] = {
    "highest": ("ieee", "ieee"),
    "high": ("tf32", "tf32"),
    "medium": ("tf32", "bf16"),
}

#: Matrix units, as ``torch.cpu.get_capabilities`` names them.
AMX = ("amx_tile", "amx_bf16", "amx_fp16", "amx_int8")

#: On AMD CPUs, products with a dimension of at least this go to oneDNN, which takes 0.6 to 0.95 of MKL's time for them
#: (``benchmarks/matmul_rates.py``).
ONEDNN_FROM = 192

#: A matrix on its own with a dimension of at least this is not multiplied as a stack of one: of a stack's parts, as
#: blocks are, oneDNN makes copies.
ALONE_FROM = 768

_lock = RLock()


@contextmanager
def fp32_matmul_precision(precision: str, operand: Tensor | None = None) -> Iterator[None]:
    """Runs the enclosed float32 matrix products at ``precision``.

    The setting belongs to the process, not to the thread, so only one thread at a time is inside: two would take
    each other's precision, and restore it. Do not wait for another thread in here. The per-backend switches are used
    rather than ``torch.set_float32_matmul_precision``, because reading the latter raises for users who have set the
    former.

    Args:
        precision: "highest" (IEEE float32), "high" (TensorFloat-32 where the device has it) or "medium"
            (bfloat16 products on CPUs that have them).
        operand: A stack of matrices like those that will be multiplied. If it is on an AMD CPU and large enough, oneDNN
            computes the products instead of MKL, in the same precision. ``torch.backends.mkldnn.flags(enabled=False)``
            around the step forbids it.

    Raises:
        ValueError: ``precision`` is none of these.

    Example:
        >>> with fp32_matmul_precision("highest"):
        ...     product = torch.eye(2) @ torch.eye(2)
    """
    if precision not in MATMUL_PRECISIONS:
        raise ValueError(f"Invalid matmul precision: {precision!r} (wanted one of {sorted(MATMUL_PRECISIONS)})")
    with _lock:
        on_cuda, on_cpu = MATMUL_PRECISIONS[precision]
        if operand is not None and _is_large(operand, ONEDNN_FROM) and _onednn_takes_over():
            on_cpu = "bf16"
        with _setting(torch.backends.cuda.matmul, on_cuda), _setting(torch.backends.mkldnn.matmul, on_cpu):  # type: ignore[attr-defined]
            yield


@contextmanager
def without_autocast(*device_types: str) -> Iterator[None]:
    """Runs what is enclosed as if no ``torch.autocast`` were around it. A decorator too: ``@without_autocast()``.

    Args:
        device_types: Of the tensors that are worked on, as "cpu"; default: the CPU and, if there is one, the
            accelerator.
    """
    if not device_types:
        accelerator = torch.accelerator.current_accelerator()
        device_types = ("cpu",) if accelerator is None else ("cpu", accelerator.type)
    with ExitStack() as stack:
        for device_type in device_types:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextmanager
def _setting(backend: Any, wanted: str) -> Iterator[None]:
    """One backend's switch, for a while."""
    before = backend.fp32_precision
    if before == wanted:
        yield
        return
    backend.fp32_precision = wanted
    try:
        yield
    finally:
        # A value that came from a more general setting must come from there again, and not be pinned here.
        backend.fp32_precision = "none"
        if backend.fp32_precision != before:
            backend.fp32_precision = before


def matrix_product(left: Tensor, right: Tensor) -> Tensor:
    """``torch.bmm`` of (B, m, k) and (B, k, n), in the form that is fastest for one large matrix on a CPU.

    For stacks, even of one, oneDNN copies what is not contiguous. Small ones stay stacks, so that a matrix on its own
    gives bit for bit what it gives among others.
    """
    if is_one_large(left, right):
        return torch.mm(left[0], right[0]).unsqueeze(0)
    return torch.bmm(left, right)


def add_matrix_product_(target: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0) -> None:
    """``target <- target + alpha left right``, in place: ``baddbmm_``, as :func:`matrix_product` is ``bmm``."""
    if is_one_large(left, right):
        target[0].addmm_(left[0], right[0], alpha=alpha)
    else:
        target.baddbmm_(left, right, alpha=alpha)


def move_towards_product_(target: Tensor, left: Tensor, right: Tensor, weight: float) -> None:
    """``target <- (1 - weight) target + weight left right``, in place, of stacks or of matrices.

    Not by oneDNN if it would have to scale the target: it compiles a kernel for every factor, and bias correction makes
    a new one in every step.
    """
    if target.dim() == 2 and _is_handed_on():
        target.mul_(1 - weight).addmm_(left, right, alpha=weight)
    elif target.dim() == 2:
        target.addmm_(left, right, beta=1 - weight, alpha=weight)
    elif target.device.type != "cpu":
        target.baddbmm_(left, right, beta=1 - weight, alpha=weight)
    else:
        with _without_onednn():
            if target.is_contiguous():
                target.baddbmm_(left, right, beta=1 - weight, alpha=weight)
            else:  # baddbmm_ would take one matrix after the other
                target.lerp_(torch.bmm(left, right), weight)


def is_one_large(left: Tensor, right: Tensor) -> bool:
    """Whether the product of two stacks is that of two matrices on a CPU, one of which has a large dimension."""
    return left.shape[0] == 1 and max(*left.shape, right.shape[-1]) >= ALONE_FROM and left.device.type == "cpu"


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Leaves the enclosed products to torch's BLAS, if it was :func:`fp32_matmul_precision` who handed them on."""
    with _setting(torch.backends.mkldnn.matmul, "ieee") if _is_handed_on() else nullcontext():  # type: ignore[attr-defined]
        yield


def _is_handed_on() -> bool:
    """Whether :func:`fp32_matmul_precision` has handed products on to oneDNN."""
    return torch.backends.mkldnn.matmul.fp32_precision == "bf16" and _onednn_takes_over()  # type: ignore[attr-defined]


def _is_large(stack: Tensor, size: int) -> bool:
    return stack.device.type == "cpu" and max(stack.shape[1:], default=0) >= size


def _onednn_takes_over() -> bool:
    # Not asked while it is forbidden: the trial, which is made once, would then be of MKL.
    return bool(torch.backends.mkldnn.enabled) and _onednn_is_faster_and_exact()


@lru_cache(maxsize=1)
def _onednn_is_faster_and_exact() -> bool:
    """Whether torch's switch for bfloat16 products on the CPU only changes who computes them, and to the better.

    With the switch torch leaves float32 products to oneDNN, which on CPUs without matrix units (AMX) has nothing to
    gain from bfloat16 and computes in float32. That is tried, on products with digits that bfloat16 does not have.
    """
    facts: dict[str, Any] = dict(getattr(torch.cpu, "get_capabilities", dict)())
    if not str(facts.get("cpu_name", "")).startswith("AMD") or any(facts.get(unit) for unit in AMX):
        return False
    digits = torch.arange(1024 * 1024, dtype=torch.float64, device="cpu").remainder(2**11).view(1024, 1024)
    left, right = 1 + digits * 2**-11, torch.eye(1024, dtype=torch.float64, device="cpu") * (1 + 2**-11)
    with fp32_matmul_precision("medium"), torch.autocast("cpu", enabled=False):
        several = [left[:rows].float() @ right.float() for rows in (128, 1024)]
        stack = left.float()[:, :128].reshape(8, 128, 128) @ right.float()[:128, :128].expand(8, -1, -1)
    several.append(torch.cat([stack.view(1024, 128), several[-1][:, 128:]], dim=1))
    return all(torch.equal(one.double(), left[: len(one)] * (1 + 2**-11)) for one in several)
