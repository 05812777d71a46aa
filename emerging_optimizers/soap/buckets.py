"""Buckets: parameters of one group that are worked on together, and the storage of their state.

Parameters with the same layout, working dtype and device are one stacked problem ``(B, d_1, .., d_N)``; the batched
kernels then do in one call what would be B calls. Parameters without a preconditioned axis are laid end to end in one
vector, since Adam is elementwise. Either way the state tensors of a parameter are views into the bucket's storage:
nothing is copied to batch it, and ``state_dict()`` sees ordinary per-parameter tensors. State that is kept smaller than
the arithmetic wants it (``pack_factors``, ``state_dtype``) is expanded for one run at a time, which bounds what that
takes, and put back.

Which parameters share a bucket, and in which order, depends only on the group's parameter list and on which of them
have state. A run that is resumed from a checkpoint therefore forms the same buckets, and rounds alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from emerging_optimizers.soap.layout import Layout, layout_for
from emerging_optimizers.soap.packing import pack, unpack
from emerging_optimizers.soap.placement import Grid, Place, local_tensor
from emerging_optimizers.soap.state import HOST_KEYS, init_state, working_dtype

#: A bucket of several parameters has at most this many elements per stack, which bounds the extra memory of a step.
CHUNK_ELEMENTS = 2**22

NO_AXIS = Layout((), ())

T = TypeVar("T")


class Kind(NamedTuple):
    """What the members of a bucket have in common.

    Attributes:
        layout: Their layout; None for members of any shape without a preconditioned axis ("flat").
        dtype: The dtype of arithmetic and state.
        device: Where they are.
        grid: The processes that hold them, if it is several.
        pieces: Whether a process holds but pieces of them: the whole gradients of a layout's members are then brought
            to their owner, and the members of a flat bucket are these pieces.
        pack_factors: Whether factors are kept packed.
        state_dtype: In which first moments and bases are kept; None: the working dtype.
    """

    layout: Layout | None
    dtype: torch.dtype
    device: torch.device
    grid: Grid | None
    pieces: bool
    pack_factors: bool
    state_dtype: torch.dtype | None


class Bucket:
    """Parameters with one layout, or without a preconditioned axis, and their state in stacks.

    Args:
        kind: What they have in common.
        members: Index in the group, and parameter.
        states: Their states in the optimizer, empty for a parameter that has none yet; what is there is copied.

    Attributes:
        tensors: What this process has of each: the parameter itself, or a DTensor's local tensor. For members whose
            gradients are brought here the DTensor, which is only asked for its shape.
        plain: Whether the members have the working shape, so that nothing is folded.
        stacks: Per key of the state the storage, in the shape and dtype in which it is kept: (B,) for counters,
            (B, d_1, .., d_N) for moments, (B, d, d) for factors and bases, (B, d (d + 1) / 2) for packed factors; the
            moments of a flat bucket are one vector.
    """

    def __init__(self, kind: Kind, members: Sequence[tuple[int, Tensor]], states: Sequence[dict[str, Any]]) -> None:
        self.kind = kind
        self.layout = layout = kind.layout
        self.dtype, self.device = kind.dtype, kind.device
        self.gathered = kind.pieces and layout is not None
        self.indices = [index for index, _ in members]
        self.parameters = [parameter for _, parameter in members]
        self.look_up_tensors()
        self.offsets = [0, *accumulate(tensor.numel() for tensor in self.tensors)]
        self.local_sizes = torch.tensor([tensor.numel() for tensor in self.tensors], device=self.device)
        self.sizes = torch.tensor([p.numel() for p in self.parameters], device=self.device)
        self.plain = layout is not None and all(tuple(tensor.shape) == layout.shape for tensor in self.tensors)
        self.stacks: dict[str, Tensor] = {}
        self._views: list[dict[str, Tensor]] = [{} for _ in members]
        one: dict[str, Tensor] = {}
        init_state(one, self.tensors[0], layout or NO_AXIS, kind.pack_factors, kind.state_dtype)
        for key, fresh in one.items():
            elementwise = layout is None and key not in (*HOST_KEYS, "skipped_steps")
            if elementwise:
                stack = torch.zeros(self.offsets[-1], dtype=fresh.dtype, device=fresh.device)
            else:
                stack = fresh.expand(len(members), *fresh.shape).clone(memory_format=torch.contiguous_format)
            self.stacks[key] = stack
            for b, tensor in enumerate(self.tensors):
                view = stack[self.offsets[b] : self.offsets[b + 1]] if elementwise else stack[b]
                self._views[b][key] = view.view(tensor.shape) if key.startswith("exp_avg") else view
        for state, views in zip(states, self._views, strict=True):
            for key, view in views.items():
                if key in state and tuple(state[key].shape) != tuple(view.shape):
                    raise RuntimeError(
                        f"state[{key!r}] must have shape {tuple(view.shape)}, got {tuple(state[key].shape)}"
                    )
        for state, views in zip(states, self._views, strict=True):
            for key, view in views.items():
                if key in state:
                    view.copy_(state[key])
            state.update(views)
        self._pointers = [[view.data_ptr() for view in views.values()] for views in self._views]
        if layout is not None:
            for key in ("exp_avg", "exp_avg_sq"):
                self.stacks[key] = self.stacks[key].view(len(members), *layout.shape)

    def look_up_tensors(self) -> None:
        """Asks the parameters anew for what this process has of them: an engine may have put it elsewhere."""
        self.tensors = self.parameters if self.gathered else [local_tensor(p) for p in self.parameters]

    def holds(self, states: Sequence[dict[str, Any]]) -> bool:
        """Whether the members' states are still the views that this bucket made, and nobody else's tensors."""
        for state, views, pointers in zip(states, self._views, self._pointers, strict=True):
            for (key, view), pointer in zip(views.items(), pointers, strict=True):
                if state.get(key) is not view or view.data_ptr() != pointer:
                    return False
        return True

    def runs(self, grads: Sequence[Tensor | None]) -> Iterator[Run]:
        """The members that have a gradient, cut where two neighbours differ in their clock.

        Args:
            grads: The members' gradients, shaped like :attr:`tensors`.
        """
        steps = self.stacks["step"].tolist()
        none = [0.0] * len(steps)
        refresh_steps = self.stacks["refresh_step"].tolist() if self.layout else none
        clocks = [
            None if grad is None else (int(step), refresh_step > 0)
            for grad, step, refresh_step in zip(grads, steps, refresh_steps, strict=True)
        ]
        for start, stop in stretches(clocks):
            clock = clocks[start]
            if clock is not None:
                yield Run(self, start, stop, *clock, grads[start:stop])


class Run:
    """Neighbours in a bucket that do the same in a step, as views of the bucket's stacks.

    Args:
        bucket: The bucket.
        start: The first of them.
        stop: One past the last.
        step: The steps that they have done.
        based: Whether they have an eigenbasis.
        grads: Their gradients.
    """

    def __init__(
        self,
        bucket: Bucket,
        start: int,
        stop: int,
        step: int,
        based: bool,
        grads: Sequence[Tensor | None],
    ) -> None:
        self.bucket, self.start, self.stop = bucket, start, stop
        self._is_all = stop - start == len(bucket.parameters)
        self.step, self.based = step, based
        self.grads = [grad for grad in grads if grad is not None]
        self.layout = bucket.layout
        self.parameters = bucket.parameters[start:stop]
        self.tensors = bucket.tensors[start:stop]
        self.indices = bucket.indices[start:stop]

    def part(self, start: int, stop: int) -> Run:
        """Some of them, counted from this run's first."""
        if (start, stop) == (0, len(self.parameters)):
            return self
        grads = self.grads[start:stop]
        clock = (self.step, self.based)
        return Run(self.bucket, self.start + start, self.start + stop, *clock, grads)

    def part_of(self, joined: Tensor, start: int, stop: int) -> Tensor:
        """What :meth:`join` would have made of :meth:`part`, as a view of what it made of all."""
        if self.layout is not None:
            return joined[start:stop]
        first, *_ = offsets = self.bucket.offsets[self.start : self.stop + 1]
        return joined[offsets[start] - first : offsets[stop] - first]

    def counters(self, key: str) -> Tensor:
        """``step`` and the like, (B,)."""
        stack = self.bucket.stacks[key]
        return stack if self._is_all else stack[self.start : self.stop]

    def kept(self, key: str) -> Tensor:
        """State as it is kept, a view: factors may be packed, and the dtype may not be the working one."""
        stack = self.bucket.stacks[key]
        if self._is_all:
            return stack
        if self.layout is not None:
            return stack[self.start : self.stop]
        return stack[self.bucket.offsets[self.start] : self.bucket.offsets[self.stop]]

    def moment(self, key: str) -> Tensor:
        """``exp_avg`` or ``exp_avg_sq`` in the working dtype, shaped like what :meth:`join` makes.

        Whoever changes it in place must hand it to :meth:`keep`: it is a view of the state or a copy.
        """
        return self.kept(key).to(self.bucket.dtype)

    def matrices(self, kind: str) -> list[Tensor | None]:
        """The factors ("GG") or bases ("Q") per axis of the working shape; None for an axis without one.

        (B, d, d) in the working dtype. As for :meth:`moment`, they are views or copies.
        """
        layout = self.layout or NO_AXIS
        return [self._matrix(kind, axis) if axis in layout.axes else None for axis in range(len(layout.shape))]

    def _matrix(self, kind: str, axis: int) -> Tensor:
        kept = self.kept(f"{kind}_{axis}")
        if kind == "GG" and self.bucket.kind.pack_factors:
            return unpack(kept, (self.layout or NO_AXIS).shape[axis])
        return kept.to(self.bucket.dtype)

    def keep(self, key: str, value: Tensor) -> None:
        """Puts back what :meth:`moment` gave or what replaces it; rounds it if it is kept in another dtype.

        Nothing is done where the value was changed in place and is the state itself.
        """
        kept = self.kept(key)
        if kept.data_ptr() != value.data_ptr():
            kept.copy_(value)

    def keep_matrices(self, kind: str, matrices: Sequence[Tensor | None]) -> None:
        """:meth:`keep`, for what :meth:`matrices` gave or what replaces it."""
        for axis, matrix in enumerate(matrices):
            if matrix is None:
                continue
            if kind == "GG" and self.bucket.kind.pack_factors:
                pack(matrix, out=self.kept(f"{kind}_{axis}"))
            else:
                self.keep(f"{kind}_{axis}", matrix)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like the parameters as one stack (B, d_1, .., d_N), or vector, in the working dtype.

        A single one is not copied if it need not be: the result must not be written to.
        """
        shape = (-1,) if self.layout is None else (1, *self.layout.shape)
        if len(tensors) == 1:
            return tensors[0].reshape(shape).to(self.bucket.dtype)
        if self.bucket.plain:
            return torch.stack(list(tensors)).to(self.bucket.dtype)
        return torch.cat([tensor.reshape(shape) for tensor in tensors]).to(self.bucket.dtype)

    def split(self, joined: Tensor) -> list[Tensor]:
        """The inverse of :meth:`join`, as views."""
        if self.bucket.plain:
            return list(joined.unbind())
        sizes = [tensor.numel() for tensor in self.tensors]
        parts = joined.unbind() if self.layout is not None else torch.split(joined, sizes)
        return [part.view(tensor.shape) for part, tensor in zip(parts, self.tensors, strict=True)]

    def norms(self, joined: Tensor) -> Tensor:
        """The Euclidean norm of each one's part of what :meth:`join` made, (B,); of a piece that of the whole."""
        if self.layout is not None:
            norms: Tensor = torch.linalg.vector_norm(joined.flatten(1), dim=1)
            return norms
        norms = torch.stack(torch._foreach_norm(self.split(joined)))
        grid = self.bucket.kind.grid
        if grid is None or grid.row_group is None:
            return norms
        squares = norms.double().square()
        dist.all_reduce(squares, group=grid.row_group)
        return squares.sqrt().to(norms.dtype)

    def rough_norms(self, joined: Tensor) -> Tensor:
        """:meth:`norms`, of one matrix on a CPU in 0.6 of the time, and with other last digits."""
        if self.layout is None or len(joined) > 1 or joined.device.type != "cpu":
            return self.norms(joined)
        vector = joined.reshape(-1)
        return torch.dot(vector, vector).sqrt().view(1)

    def sizes(self) -> Tensor:
        """The number of elements of each, (B,); of a piece that of the whole."""
        return self.bucket.sizes[self.start : self.stop]

    def spread(self, values: Tensor) -> Tensor:
        """One value for each, (B,), shaped so that it broadcasts against what :meth:`join` makes."""
        if self.layout is not None:
            return values.view(-1, *[1] * len(self.layout.shape))
        size = self.bucket.offsets[self.stop] - self.bucket.offsets[self.start]
        return values.repeat_interleave(self.bucket.local_sizes[self.start : self.stop], output_size=size)


def stretches(values: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Start and stop of each longest stretch of equal neighbours.

    Example:
        >>> list(stretches([1, 1, 2, 1]))
        [(0, 2), (2, 3), (3, 4)]
    """
    start = 0
    for stop in range(1, len(values) + 1):
        if stop == len(values) or values[stop] != values[start]:
            yield start, stop
            start = stop


def chunks_of(
    group: dict[str, Any], states: Mapping[Tensor, dict[str, Any]], places: Mapping[Tensor, Place]
) -> Iterator[tuple[Kind, int | None, list[tuple[int, Tensor]]]]:
    """What becomes a bucket, on this process or on another: kind, owner and members (index in the group, parameter).

    The owner is None where each process does what it holds.

    Args:
        group: The parameter group. Its parameters count that have a gradient now or have had one.
        states: The optimizer's state.
        places: The place of every parameter that several processes hold.
    """
    found: dict[tuple[Kind, int | None], list[tuple[int, Tensor]]] = {}
    for index, parameter in enumerate(group["params"]):
        if parameter.grad is not None or "step" in states.get(parameter, ()):
            layout = layout_for(parameter, group)
            grid, owner = places.get(parameter, (None, None))
            pieces = grid is not None and grid.columns > 1
            kind = Kind(
                layout if layout.axes else None,
                working_dtype(parameter),
                parameter.device,
                grid,
                pieces,
                group["pack_factors"],
                group["state_dtype"],
            )
            found.setdefault((kind, owner), []).append((index, parameter))
    for (kind, owner), members in found.items():
        for chunk in _chunks(kind.layout, members):
            yield kind, owner, chunk


def form_buckets(
    group: dict[str, Any],
    chunks: Sequence[tuple[Kind, list[tuple[int, Tensor]]]],
    states: dict[Tensor, dict[str, Any]],
    former: list[Bucket],
) -> list[Bucket]:
    """The buckets of a group on this process.

    Args:
        group: The parameter group.
        chunks: Kind and members of each.
        states: The optimizer's state; gets an entry for each member that has none yet.
        former: The buckets so far; those that still stand are used again, so that their state stays where it is. Is
            emptied, so that a bucket that does not stand is freed as its members move out.
    """
    standing = {(bucket.kind, *map(id, bucket.parameters)): bucket for bucket in former}
    found = [standing.pop((kind, *(id(parameter) for _, parameter in chunk)), None) for kind, chunk in chunks]
    standing.clear()
    former.clear()
    for place, (kind, chunk) in enumerate(chunks):
        chunk_states = [states[parameter] for _, parameter in chunk]
        bucket = found[place]
        if bucket is None or not bucket.holds(chunk_states):
            bucket = found[place] = None
            bucket = found[place] = Bucket(kind, chunk, chunk_states)
        bucket.look_up_tensors()
        bucket.indices = [index for index, _ in chunk]
    return [bucket for bucket in found if bucket is not None]


def _chunks(layout: Layout | None, members: list[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Cuts members so that no stack of several has more than :data:`CHUNK_ELEMENTS`."""
    if layout is None:
        return batches(members, lambda member: member[1].numel(), CHUNK_ELEMENTS)
    size = _size(layout)
    return batches(members, lambda member: size, CHUNK_ELEMENTS)


def _size(layout: Layout) -> int:
    """The elements of a member in the largest of its stacks."""
    return max(prod(layout.shape), *(layout.shape[axis] ** 2 for axis in layout.axes), 0)


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
