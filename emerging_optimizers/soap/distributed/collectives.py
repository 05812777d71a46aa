"""Moving tensors between processes: the two collectives that the optimizer uses, on flat buffers of bytes.

What arrives is known beforehand on both sides, from the parameters alone, so that no sizes travel. Each tensor starts
at a multiple of eight bytes; bfloat16 tensors travel as two bytes an element.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

#: Bytes that this process has sent so far, by kind: "all_to_all" (to other processes) and "broadcast" (once, however
#: many receive it).
sent: Counter[str] = Counter()

_ALIGNMENT = 8

T = TypeVar("T")


class Spec(NamedTuple):
    """Shape and dtype of a tensor that travels."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What it takes in a buffer."""
        size = prod(self.shape) * self.dtype.itemsize
        return -(-size // _ALIGNMENT) * _ALIGNMENT


def spec_of(tensor: Tensor) -> Spec:
    """The spec of a tensor."""
    return Spec(tuple(tensor.shape), tensor.dtype)


class Transfer:
    """Tensors under way, to be read after :meth:`wait`, until which ``kept`` must live."""

    def __init__(self, work: dist.Work | None, received: list[list[Tensor]], kept: object) -> None:
        self._work, self._received, self._kept = work, received, kept

    def wait(self) -> list[list[Tensor]]:
        """The received tensors per sender.

        Raises:
            RuntimeError: The collective failed: a process died, or took longer than the group's timeout.
        """
        if self._work is not None:
            self._work.wait()
        self._kept = None
        return self._received


def all_to_all(
    group: dist.ProcessGroup,
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[Spec]],
    device: torch.device,
) -> Transfer:
    """Sends to every process of a group, in its order, the tensors for it, and receives what they have for this one."""
    out_specs = [[spec_of(tensor) for tensor in tensors] for tensors in outgoing]
    out_sizes = [sum(spec.bytes for spec in specs) for specs in out_specs]
    in_sizes = [sum(spec.bytes for spec in specs) for specs in incoming]
    send = torch.empty(sum(out_sizes), dtype=torch.uint8, device=device)
    receive = torch.empty(sum(in_sizes), dtype=torch.uint8, device=device)
    for views, tensors in zip(_views(send, out_specs), outgoing, strict=True):
        if views:
            torch._foreach_copy_(views, list(tensors))
    me = dist.get_rank(group)
    sent["all_to_all"] += sum(out_sizes) - out_sizes[me]
    work = dist.all_to_all_single(receive, send, in_sizes, out_sizes, group=group, async_op=True)
    return Transfer(work, _views(receive, incoming), kept=(send, receive))


def broadcast(group: dist.ProcessGroup, source: int, tensors: Sequence[Tensor]) -> Transfer:
    """Sends tensors from the process with global rank ``source`` to all others of a group.

    The others give tensors of the same shapes and dtypes, which are left as they are. The sender receives nothing.
    """
    specs = [spec_of(tensor) for tensor in tensors]
    buffer = torch.empty(sum(spec.bytes for spec in specs), dtype=torch.uint8, device=tensors[0].device)
    views = _views(buffer, [specs])
    if dist.get_rank() == source:
        torch._foreach_copy_(views[0], list(tensors))
        sent["broadcast"] += buffer.numel()
        views = [[]]
    work = dist.broadcast(buffer, src=source, group=group, async_op=True)
    return Transfer(work, views, kept=buffer)


def _views(buffer: Tensor, specs: Sequence[Sequence[Spec]]) -> list[list[Tensor]]:
    """The tensors with these specs, one after the other in a buffer, as views."""
    views = []
    start = 0
    for each in specs:
        some = []
        for spec in each:
            size = prod(spec.shape) * spec.dtype.itemsize
            some.append(buffer[start : start + size].view(spec.dtype).view(spec.shape))
            start += spec.bytes
        views.append(some)
    return views


def batches(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Puts neighbours together as long as their sizes add up to no more than a limit; a larger one is alone.

    Example:
        >>> list(batches([1, 2, 3, 9, 1], lambda item: item, 5))
        [[1, 2], [3], [9], [1]]
    """
    batch: list[T] = []
    filled = 0
    for item in items:
        if batch and filled + size(item) > limit:
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += size(item)
    if batch:
        yield batch
