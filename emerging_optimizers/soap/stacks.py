"""Stacks: equal parameters of a group, worked on together, and the storage of their state.

Parameters of one shape, working dtype, device and way of being kept are one stack; the batched kernels then do in one
call what would be B calls. The state tensors of a parameter are views into the stack's storage: nothing is copied to
batch it, and ``state_dict()`` sees ordinary tensors per parameter. State that is kept smaller than the arithmetic wants
it (``pack_factors``, ``state_dtype``) is expanded for one stack at a time, and put back.

Which parameters share a stack, and in which order, depends only on the group's parameter list and on which of them have
state. A run that is resumed from a checkpoint therefore forms the same stacks, and rounds alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.mixin import WeightDecayMixin, scalar_lr
from emerging_optimizers.soap.due import Due, Schedule
from emerging_optimizers.soap.incidents import report_skipped_gradient
from emerging_optimizers.soap.linalg import Stack, where_stacked
from emerging_optimizers.soap.options import name_of
from emerging_optimizers.soap.state import Layout, layout_of, new_state, pack, unpack, working_dtype
from emerging_optimizers.soap.step import norms, soap_step

#: A stack of several parameters has at most this many elements per state tensor, which bounds the memory of a step.
MOST_ELEMENTS = 2**22


class Kind(NamedTuple):
    """What the members of a stack have in common; ``apart`` is whatever else must agree."""

    shape: tuple[int, ...]
    layout: Layout
    dtype: torch.dtype
    device: torch.device
    pack_factors: bool
    state_dtype: torch.dtype | None
    apart: Any = None


class Member(NamedTuple):
    """A parameter of a stack: its position in its group, itself, and what this process has of it."""

    position: int
    parameter: Tensor
    held: Tensor


class StackedState:
    """The state of equal parameters, as it is kept: per key one tensor, (B, ..).

    Args:
        kind: What they have in common.
        members: The parameters.
        states: Their states in the optimizer, empty for a parameter that has none yet; what is there is copied, and
            replaced by views.
        group: Their parameter group.

    Raises:
        RuntimeError: The states were made for other shapes, or other ways of keeping them.
    """

    def __init__(
        self, kind: Kind, members: Sequence[Member], states: Sequence[dict[str, Any]], group: Mapping[str, Any]
    ) -> None:
        self.kind, self.members = kind, members
        fresh = new_state(members[0].held, kind.layout, kind.pack_factors, kind.state_dtype)
        for member, state in zip(members, states, strict=True):
            factors = {key for key in {**state, **fresh} if key.startswith("GG_")}
            for key in (state.keys() & fresh.keys()) | factors if "step" in state else ():
                got, wanted = (tuple(some[key].shape) if key in some else None for some in (state, fresh))
                if got != wanted:
                    raise RuntimeError(
                        f"The state of {name_of(group, member.position)} does not fit: state[{key!r}] must have shape "
                        f"{wanted}, got {got}, by what its shape, max_precond_dim, merge_dims, precondition_1d and "
                        "pack_factors now give; they cannot change after the first step"
                    )
        self.kept = {
            key: value.expand(len(members), *value.shape).clone(memory_format=torch.contiguous_format)
            for key, value in fresh.items()
        }
        self._views: list[tuple[dict[str, Any], list[tuple[str, Tensor, int]]]] = []
        for row, state in enumerate(states):
            views = [(key, stack[row]) for key, stack in self.kept.items()]
            for key, view in views:
                if key in state:
                    view.copy_(state[key])
                state[key] = view
            self._views.append((state, [(key, view, view.data_ptr()) for key, view in views]))

    def stands(self, states: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether the members' states are still those that were filled here, with views, and nobody else's tensors."""
        for member, (state, views) in zip(self.members, self._views, strict=True):
            if states.get(member.parameter) is not state:
                return False
            for key, view, pointer in views:
                if state.get(key) is not view or view.data_ptr() != pointer:
                    return False
        return True

    def runs(self, grads: Sequence[Tensor | None], group: Mapping[str, Any], schedule: Schedule) -> Iterator[Run]:
        """The members that have a gradient, cut where two neighbours differ in their steps or in having a basis."""
        steps = self.kept["step"].tolist()
        refreshed = self.kept["refresh_step"].tolist() if self.kind.layout.axes else steps
        start = 0
        for stop in range(1, len(grads) + 1):
            if grads[start] is None:
                start = stop
            elif (
                stop == len(grads)
                or grads[stop] is None
                or steps[stop] != steps[start]
                or (refreshed[stop] > 0) != (refreshed[start] > 0)
            ):
                step, based = int(steps[start]), bool(self.kind.layout.axes) and refreshed[start] > 0
                indices = [member.position for member in self.members[start:stop]]
                due = schedule.due(indices, self.kind.layout, step, based)
                yield Run(self, slice(start, stop), step, based, due, group)
                start = stop

    @contextmanager
    def opened(self, rows: slice, step: int, based: bool) -> Iterator[Stack]:
        """Some of the members' state to be worked on, and put back: expanded and rounded where it is kept smaller."""
        kind = self.kind
        shape, axes = (rows.stop - rows.start, *kind.layout.shape), kind.layout.axes
        kept = self.kept
        if shape[0] < len(self.members):
            kept = {key: stack[rows] for key, stack in kept.items()}
        M = kept["exp_avg"].view(shape).to(kind.dtype)
        V = kept["exp_avg_sq"].view(shape)
        K, Q = ({axis: kept[f"{name}_{axis}"] for axis in axes} for name in ("GG", "Q"))
        if kind.pack_factors:
            K = {axis: unpack(factor, kind.layout.shape[axis]) for axis, factor in K.items()}
        if kind.state_dtype is not None:
            Q = {axis: basis.to(kind.dtype) for axis, basis in Q.items()}
        nothing = kept["step"][:0]
        counters = (kept.get("refresh_step", nothing), kept.get("failed_refreshes", nothing))
        yield Stack(step, based, M, V, K, Q, *counters)
        if kind.state_dtype is not None:
            kept["exp_avg"].view(shape).copy_(M)
        for axis in axes:
            if kind.pack_factors:
                pack(K[axis], out=kept[f"GG_{axis}"])
            if kind.state_dtype is not None:
                kept[f"Q_{axis}"].copy_(Q[axis])
        kept["step"].fill_(step + 1)


class Run(NamedTuple):
    """Neighbours in a stack, its ``rows``, that have done as many steps, have bases or not, and have a gradient."""

    stacked: StackedState
    rows: slice
    step: int
    based: bool
    due: Due
    group: Mapping[str, Any]

    @property
    def members(self) -> Sequence[Member]:
        """The parameters."""
        return self.stacked.members[self.rows]

    def update(
        self,
        grads: Sequence[Tensor],
        skipped: list[Tensor],
        norms: Callable[[Tensor], Tensor] = norms,
        regularized: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Moves the state by one gradient, except of those whose gradient cannot be used.

        Args:
            grads: One for each member, shaped like what is held of it; only read.
            skipped: Where only the device knows, gets whether each gradient was skipped, (B,).
            norms: The Euclidean norm of every whole tensor of a stack, (B,).
            regularized: Whether an "l2" penalty is part of the gradients already.

        Returns:
            What is to be subtracted times the learning rate, (B, d_1, .., d_N); and the (B,) that take part, None: all.
        """
        group, kind = self.group, self.stacked.kind
        grad = self._join(grads)
        if group["maximize"]:
            grad = -grad
        if group["weight_decay_method"] == "l2" and not regularized:
            grad = WeightDecayMixin.regularized_grad(grad, self._join([m.held for m in self.members]), group)
        finite = None
        if group["nonfinite"] == "skip":
            finite = is_usable(norms(grad), group["state_dtype"])
            if kind.device.type == "cpu" and bool(finite.all()):
                finite = None
        if finite is not None:
            self._count_skipped(grad, finite, skipped)
            grad = where_stacked(finite, grad, torch.zeros_like(grad))
        entries = sqrt(max(self.members[0].parameter.numel(), 1))
        with self.stacked.opened(self.rows, self.step, self.based) as s:
            return soap_step(s, grad, group, self.due, finite, lambda stack: norms(stack) / entries), finite

    def move(self, update: Tensor, finite: Tensor | None) -> None:
        """Decays the weights and subtracts the update."""
        moves = None if finite is None else finite.to(update.dtype)
        move_weights([member.held for member in self.members], update, moves, self.group)

    def _join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like the members as a stack in working shape and dtype; not to be written to."""
        stack = tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
        return stack.reshape(len(tensors), *self.stacked.kind.layout.shape).to(self.stacked.kind.dtype)

    def _count_skipped(self, grad: Tensor, finite: Tensor, skipped: list[Tensor]) -> None:
        self.stacked.kept["skipped_steps"][self.rows] += ~finite
        if grad.device.type != "cpu":
            skipped.append(~finite)
            return
        for member, one, usable in zip(self.members, grad, finite.tolist(), strict=True):
            if not usable:
                shard = member.held is not member.parameter
                report_skipped_gradient(name_of(self.group, member.position), one, shard)


def is_usable(norms: Tensor, state_dtype: torch.dtype | None) -> Tensor:
    """Whether gradients with these norms are finite and so are the sums of their squares: boolean, like ``norms``.

    An entry that overflows when squared would set its second moment to Inf and freeze its weight for good. So would a
    float64 gradient a first moment that is kept in ``state_dtype``, if it overflowed that; half of its range leaves
    room for the rounding of a basis.
    """
    limit = torch.finfo(norms.dtype).max ** 0.5
    if state_dtype is not None:
        limit = min(limit, torch.finfo(state_dtype).max / 2)
    usable: Tensor = norms < limit  # false for NaN too
    return usable


def move_weights(weights: list[Tensor], update: Tensor, moves: Tensor | None, group: Mapping[str, Any]) -> None:
    """``W <- W - lr U`` after the decay of ``W``, in place, for B weights of one shape; 16-bit ones are rounded once.

    ``U``, (B, ..), is in the working dtype, and so is ``moves``, (B,): 1, or 0 where a weight is to stay and its ``U``
    is zero; None: all move.
    """
    working = [weight.to(update.dtype) for weight in weights]
    WeightDecayMixin.decay_weights_(working, group, moves)
    lr = scalar_lr(group["lr"], update)
    if isinstance(lr, Tensor):
        update, lr = update * lr, 1.0
    torch._foreach_sub_(working, list(update.reshape(len(weights), *weights[0].shape).unbind()), alpha=lr)
    for weight, moved in zip(weights, working, strict=True):
        if moved is not weight:
            weight.copy_(moved)


def first_unusable_gradient(group: Mapping[str, Any]) -> int | None:
    """The index in the group of the first parameter whose gradient is not finite or overflows."""
    for index, parameter in enumerate(group["params"]):
        if parameter.grad is not None:
            norm = torch.linalg.vector_norm(parameter.grad.to(working_dtype(parameter)))
            if not bool(is_usable(norm, group["state_dtype"])):
                return index
    return None


def stacks_of(
    group: Mapping[str, Any], states: dict[Tensor, dict[str, Any]], former: list[StackedState]
) -> list[StackedState]:
    """The stacks of a group's parameters that have a gradient or have had one; see :func:`form_stacks`."""
    kinds: dict[Kind, list[Member]] = {}
    for index, parameter in enumerate(group["params"]):
        if parameter.grad is not None or "step" in states.get(parameter, ()):
            kinds.setdefault(kind_of(parameter, parameter, group), []).append(Member(index, parameter, parameter))
    return form_stacks(group, list(chunks(kinds)), states, former)


def kind_of(parameter: Tensor, held: Tensor, group: Mapping[str, Any], apart: Hashable = None) -> Kind:
    """The kind of stack that a parameter belongs to, of which this process has ``held``."""
    layout = layout_of(parameter.shape, group["max_precond_dim"], group["precondition_1d"], group["merge_dims"])
    if not layout.axes:
        layout = Layout(held.shape, ())
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return Kind(parameter.shape, layout, dtype, parameter.device, group["pack_factors"], group["state_dtype"], apart)


def chunks(kinds: Mapping[Kind, list[Member]]) -> Iterator[tuple[Kind, list[Member]]]:
    """Cuts members so that no state tensor of several has more than :data:`MOST_ELEMENTS`."""
    for kind, members in kinds.items():
        size = max(prod(kind.shape), *(kind.layout.shape[axis] ** 2 for axis in kind.layout.axes), 1)
        count = max(MOST_ELEMENTS // size, 1)
        for start in range(0, len(members), count):
            yield kind, members[start : start + count]


def form_stacks(
    group: Mapping[str, Any],
    found: Sequence[tuple[Kind, list[Member]]],
    states: dict[Tensor, dict[str, Any]],
    former: list[StackedState],
) -> list[StackedState]:
    """The stacks of a group with these kinds and members; a member without a state gets one.

    Of the ``former`` stacks those that still stand are used again, so that their state stays where it is. The list is
    emptied, so that a stack that does not stand is freed as its members move out.
    """
    standing = {(stack.kind, *(id(member.parameter) for member in stack.members)): stack for stack in former}
    kept = [standing.pop((kind, *(id(member.parameter) for member in members)), None) for kind, members in found]
    standing.clear()
    former.clear()
    for place, (kind, members) in enumerate(found):
        stack = kept[place]
        if stack is None or not stack.stands(states):
            stack = kept[place] = None
            kept[place] = StackedState(kind, members, [states[member.parameter] for member in members], group)
        else:
            stack.members = members
    return [stack for stack in kept if stack is not None]
