"""The driver: one step of parameters that several processes hold, and what a state dict has of them.

Each parameter with a Kronecker factor is worked on, and its state kept, by one process. The others have the same keys
of state, so that tools can go through them, with ``step`` and empty tensors. Parameters without a factor are stepped by
everyone who holds them, or a shard of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from emerging_optimizers.soap.distributed import checks
from emerging_optimizers.soap.distributed.grid import (
    Ownership,
    ProcessGrid,
    ProcessGrids,
    assign_owners,
    is_dtensor,
    local_grad,
    local_tensor,
)
from emerging_optimizers.soap.distributed.rounds import Group, Job, Round, Update, rounds_of
from emerging_optimizers.soap.distributed.state_dicts import share_states
from emerging_optimizers.soap.due import Schedule
from emerging_optimizers.soap.incidents import count_skips
from emerging_optimizers.soap.precision import fp32_matmul_precision, without_autocast
from emerging_optimizers.soap.stacks import Kind, Member, Run, StackedState, chunks, form_stacks, kind_of
from emerging_optimizers.soap.state import HOST_KEYS, meta_state
from emerging_optimizers.soap.step import norms

States = dict[Tensor, dict[str, Any]]


class SharedParameters:
    """What an optimizer does differently where several processes hold its parameters.

    Args:
        process_group: The processes that hold every plain tensor; see ``SOAP``.
    """

    def __init__(self, process_group: object) -> None:
        self._grids = ProcessGrids(process_group)
        self._owned: Mapping[Tensor, Ownership] = {}
        #: Who works on each parameter, by the options that are being loaded.
        self.loading: Mapping[Tensor, Ownership] = {}
        self._forget()

    def _forget(self) -> None:
        """Drops what is made from parameters and states."""
        #: Which parameters had a gradient when the processes last compared.
        self._gradient_patterns: Mapping[ProcessGrid, str] = {}
        self._stacks: list[list[StackedState]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedParameters:
        """The same processes, which are not copied, and the same owners for the copies of the parameters."""
        other = object.__new__(SharedParameters)
        other._grids, other.loading = self._grids, {}
        other._owned = {copy.deepcopy(parameter, memo): ownership for parameter, ownership in self._owned.items()}
        other._forget()
        return other

    def __reduce__(self) -> Any:
        self._grids.__reduce__()  # raises where there is a group
        return SharedParameters, (None,)

    def check_parameters(self, groups: Sequence[Group]) -> None:
        """Raises unless all processes have the same parameters with the same options."""
        checks.check_parameters(groups, self._grids)

    def check_gradients(self, groups: Sequence[Group]) -> None:
        """Raises unless all processes have gradients for the same parameters."""
        self._gradient_patterns = checks.check_gradients_agree(groups, self._owned, self._gradient_patterns)

    def first_unusable_gradient(self, group: Group) -> int | None:
        """The index in the group of the first gradient that is not finite or overflows, the same on all processes."""
        return checks.first_unusable_gradient(group, self._owned)

    def place(self, groups: Sequence[Group]) -> None:
        """Gives every parameter an owner. Those that have one keep it."""
        parameters = (parameter for group in groups for parameter in group["params"])
        if any(p not in self._owned and self._grids.of(p) is not None for p in parameters):
            self._owned = assign_owners(groups, self._grids, self._owned)

    def workers(self, group: Group) -> int:
        """How many processes share the parameters of a group."""
        return max((self._owned[p].grid.size for p in group["params"] if p in self._owned), default=1)

    def prepare_loading(self, groups: Sequence[Group]) -> None:
        """Gives every parameter an owner by options that are about to be loaded, as a fresh optimizer would."""
        self.loading = assign_owners(groups, self._grids, {})

    def finish_loading(self) -> None:
        """The owners of :meth:`prepare_loading` are the owners."""
        self._owned = self.loading
        self._forget()

    def state_dict_hook(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Puts whole states, as DTensors, into a state dict. A collective."""
        groups = optimizer.param_groups
        numbers = {p: i for i, p in enumerate(p for group in groups for p in group["params"])}
        shared = share_states(groups, optimizer.state, self._owned)
        return {**state_dict, "state": {numbers[parameter]: state for parameter, state in shared.items()}}

    def step(self, groups: Sequence[Group], states: States) -> None:
        """Does one step. While a round is computed, the next gradients and the last updates are under way."""
        elsewhere, alone, rounds = self._form(groups, states)
        runs: dict[int, list[Run]] = {}
        for group, stacks in zip(groups, self._stacks, strict=True):
            schedule = Schedule(group)
            for stack in stacks:
                grads = [member.parameter.grad for member in stack.members]
                runs[id(stack)] = list(stack.runs(grads, group, schedule))
        skipped: list[Tensor] = []

        def updates(stack: StackedState, grads: Mapping[Tensor, Tensor], gathered: bool) -> Iterator[Update]:
            ownership = self._owned.get(stack.members[0].parameter)
            norms_of = norms if ownership is None or ownership.owner is not None else _norms_of_shards(ownership.grid)
            for run in runs[id(stack)]:
                with fp32_matmul_precision(run.group["fp32_matmul_prec"]), without_autocast(stack.kind.device.type):
                    present = [grads[member.parameter] for member in run.members]
                    yield run, *run.update(present, skipped, norms_of, regularized=gathered)

        # From here on something changes.
        if elsewhere:
            torch._foreach_add_(elsewhere, 1)
        if rounds:
            rounds[0].send_gradients()
        for stack in alone:
            local = ((member.parameter, local_grad(member.parameter)) for member in stack.members)
            for run, update, finite in updates(stack, {p: grad for p, grad in local if grad is not None}, False):
                run.move(update, finite)
        for number, this in enumerate(rounds):
            if number + 1 < len(rounds):
                rounds[number + 1].send_gradients()
            whole, gathered = this.gradients(), this.grid.shard_group is not None
            this.deliver([update for stack in this.stacks for update in updates(stack, whole, gathered)])
            if number >= 1:
                rounds[number - 1].finish()
            if number >= 2:
                rounds[number - 2].settle()
        for last in rounds[-1:]:
            last.finish()
        for last in rounds[-2:]:
            last.settle()
        count_skips(skipped)

    def _form(self, groups: Sequence[Group], states: States) -> tuple[list[Tensor], list[StackedState], list[Round]]:
        """The ``step`` of each parameter with a gradient elsewhere; the stacks that need no round; and the rounds."""
        former, self._stacks = self._stacks, []
        steps: list[Tensor] = []
        alone: list[StackedState] = []
        jobs: dict[ProcessGrid, list[list[Job]]] = {}
        own: dict[int, StackedState] = {}
        for number, group in enumerate(groups):
            kinds: dict[Kind, list[Member]] = {}
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None or "step" in states.get(parameter, ()):
                    kind, held = self._kind_and_held(parameter, group)
                    kinds.setdefault(kind, []).append(Member(index, parameter, held))
            here = []
            for kind, members in chunks(kinds):
                ownership = self._owned.get(members[0].parameter)
                if ownership is not None and ownership.owner is not None:
                    per_owner = jobs.setdefault(ownership.grid, [[] for _ in range(ownership.grid.size)])
                    per_owner[ownership.owner].append((group, kind, members))
                if ownership is None or ownership.is_local:
                    here.append((kind, members))
                else:
                    for _, parameter, _ in members:
                        step = _step_elsewhere(states[parameter], parameter, group)
                        steps += [step] if parameter.grad is not None else []
            stacks = form_stacks(group, here, states, former[number] if number < len(former) else [])
            self._stacks.append(stacks)
            for stack in stacks:
                parameter = stack.members[0].parameter
                if parameter in self._owned and self._owned[parameter].owner is not None:
                    own[id(parameter)] = stack
                else:
                    alone.append(stack)
        return steps, alone, [one for grid, per_owner in jobs.items() for one in rounds_of(grid, per_owner, own)]

    def _kind_and_held(self, parameter: Tensor, group: Group) -> tuple[Kind, Tensor]:
        """The kind of a parameter's stack, which also tells grid and owner; and what this process works on."""
        ownership = self._owned.get(parameter)
        if ownership is None:
            held = local_tensor(parameter)
            return kind_of(parameter, held, group), held
        grid, owner = ownership
        gathered = owner is not None and grid.shards > 1
        held = parameter if gathered else local_tensor(parameter)
        placements = tuple(parameter.placements) if is_dtensor(parameter) else ()  # type: ignore[attr-defined]
        return kind_of(parameter, held, group, (grid, owner, placements)), held


def _step_elsewhere(state: dict[str, Any], parameter: Tensor, group: Group) -> Tensor:
    """``step`` of a parameter that another process works on; its state is filled if it is empty."""
    if "step" not in state:
        for key, value in meta_state(parameter, group).items():
            device = "cpu" if key in HOST_KEYS else parameter.device
            shape = () if key == "step" else (0,)
            state[key] = torch.zeros(shape, dtype=value.dtype, device=device)
    step: Tensor = state["step"]
    return step


def _norms_of_shards(grid: ProcessGrid) -> Callable[[Tensor], Tensor]:
    """The norms of whole tensors, of which every process of a replica has a shard. A collective."""
    if grid.shard_group is None:
        return norms

    def whole(stack: Tensor) -> Tensor:
        squares = norms(stack).double().square()
        dist.all_reduce(squares, group=grid.shard_group)
        return squares.sqrt().to(stack.dtype)

    return whole
