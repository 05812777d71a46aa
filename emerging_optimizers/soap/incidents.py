"""What went wrong and was survived: counted in this process, and told once per kind.

Kinds are "gradient with NaN", "gradient with Inf", "gradient overflows", "gradient spoiled elsewhere" (of a piece, in
another process) and "gradient skipped on cuda:0" (there nobody waits to learn why); and for a decomposition, "eigh" or
"qr": "eigh float64", "eigh cpu" and "eigh kept", by what helped in the end.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

#: How often each kind has happened in this process.
incidents: Counter[str] = Counter()

_lock = Lock()


class _Skips:
    """The skips on one device: the sum there, as it has arrived on the host, and how many of them were reported."""

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.there = torch.zeros((), dtype=torch.int64, device=device)
            pinned = device.type == "cuda"
            self.here = torch.zeros((), dtype=torch.int64, device="cpu", pin_memory=pinned)
        self.reported = 0


_skips: dict[torch.device, _Skips] = {}


def report(kind: str, message: str, *arguments: object, times: int = 1) -> None:
    """Counts an incident, and logs a warning, with ``%``-style places for arguments, if it is the first of its kind."""
    with _lock:
        first = incidents[kind] == 0
        incidents[kind] += times
    if first:
        logger.warning(message + " Further cases are counted, not logged.", *arguments)


def report_skipped_gradient(name: str, grad: Tensor, piece: bool = False) -> None:
    """Reports that the tensor called ``name`` was not stepped because of this gradient, or ``piece`` of one."""
    if bool(grad.isnan().any()):
        kind, reason = "gradient with NaN", "has NaN"
    elif bool(grad.isinf().any()):
        kind, reason = "gradient with Inf", "has Inf"
    elif piece:
        kind, reason = "gradient spoiled elsewhere", "has NaN or Inf or overflows, with what other processes have of it"
    else:
        kind, reason = "gradient overflows", "overflows when squared"
    report(kind, "The gradient of %s %s. The tensor was left as it is; state['skipped_steps'] counts.", name, reason)


def count_skips(skipped: Sequence[Tensor]) -> None:
    """Counts skipped gradients that only their device knows of, and never waits for it.

    The sum travels to the host behind the step, and what has arrived by then is read at a later call. So a skip is
    told a few steps late at worst, and one in the very last step of a process is only in the state.

    Args:
        skipped: Boolean vectors: whether a gradient was skipped.
    """
    for device in {vector.device for vector in skipped}:
        _count_on(device, torch.cat([vector for vector in skipped if vector.device == device]))


def _count_on(device: torch.device, skipped: Tensor) -> None:
    with _lock:
        if device not in _skips:
            _skips[device] = _Skips(device)
        skips = _skips[device]
        arrived = int(skips.here) - skips.reported
        skips.reported += arrived
        skips.there += skipped.sum()
        skips.here.copy_(skips.there, non_blocking=True)
    if arrived > 0:
        report(
            f"gradient skipped on {device}",
            "%d gradients on %s had NaN or Inf or overflowed when squared. Their tensors were left as they are; "
            "state['skipped_steps'] counts per tensor.",
            arrived,
            device,
            times=arrived,
        )
