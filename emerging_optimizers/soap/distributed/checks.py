"""Questions that processes must answer alike, or a collective would wait for ever or mix up tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from emerging_optimizers.soap.distributed.grid import Ownership, ProcessGrid, ProcessGrids, local_grad
from emerging_optimizers.soap.options import name_of
from emerging_optimizers.soap.stacks import is_usable
from emerging_optimizers.soap.state import working_dtype


def check_parameters(groups: Sequence[Mapping[str, Any]], grids: ProcessGrids) -> None:
    """Raises a RuntimeError, on every process, unless those of each grid have the same parameters and options."""
    parameters: dict[ProcessGrid, list[str]] = {}
    options: dict[ProcessGrid, list[str]] = {}
    for number, group in enumerate(groups):
        sharing = set()
        for index, parameter in enumerate(group["params"]):
            grid = grids.of(parameter)
            if grid is not None:
                sharing.add(grid)
                parameters.setdefault(grid, []).append(
                    f"{name_of(group, index)} in group {number}: shape {tuple(parameter.shape)}, {parameter.dtype}, "
                    f"requires_grad={parameter.requires_grad}"
                )
        for grid in sharing:
            options.setdefault(grid, []).extend(
                f"{name}={_plain(value)} in group {number}"
                for name, value in group.items()
                if name not in ("params", "param_names")
            )
    for grid, lines in parameters.items():
        require_same(grid, "parameters", lines)
        require_same(grid, "options", options[grid])


def _plain(value: Any) -> str:
    """An option as text, without reading a tensor, which may be on a GPU, or the address of a function."""
    if isinstance(value, Tensor):
        return "a Tensor"
    return "a callable" if callable(value) else repr(value)


def check_gradients_agree(
    groups: Sequence[Mapping[str, Any]], owned: Mapping[Tensor, Ownership], last: Mapping[ProcessGrid, str]
) -> Mapping[ProcessGrid, str]:
    """Raises a RuntimeError, on every process, unless those of each grid have gradients for the same parameters.

    ``last`` is what this returned at the last step: nobody is asked while nothing changes here.
    """
    if not owned:
        return last
    shared: dict[ProcessGrid, list[tuple[Mapping[str, Any], int, Tensor]]] = {}
    for group in groups:
        for index, parameter in enumerate(group["params"]):
            if parameter in owned:
                shared.setdefault(owned[parameter].grid, []).append((group, index, parameter))
    patterns = {
        grid: "".join("-" if parameter.grad is None else "x" for *_, parameter in members)
        for grid, members in shared.items()
    }
    for grid, members in shared.items():
        if patterns[grid] != last.get(grid):
            lines = [
                f"{name_of(group, index)} has {'no' if parameter.grad is None else 'a'} gradient"
                for group, index, parameter in members
            ]
            require_same(grid, "gradients", lines)
    return patterns


def require_same(grid: ProcessGrid, what: str, lines: Sequence[str]) -> None:
    """Raises a RuntimeError that names the first difference, on every process of a grid, unless lines are the same.

    Digests travel; lines only if those differ.
    """
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    digests: list[Any] = [None] * grid.size
    dist.all_gather_object(digests, digest, group=grid.group)
    if len(set(digests)) == 1:
        return
    texts: list[Any] = [None] * grid.size
    dist.all_gather_object(texts, list(lines), group=grid.group)
    ranks = dist.get_process_group_ranks(grid.group)
    other = next(number for number, text in enumerate(texts) if text != texts[0])
    theirs = texts[other]
    place = next(
        (i for i, (a, b) in enumerate(zip(texts[0], theirs, strict=False)) if a != b), min(len(texts[0]), len(theirs))
    )
    here, there = (text[place] if place < len(text) else "nothing more" for text in (texts[0], theirs))
    raise RuntimeError(
        f"The processes have different {what}: first difference at number {place}: rank {ranks[0]} has {here}; "
        f"rank {ranks[other]} has {there}"
    )


def first_unusable_gradient(group: Mapping[str, Any], owned: Mapping[Tensor, Ownership]) -> int | None:
    """The index in the group of the first gradient that is not finite or overflows, the same on all processes."""
    unusable: list[int] = []
    shared: dict[ProcessGrid, list[tuple[int, Tensor]]] = {}
    for index, parameter in enumerate(group["params"]):
        grad = local_grad(parameter)
        if grad is None:
            continue
        norm = torch.linalg.vector_norm(grad.to(working_dtype(parameter)))
        ownership = owned.get(parameter)
        if ownership is not None:
            shared.setdefault(ownership.grid, []).append((index, norm))
        elif not bool(is_usable(norm, group["state_dtype"])):
            unusable.append(index)
    for grid, norms in shared.items():
        squares = torch.stack([norm.double().square() for _, norm in norms])
        if grid.shard_group is not None:
            dist.all_reduce(squares, group=grid.shard_group)
        whole = [root.to(norm.dtype) for root, (_, norm) in zip(squares.sqrt(), norms, strict=True)]
        bad = torch.stack([~is_usable(norm, group["state_dtype"]) for norm in whole]).to(torch.int32)
        dist.all_reduce(bad, group=grid.group)
        unusable += [index for (index, _), count in zip(norms, bad.tolist(), strict=True) if count]
    return min(unusable, default=None)
