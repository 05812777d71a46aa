"""What the processes of a distributed test run: optimizers on parameters in every placement, fed known gradients."""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.distributed import collectives

Options = dict[str, Any]

#: Of matrices, a convolution, vectors, a scalar; rows that 2 and 4 processes cannot share evenly, fewer rows than
#: processes, several of one shape.
SHAPES = ((8, 6), (5, 7), (8, 6), (3, 4), (4, 3, 2, 2), (9,), (), (1, 5), (8, 6))
#: Roundings that sums in another order may come to: an eigenvector turns by one over its gap, a thousandth say.
MAGNIFIED = 1000
BASE: Options = {"lr": 0.01, "fp32_matmul_prec": "highest", "qr_fp32_matmul_prec": "highest"}


@dataclass(frozen=True)
class Case:
    """A training run on known gradients.

    Attributes:
        placement: A key of ``PLACEMENTS``.
        options: Of the optimizer.
        shapes: Of the parameters.
        groups: The indices of the parameters in each group, with its options; none: one group of all.
        missing: (step, index) at which there is no gradient.
        never: Parameters that never get one.
        spoilt: (step, index) at which the gradient has a NaN or so, and where: "first", "last", "all", "large".
        chunk: The most elements that a bucket may have.
        late: The parameters from this index on are added, as a group, before step 3.
        copied: Before this step the run moves to deep copies of the parameters and the optimizer.
        stagger_processes: For how many processes staggered refreshes are spread; 0: for those that there are.
    """

    placement: str = "one process"
    options: Options = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    groups: tuple[tuple[tuple[int, ...], Options], ...] = ()
    dtype: torch.dtype = torch.float64
    steps: int = 30
    missing: frozenset[tuple[int, int]] = frozenset()
    never: frozenset[int] = frozenset()
    spoilt: Mapping[tuple[int, int], str] = field(default_factory=dict)
    chunk: int | None = None
    late: int | None = None
    copied: int | None = None
    stagger_processes: int = 0
    seed: int = 0


def frequency(step: int) -> int:
    """A refresh frequency that grows."""
    return 2 if step < 6 else 4


def weights_of(case: Case) -> list[Tensor]:
    """The weights at the start."""
    generator = torch.Generator().manual_seed(case.seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype) for shape in case.shapes]


def gradient_of(case: Case, step: int, index: int) -> Tensor | None:
    """The gradient of a parameter: of full rank, with a preferred direction, different at every step."""
    if index in case.never or (step, index) in case.missing:
        return None
    generator = torch.Generator().manual_seed(10_000 * case.seed + 100 * step + index + 1)
    grad = torch.randn(case.shapes[index], generator=generator, dtype=torch.float64)
    if grad.dim():
        grad *= torch.linspace(0.2, 2.0, grad.shape[0], dtype=torch.float64).view(-1, *[1] * (grad.dim() - 1))
    kind = case.spoilt.get((step, index))
    if kind == "first":
        grad.view(-1)[0] = float("nan")
    elif kind == "last":
        grad.view(-1)[-1] = float("inf")
    elif kind == "all":
        grad.fill_(float("nan"))
    elif kind == "large":
        grad.view(-1)[-1] = 0.9 * torch.finfo(torch.float64).max ** 0.5  # two of them overflow together
        grad.view(-1)[0] = 0.9 * torch.finfo(torch.float64).max ** 0.5
    return grad.to(case.dtype)


class Placing:
    """Where parameters and gradients go.

    Args:
        process_group: The optimizer's argument.
        mesh: The mesh of the DTensors.
        placements: From a parameter's index and whole tensor to its placements; None leaves it plain.
    """

    def __init__(
        self,
        process_group: Any = None,
        mesh: Any = None,
        placements: Callable[[int, Tensor], Sequence[Placement] | None] = lambda index, tensor: None,
    ) -> None:
        self.process_group, self.mesh, self._placements = process_group, mesh, placements

    def place(self, index: int, tensor: Tensor) -> Tensor:
        """The tensor as this process is to have it. No communication."""
        placements = self._placements(index, tensor)
        if placements is None:
            return tensor.clone()
        return distribute_tensor(tensor.clone(), self.mesh, placements, src_data_rank=None)


def _shard(dim: int, tensor: Tensor) -> Placement:
    """A shard along an axis, the first if there is no such; a scalar is replicated."""
    if tensor.dim() == 0:
        return Replicate()
    return Shard(dim if tensor.dim() > dim else 0)


def _one_mesh(*sizes: int) -> Any:
    return init_device_mesh("cpu", sizes, mesh_dim_names=tuple(f"d{dim}" for dim in range(len(sizes))))


def _grid(first: int, placements: Callable[[Tensor], Sequence[Placement]]) -> Placing:
    mesh = _one_mesh(first, dist.get_world_size() // first)
    return Placing(None, mesh, lambda index, tensor: placements(tensor))


def _line(placements: Callable[[int, Tensor], Placement]) -> Placing:
    return Placing(None, _one_mesh(dist.get_world_size()), lambda index, tensor: [placements(index, tensor)])


def _sub_group() -> Placing | None:
    group = dist.new_group([1, 3])
    return Placing(group) if dist.get_rank() in (1, 3) else None


def _mixed(index: int, tensor: Tensor) -> Placement:
    return (_shard(0, tensor), _shard(1, tensor), Replicate())[index % 3]


def _half() -> Placing:
    mesh = _one_mesh(dist.get_world_size())
    return Placing(dist.group.WORLD, mesh, lambda index, tensor: None if index % 2 else [_shard(0, tensor)])


#: Number of processes, and how they hold parameters. None of a process that takes no part.
PLACEMENTS: dict[str, tuple[int, Callable[[], Placing | None]]] = {
    "one process": (1, Placing),
    "group of one": (1, lambda: Placing(dist.group.WORLD)),
    "mesh of one": (1, lambda: _line(lambda index, tensor: _shard(0, tensor))),
    "ddp of 2": (2, lambda: Placing(dist.group.WORLD)),
    "ddp of 4": (4, lambda: Placing(dist.group.WORLD)),
    "ddp mesh": (2, lambda: Placing(_one_mesh(2))),
    "ddp sub-group": (4, _sub_group),
    "ddp sub-mesh": (4, lambda: Placing(_one_mesh(2, 2)["d0"])),
    "shard 0 of 2": (2, lambda: _line(lambda index, tensor: _shard(0, tensor))),
    "shard 0 of 4": (4, lambda: _line(lambda index, tensor: _shard(0, tensor))),
    "shard 1": (2, lambda: _line(lambda index, tensor: _shard(1, tensor))),
    "replicate": (2, lambda: _line(lambda index, tensor: Replicate())),
    "tensor parallel": (2, lambda: _line(_mixed)),
    "shard sub-mesh": (4, lambda: Placing(None, _one_mesh(2, 2)["d1"], lambda index, tensor: [_shard(0, tensor)])),
    "hsdp": (4, lambda: _grid(2, lambda tensor: [Replicate(), _shard(0, tensor)])),
    "hsdp, replicas last": (4, lambda: _grid(2, lambda tensor: [_shard(0, tensor), Replicate()])),
    "hsdp of one column": (2, lambda: _grid(2, lambda tensor: [Replicate(), _shard(0, tensor)])),
    "hsdp of one row": (2, lambda: _grid(1, lambda tensor: [Replicate(), _shard(0, tensor)])),
    "rows and columns": (4, lambda: _grid(2, lambda tensor: [_shard(0, tensor), _shard(1, tensor)])),
    "columns and rows": (4, lambda: _grid(2, lambda tensor: [_shard(1, tensor), _shard(0, tensor)])),
    "rows twice": (4, lambda: _grid(2, lambda tensor: [_shard(0, tensor), _shard(0, tensor)])),
    "replicas twice": (4, lambda: _grid(2, lambda tensor: [Replicate(), Replicate()])),
    "plain and shards": (2, _half),
}


def whole(tensor: Tensor) -> Tensor:
    """A plain copy of all of a tensor. A collective where it is in pieces."""
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()


@contextlib.contextmanager
def patched(case: Case) -> Iterator[None]:
    """What the case changes in the library."""
    with contextlib.ExitStack() as stack:
        if case.chunk is not None:
            for module in ("stacks", "distributed.rounds", "distributed.state_dicts"):
                stack.enter_context(mock.patch(f"emerging_optimizers.soap.{module}.MOST_ELEMENTS", case.chunk))
        yield


def optimizer_for(case: Case, parameters: Sequence[Tensor], process_group: Any = None) -> SOAP:
    """The optimizer, with the case's groups."""
    params: Any = list(parameters)
    if case.groups:
        params = [{"params": [parameters[index] for index in indices], **options} for indices, options in case.groups]
    optimizer = SOAP(params, **{**BASE, **case.options}, process_group=process_group)
    if case.stagger_processes:
        for group in optimizer.param_groups:
            group["stagger_processes"] = case.stagger_processes
    return optimizer


def set_gradients(case: Case, parameters: Sequence[Tensor], placing: Placing, step: int) -> None:
    """Gives every parameter its gradient."""
    for index, parameter in enumerate(parameters):
        grad = gradient_of(case, step, index)
        parameter.grad = None if grad is None else placing.place(index, grad)


def train(case: Case, record: Sequence[int] = ()) -> dict[str, Any] | None:
    """Runs a case in this process, alone or with the others of the default group.

    Args:
        case: The case.
        record: After which steps the weights are recorded, besides the last.

    Returns:
        "weights": the whole parameters at the end, "records": earlier ones, "state": the whole state per parameter,
        "errors": step and message of each step that raised. None from a process that takes no part.
    """
    placing = PLACEMENTS[case.placement][1]()
    if placing is None:
        return None
    with patched(case):
        parameters = [nn.Parameter(placing.place(i, weight)) for i, weight in enumerate(weights_of(case))]
        optimizer = optimizer_for(case, parameters[: case.late], placing.process_group)
        records, errors = [], []
        for step in range(case.steps):
            if case.late is not None and step == 3:
                optimizer.add_param_group({"params": parameters[case.late :]})
            if step == case.copied:
                optimizer = copy.deepcopy(optimizer)
                parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            set_gradients(case, parameters, placing, step)
            try:
                optimizer.step()
            except RuntimeError as error:
                if case.options.get("nonfinite") != "raise":
                    raise
                errors.append((step, str(error)))
            if step in record:
                records.append([whole(parameter) for parameter in parameters])
        return {
            "weights": [whole(parameter) for parameter in parameters],
            "records": records,
            "errors": errors,
            "state": whole_state(optimizer),
        }


def train_all(cases: Sequence[Case]) -> list[dict[str, Any] | str | None]:
    """What each case comes to in this process, up to an error, which is told: the others would wait for this one."""
    found: list[dict[str, Any] | str | None] = []
    for case in cases:
        try:
            found.append(train(case))
        except Exception:  # noqa: BLE001
            return [*found, traceback.format_exc()]
    return found


def whole_state(optimizer: SOAP) -> dict[int, dict[str, Tensor]]:
    """The whole state of every parameter that has one, by its number. A collective."""
    saved = optimizer.state_dict()["state"]
    return {number: {key: whole(value) for key, value in saved[number].items()} for number in sorted(saved)}


def kept_elements(case: Case) -> dict[str, int]:
    """How many elements of state this process keeps after the case: of factors and bases, moments, vectors' moments."""
    placing = PLACEMENTS[case.placement][1]()
    assert placing is not None
    parameters = [nn.Parameter(placing.place(i, weight)) for i, weight in enumerate(weights_of(case))]
    optimizer = optimizer_for(case, parameters, placing.process_group)
    for step in range(case.steps):
        set_gradients(case, parameters, placing, step)
        optimizer.step()
    found = {"factors": 0, "matrices": 0, "vectors": 0}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if key[:2] in ("GG", "Q_"):
                found["factors"] += value.numel()
            elif key.startswith("exp_avg"):
                found["matrices" if parameter.dim() > 1 else "vectors"] += value.numel()
    return found


def traffic(case: Case) -> dict[str, Any]:
    """Bytes that this process sends in the last step, per kind of collective.

    Returns:
        "library": as ``collectives.sent`` counts; "torch": as counted where torch is called; "calls": how many;
        "owned": the elements of the matrices that this process works on.
    """
    placing = PLACEMENTS[case.placement][1]()
    assert placing is not None
    counts: Counter[str] = Counter()
    calls = 0

    def all_to_all(
        output: Tensor, source: Tensor, outputs: list[int], inputs: list[int], group: Any, **rest: Any
    ) -> Any:
        nonlocal calls
        calls += 1
        assert sum(inputs) == source.numel()
        away = [size for rank, size in enumerate(inputs) if rank != dist.get_rank(group)]
        counts["all_to_all"] += sum(away) * source.element_size()
        return real["all_to_all_single"](output, source, outputs, inputs, group=group, **rest)

    def broadcast(tensor: Tensor, src: int, **rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if dist.get_rank() == src:
            counts["broadcast"] += tensor.numel() * tensor.element_size()
        return real["broadcast"](tensor, src, **rest)

    def all_reduce(tensor: Tensor, **rest: Any) -> Any:
        counts["all_reduce"] += tensor.numel() * tensor.element_size()
        return real["all_reduce"](tensor, **rest)

    def other(name: str) -> Callable[..., Any]:
        def count(*args: Any, **rest: Any) -> Any:
            counts[name] += 1
            return real[name](*args, **rest)

        return count

    names = ("all_gather", "all_gather_into_tensor", "all_gather_object", "reduce_scatter_tensor", "send", "isend")
    wrappers: dict[str, Callable[..., Any]] = {name: other(name) for name in names}
    wrappers |= {"all_to_all_single": all_to_all, "broadcast": broadcast, "all_reduce": all_reduce}
    real = {name: getattr(dist, name) for name in wrappers}
    with patched(case), contextlib.ExitStack() as stack:
        for name, wrapper in wrappers.items():
            stack.enter_context(mock.patch.object(dist, name, wrapper))
        parameters = [nn.Parameter(placing.place(i, weight)) for i, weight in enumerate(weights_of(case))]
        optimizer = optimizer_for(case, parameters, placing.process_group)
        for step in range(case.steps):
            set_gradients(case, parameters, placing, step)
            counts.clear()
            collectives.sent.clear()
            calls = 0
            optimizer.step()
    if case.missing:
        counts.pop("all_gather_object", None)  # the processes compare which gradients there are when that changes
    owned = sum(p.numel() for p, state in optimizer.state.items() if state.get("Q_0", torch.empty(0)).numel())
    return {"library": dict(collectives.sent), "torch": dict(counts), "calls": calls, "owned": owned}
