"""What the processes of ``test_failures`` run: ranks that differ, ranks that die, wrong arguments."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import signal
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from emerging_optimizers.soap import SOAP
from tests.distributed.scenarios import PLACEMENTS, Case, optimizer_for, set_gradients, weights_of, whole, whole_state

SHAPES = ((4, 3), (5, 3), (7,))


def parameters_of(
    shapes: Any = SHAPES, sharded: bool = False, dtype: torch.dtype = torch.float32, requires_grad: bool = True
) -> list[nn.Parameter]:
    """Parameters with gradients, the same on every rank, on a mesh of all of them or plain."""
    generator = torch.Generator().manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if sharded else None
    found = []
    for shape in shapes:
        weight, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        if mesh is not None:
            weight, grad = (distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) for t in (weight, grad))
        parameter = nn.Parameter(weight, requires_grad)
        parameter.grad = grad
        found.append(parameter)
    return found


def optimizer_of(params: Any, sharded: bool = False, **options: Any) -> SOAP:
    """A SOAP for them."""
    return SOAP(params, **{"lr": 0.1, **options}, process_group=None if sharded else dist.group.WORLD)


def construct(sharded: bool, *per_rank: dict[str, Any]) -> None:
    """Constructs on each rank from arguments of :func:`parameters_of`, names and options of its own."""
    mine = {"names": None, "options": {}, **per_rank[dist.get_rank()]}
    names, options = mine.pop("names"), mine.pop("options")
    params = parameters_of(sharded=sharded, **mine)
    optimizer_of(params if names is None else list(zip(names, params, strict=True)), sharded, **options)


def add_other_groups(sharded: bool) -> None:
    """Adds a group that differs between ranks, and steps."""
    optimizer = optimizer_of(parameters_of(sharded=sharded), sharded)
    optimizer.step()
    optimizer.add_param_group({"params": parameters_of([((3, 3), (4, 4))[dist.get_rank()]], sharded)})
    optimizer.step()


def add_a_group_on_one_rank() -> None:
    """Rank 0 alone adds a group, and all step."""
    optimizer = optimizer_of(parameters_of())
    optimizer.step()
    if dist.get_rank() == 0:
        optimizer.add_param_group({"params": parameters_of([(3, 3)])})
    for _ in range(2):
        optimizer.step()


def lose_a_gradient(sharded: bool, at: int, index: int, options: dict[str, Any]) -> None:
    """From a step on, rank 1 has no gradient for a parameter."""
    parameters = parameters_of(sharded=sharded)
    optimizer = optimizer_of(parameters, sharded, **options)
    for step in range(at + 10):
        if step >= at and dist.get_rank() == 1:
            parameters[index].grad = None
        optimizer.step()


def train_until(case: Case, name: str, call: int, what: str) -> float:
    """Trains; rank 1 dies or hangs at a call of a collective.

    Args:
        case: The case.
        name: Of the function of ``torch.distributed``.
        call: Which call of it, from 0.
        what: "die before", "die after" it has been started, or "hang" before.
    """
    placing = PLACEMENTS[case.placement][1]()
    assert placing is not None
    parameters = [nn.Parameter(placing.place(i, weight)) for i, weight in enumerate(weights_of(case))]
    optimizer = optimizer_for(case, parameters, placing.process_group)
    real = getattr(dist, name)
    calls = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        fatal = calls == call + 1 and dist.get_rank() == 1
        if fatal and what == "hang":
            time.sleep(3600)
        if fatal and what == "die before":
            os.kill(os.getpid(), signal.SIGKILL)
        work = real(*args, **kwargs)
        if fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return work

    with mock.patch.object(dist, name, deadly):
        for step in range(case.steps):
            set_gradients(case, parameters, placing, step)
            optimizer.step()
    return calls


def raised_or_returned(function: Any) -> str:
    """What a call raised, as "Type: message"."""
    try:
        return f"returned {function()!r}"
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"


def wrong_groups() -> dict[str, str]:
    """What impossible process groups raise, by name. On 2 ranks."""
    plain = [nn.Parameter(torch.zeros(2, 2))]
    others = [dist.new_group([rank]) for rank in range(2)]
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    return {
        "text": raised_or_returned(lambda: SOAP(plain, 0.1, process_group="gloo")),
        "ranks": raised_or_returned(lambda: SOAP(plain, 0.1, process_group=[0, 1])),
        "mesh of two dimensions": raised_or_returned(lambda: SOAP(plain, 0.1, process_group=mesh)),
        "not a member": raised_or_returned(lambda: SOAP(plain, 0.1, process_group=others[1 - dist.get_rank()])),
        "not a member's number": raised_or_returned(
            lambda: SOAP(plain, 0.1, process_group=dist.GroupMember.NON_GROUP_MEMBER)
        ),
    }


def pickled() -> dict[str, str]:
    """What pickling raises."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "group": raised_or_returned(lambda: pickle.dumps(optimizer_of(parameters_of()))),
        "mesh": raised_or_returned(lambda: pickle.dumps(SOAP(parameters_of(), 0.1, process_group=mesh))),
    }


def load_files(folder: Path, sharded: bool) -> dict[str, str]:
    """What loading files of ``torch.save`` raises: one that rank 0 wrote, and the one that each rank wrote itself."""
    optimizer = optimizer_of(parameters_of(sharded=sharded), sharded)
    optimizer.step()
    mine = folder / f"rank {dist.get_rank()}.pt"
    torch.save(optimizer.state_dict(), mine)
    dist.barrier()
    raised = {"own": raised_or_returned(lambda: optimizer.load_state_dict(torch.load(mine, weights_only=True)))}
    if dist.get_rank() == 1:  # alone: rank 0 would wait for it
        first = torch.load(folder / "rank 0.pt", weights_only=True)
        raised["other"] = raised_or_returned(lambda: optimizer.load_state_dict(first))
    dist.barrier()
    return raised


def partial_parameter() -> str:
    """What a parameter raises whose summands are on several processes."""
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    return raised_or_returned(lambda: SOAP([parameter], 0.1))


def partial_gradient() -> list[Tensor]:
    """Weights after steps with gradients whose summands are on several processes, and with their sums."""
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for partial in (True, False):
        torch.manual_seed(0)
        weight = nn.Parameter(distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)], src_data_rank=None))
        whole_grad = torch.randn(4, 3)
        optimizer = SOAP([weight], 0.1)
        for _ in range(3):
            if partial:
                mine = whole_grad * (0.25, 0.75)[dist.get_rank()]
                weight.grad = DTensor.from_local(mine, mesh, [Partial()]).redistribute(mesh, [Replicate()])
            else:
                weight.grad = distribute_tensor(whole_grad, mesh, [Shard(0)], src_data_rank=None)
            optimizer.step()
        found.append(whole(weight))
    return found


def flattened() -> list[str]:
    """The warnings about parameters that FSDP1 has flattened."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("emerging_optimizers").addHandler(handler)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that FSDP1 is deprecated and has no accelerator here
        model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    SOAP(model.parameters(), lr=0.1)
    return records


def raise_on_nan(placement: str) -> list[dict[str, Any]]:
    """Weights and state before and after a step that raises for a NaN in one rank's piece, and what it raised."""
    case = Case(
        placement, {"nonfinite": "raise", "weight_decay": 0.5}, spoilt={(2, 8): "last", (3, 5): "last", (4, 1): "all"}
    )
    placing = PLACEMENTS[placement][1]()
    assert placing is not None
    parameters = [nn.Parameter(placing.place(i, weight)) for i, weight in enumerate(weights_of(case))]
    optimizer = optimizer_for(case, parameters, placing.process_group)
    found = []
    for step in range(6):
        set_gradients(case, parameters, placing, step)
        before = copy.deepcopy([[whole(p) for p in parameters], whole_state(optimizer)])
        said = raised_or_returned(optimizer.step)
        found.append(
            {"before": before, "said": said, "after": [[whole(p) for p in parameters], whole_state(optimizer)]}
        )
    return found


def train_experts(idle: int | None) -> list[list[Tensor]]:
    """A dense matrix on all 4 ranks, and an expert on each pair; one pair's is idle at a step: it gets no gradient.

    Returns:
        The dense matrix and this pair's expert, after each step.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("experts", "shards"))
    torch.manual_seed(0)
    grads = torch.randn(4, 2, 6, 5, dtype=torch.float64)
    placements = ([Replicate(), Shard(0)], [Shard(0)])
    meshes = (mesh, mesh["shards"])

    def place(which: int, tensor: Tensor) -> DTensor:
        return distribute_tensor(tensor.clone(), meshes[which], placements[which], src_data_rank=None)

    parameters = [nn.Parameter(place(which, torch.eye(6, 5, dtype=torch.float64))) for which in range(2)]
    optimizer = SOAP(parameters, lr=0.1)
    found = []
    for step in range(4):
        for which, parameter in enumerate(parameters):
            parameter.grad = place(which, grads[step, which])
        if step == idle and mesh.get_local_rank("experts") == 0:
            parameters[1].grad = None
        optimizer.step()
        found.append([whole(parameter) for parameter in parameters])
    return found


def raise_on_nan_of_one(sharded: bool) -> tuple[str, bool]:
    """What a step says to a NaN that rank 1 alone has seen, and whether the weights are as they were."""
    parameters = parameters_of(sharded=sharded)
    optimizer = optimizer_of(parameters, sharded, nonfinite="raise")
    optimizer.step()
    before = [whole(parameter) for parameter in parameters]
    if dist.get_rank() == 1:
        grad = parameters[1].grad
        (grad.to_local() if isinstance(grad, DTensor) else grad)[-1, -1] = float("nan")
    said = raised_or_returned(optimizer.step)
    return said, all(torch.equal(a, whole(b)) for a, b in zip(before, parameters, strict=True))
