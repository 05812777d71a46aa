"""What the processes of the checkpoint tests do: train, save, load what others have saved, and go on.

A set of processes goes through several scenarios, since the first DTensor and the first checkpoint of a process take
longer than all the rest. Checkpoints go to folders that the sets share.
"""

from __future__ import annotations

import hashlib
import logging
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from emerging_optimizers.schedules import LinearFrequency
from emerging_optimizers.soap import SOAP
from tests.differences import differences

Values = dict[str, Tensor]
Outcome = dict[str, Any]

STEPS = 12
LR = 1e-2
CUTS = (3, 7)
#: The timeout of a group in which the processes are meant to lose each other, in seconds.
SHORT = 3

#: Options, parameters and dtype of each block of the model; a block is a parameter group.
BLOCKS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], torch.dtype]] = {
    "plain": ({"precondition_frequency": 4}, {"matrix": (7, 5), "other": (7, 5), "bias": (7,)}, torch.float32),
    "warm-up": ({"adam_warmup_steps": 5, "precondition_frequency": 3}, {"matrix": (6, 4)}, torch.float32),
    "staggered": (
        {"stagger_updates": True, "precondition_frequency": 5},
        {"matrix": (8, 3), "other": (4, 6), "third": (8, 3)},
        torch.float32,
    ),
    "kl": (
        {"use_kl_shampoo": True, "precondition_1d": True, "precondition_frequency": 3},
        {"matrix": (5, 6), "bias": (5,), "tiny": (1, 3)},
        torch.float32,
    ),
    "eigh": (
        {"use_eigh": True, "second_moment_refresh": "kronecker", "weight_decay_method": "l2", "use_nesterov": True},
        {"matrix": (3, 4)},
        torch.float32,
    ),
    "schedule": ({"precondition_frequency": LinearFrequency(1, 4, 10)}, {"matrix": (4, 4)}, torch.float32),
    "conv": ({"merge_dims": True, "precondition_frequency": 4}, {"kernel": (6, 3, 2, 2)}, torch.float32),
    "cube": ({"max_precond_dim": 4, "precondition_frequency": 4}, {"kernel": (6, 3, 2, 2)}, torch.float32),
    "packed": ({"pack_factors": True, "precondition_frequency": 4}, {"matrix": (6, 5)}, torch.float32),
    "halved": ({"state_dtype": torch.bfloat16, "precondition_frequency": 4}, {"matrix": (6, 5)}, torch.float32),
    "bf16": ({"precondition_frequency": 4}, {"matrix": (6, 5), "bias": (6,)}, torch.bfloat16),
    "f64": ({"precondition_frequency": 4}, {"matrix": (5, 7), "bias": (5,)}, torch.float64),
    "routed": ({"max_precond_dim": 0, "lr": 3e-3}, {"embedding": (11, 4), "bias": (3,)}, torch.float32),
    "skipped": ({"precondition_frequency": 4}, {"matrix": (6, 5), "bias": (3,)}, torch.float32),
    "late": ({"precondition_frequency": 2, "max_precond_dim": 4}, {"matrix": (4, 3), "routed": (9, 5)}, torch.float32),
    "never": ({}, {"matrix": (4, 3)}, torch.float32),
}
FIRST_OF_LATE = max(CUTS) + 1


def full_gradient(name: str, shape: tuple[int, ...], dtype: torch.dtype, step: int) -> Tensor | None:
    """The gradient of a parameter in a step, which follows from their names alone."""
    block = name.split(".")[0]
    if block == "never" or (block == "late" and step < FIRST_OF_LATE) or (name == "plain.other" and step % 5 == 4):
        return None
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    if block == "skipped" and step in (2, 9):
        grad.view(-1)[-1] = torch.nan
    return grad.to(dtype)


def new_model(seed: int, names: Iterable[str]) -> nn.Module:
    """Some of the blocks, with weights that follow from the seed."""
    generator = torch.Generator().manual_seed(seed)
    blocks = {}
    for block in names:
        _, shapes, dtype = BLOCKS[block]
        weights = {
            name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
            for name, shape in shapes.items()
        }
        blocks[block] = nn.ParameterDict(weights)
    return nn.ModuleDict(blocks)


def place(model: nn.Module, placement: str) -> dict[str, Any]:
    """Distributes a model over the processes, and returns the arguments that SOAP needs for it."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if placement == "single":
        return {}
    if placement == "ddp":
        return {"process_group": dist.group.WORLD}
    if placement == "ddp, mesh":
        return {"process_group": init_device_mesh("cpu", (world,))}
    if placement == "tp":
        mesh = init_device_mesh("cpu", (world,))
        for module in list(model.modules()):
            for name, weight in list(module.named_parameters(recurse=False)):
                cut = Shard(1) if weight.dim() > 1 else Replicate()
                module.register_parameter(name, nn.Parameter(distribute_tensor(weight.data, mesh, [cut])))
        return {}
    if placement == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    else:
        assert placement == "fsdp"
        mesh = init_device_mesh("cpu", (world,))
    for block in model.children():
        fully_shard(block, mesh=mesh)
    return {}


class Run:
    """A training on made-up gradients, the same under every placement.

    Args:
        placement: How the parameters are held.
        seed: Of the weights; those of a resumed run differ, so that loading has to replace them.
        blocks: The names of the model's blocks.
    """

    def __init__(self, placement: str, seed: int = 0, blocks: Iterable[str] = BLOCKS) -> None:
        self.model = new_model(seed, blocks)
        arguments = place(self.model, placement)
        groups = [
            {"params": list(block.parameters()), **BLOCKS[name][0]} for name, block in self.model.named_children()
        ]
        self.optimizer = SOAP(groups, lr=LR, **arguments)
        self.done = 0

    def step(self, until: int) -> None:
        """Trains until that many steps are done."""
        for step in range(self.done + 1, until + 1):
            for name, weight in self.model.named_parameters():
                grad = full_gradient(name, tuple(weight.shape), weight.dtype, step)
                if grad is not None and isinstance(weight, DTensor):
                    grad = distribute_tensor(grad, weight.device_mesh, weight.placements, src_data_rank=None)
                weight.grad = grad
            self.optimizer.step()
        self.done = until

    def weights(self) -> Values:
        """The weights, whole."""
        return {name: whole(weight.detach()) for name, weight in self.model.named_parameters()}

    def state(self) -> Values:
        """The optimizer's state, whole, by the parameter's name and the key."""
        names = [name for name, _ in self.model.named_parameters()]  # block by block, as in the groups
        saved = self.optimizer.state_dict()["state"]
        return {
            f"{names[number]}.{key}": whole(value)
            for number in sorted(saved)
            for key, value in sorted(saved[number].items())
        }

    def end(self) -> Outcome:
        """What there is when all steps are done."""
        self.step(STEPS)
        return {"weights": self.weights(), "state": self.state()}


def whole(value: Tensor) -> Tensor:
    """A copy of a tensor, whole."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def seen(optimizer: torch.optim.Optimizer) -> list[Any]:
    """A copy of what this process has of an optimizer's options and state."""
    return [
        ({**group, "params": None}, [{key: local(value).clone() for key, value in state.items()} for state in states])
        for group in optimizer.param_groups
        for states in [[optimizer.state.get(p, {}) for p in group["params"]]]
    ]


def local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def digest(values: Mapping[str, Tensor]) -> str:
    """Tells whether processes have the same."""
    text = hashlib.sha256()
    for name, value in sorted(values.items()):
        text.update(name.encode())
        text.update(bytes(value.contiguous().reshape(-1).view(torch.uint8).tolist()))
    return text.hexdigest()


# -- Saving and loading with torch's own tools ------------------------------------------------------------------------


def save(run: Run, path: Path) -> None:
    model, optim = get_state_dict(run.model, run.optimizer)
    dcp.save({"model": model, "optim": optim}, checkpoint_id=path, no_dist=not dist.is_initialized())


def load(path: Path, placement: str, done: int) -> Run:
    """A run that goes on from a checkpoint.

    Parameters that never had a gradient have no saved state, which torch wants to be told: ``strict=False``.
    """
    run = Run(placement, seed=5)
    options = StateDictOptions(strict=False)
    model, optim = get_state_dict(run.model, run.optimizer, options=options)
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for name in list(optim["state"]):
        if f"optim.state.{name}.step" not in saved:
            del optim["state"][name]
    dcp.load({"model": model, "optim": optim}, checkpoint_id=path, no_dist=not dist.is_initialized())
    set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optim, options=options)
    run.done = done
    return run


# -- Scenarios --------------------------------------------------------------------------------------------------------


def save_and_go_on(placement: str, folder: Path, cuts: tuple[int, ...] = CUTS) -> Outcome:
    run = Run(placement)
    for cut in cuts:
        run.step(cut)
        save(run, folder / f"{placement}-{world_size()}-{cut}")
    return run.end()


def resume(source: str, cut: int, placement: str, folder: Path) -> Outcome:
    return load(folder / f"{source}-{cut}", placement, cut).end()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def uninterrupted(placement: str, _: Path) -> Outcome:
    return Run(placement).end()


def load_own_in_place(placement: str, _: Path) -> Outcome:
    """Loads what was just saved, by torch's tools or not, again and again; also before the first step."""
    run = Run(placement)
    empty = run.optimizer.state_dict()
    assert empty["state"] == {}
    run.optimizer.load_state_dict(empty)
    for cut in CUTS:
        run.step(cut)
        run.optimizer.load_state_dict(run.optimizer.state_dict())
        set_optimizer_state_dict(
            run.model,
            run.optimizer,
            get_optimizer_state_dict(run.model, run.optimizer),
            options=StateDictOptions(strict=False),
        )
    return run.end()


def keep_and_go_on(placement: str, _: Path) -> Outcome:
    """Keeps a state dict in memory, not a copy of it, and goes on."""
    run = Run(placement)
    run.step(CUTS[0])
    kept = run.optimizer.state_dict()
    shares = {(n, k): local(v).clone() for n, state in kept["state"].items() for k, v in state.items()}
    run.step(CUTS[0] + 1)
    moved = [
        f"{n}.{k}" for n, s in kept["state"].items() for k, v in s.items() if not torch.equal(local(v), shares[n, k])
    ]
    return {"moved": moved, "size": len(shares)}


def save_asynchronously(placement: str, folder: Path) -> Outcome:
    run = Run(placement)
    run.step(CUTS[1])
    at_cut = run.state()
    model, optim = get_state_dict(run.model, run.optimizer)
    path = folder / f"async-{placement}"
    # A group of its own: the saving thread's messages must not meet the steps'.
    future = dcp.async_save({"model": model, "optim": optim}, checkpoint_id=path, process_group=dist.new_group())
    run.step(STEPS)
    future.result()  # before whole tensors are asked for: torch's functional collectives are not for two threads
    again = load(path, placement, CUTS[1])
    return {"at cut": at_cut, "loaded": again.state(), "end": run.end(), "resumed": again.end()}


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)


def save_full(placement: str, folder: Path) -> Outcome:
    """Everything on one process, in one file."""
    run = Run(placement)
    run.step(CUTS[1])
    at_cut = run.state()
    model = get_model_state_dict(run.model, options=FULL)
    optim = get_optimizer_state_dict(run.model, run.optimizer, options=FULL)
    gathered = {f"{n}.{k}": v for n, state in optim.get("state", {}).items() for k, v in state.items()}
    if world_size() == 1 or dist.get_rank() == 0:
        torch.save({"model": model, "optim": optim}, folder / f"full-{placement}-{world_size()}.pt")
    return {"at cut": at_cut, "gathered": gathered, "end": run.end()}


def load_full(source: str, placement: str, folder: Path) -> Outcome:
    """A file with everything: every process has read it."""
    saved = torch.load(folder / f"full-{source}.pt", weights_only=True)
    options = StateDictOptions(full_state_dict=dist.is_initialized(), strict=False)
    return _set(saved, placement, options)


def load_full_from_rank_0(source: str, placement: str, folder: Path) -> Outcome:
    """A file with everything: one process has read it and tells the others."""
    saved: dict[str, Any] = {"model": {}, "optim": {"state": {}, "param_groups": []}}
    if dist.get_rank() == 0:
        saved = torch.load(folder / f"full-{source}.pt", weights_only=True)
    return _set(saved, placement, FROM_RANK_0)


def _set(saved: dict[str, Any], placement: str, options: StateDictOptions) -> Outcome:
    run = Run(placement, seed=5)
    set_model_state_dict(run.model, saved["model"], options=StateDictOptions(**{**vars(options), "strict": True}))
    set_optimizer_state_dict(run.model, run.optimizer, saved["optim"], options=options)
    run.done = CUTS[1]
    loaded = run.state()
    return {"loaded": loaded, **run.end()}


def load_plain(source: str, placement: str, folder: Path) -> Outcome:
    """A file with everything, given to ``load_state_dict`` itself, whose parameters have numbers, not names."""
    run = Run(placement, seed=5)
    saved = torch.load(folder / f"full-{source}.pt", weights_only=True)
    set_model_state_dict(run.model, saved["model"], options=StateDictOptions(full_state_dict=dist.is_initialized()))
    run.optimizer.load_state_dict(saved["optim"])
    run.done = CUTS[1]
    return run.end()


def with_key(state_dict: dict[str, Any], key: str) -> dict[str, Any]:
    """The last parameter's state that has a key."""
    return next(state for state in reversed(state_dict["state"].values()) if key in state)


def refuse(placement: str, _: Path) -> Outcome:
    """State dicts that do not fit: what each raises, and what it leaves behind."""

    def shards() -> Tensor:
        return distribute_tensor(torch.zeros(13, 13), init_device_mesh("cpu", (world_size(),)), [Shard(0)])

    attempts: dict[str, Callable[[dict[str, Any]], Any]] = {
        "wrong shape": lambda saved: with_key(saved, "GG_1").update(GG_1=torch.zeros(13, 13)),
        "wrong shape, distributed": lambda saved: with_key(saved, "Q_1").update(Q_1=shards()),
        "wrong shape of a moment": lambda saved: with_key(saved, "exp_avg_sq").update(exp_avg_sq=shards()),
        "missing factor": lambda saved: with_key(saved, "Q_0").pop("Q_0"),
        "missing moment": lambda saved: with_key(saved, "exp_avg").pop("exp_avg"),
        "unknown": lambda saved: with_key(saved, "Q_0").update(GG_7=torch.zeros(2, 2)),
        "negative counter": lambda saved: with_key(saved, "refresh_step")["refresh_step"].fill_(-1),
        "fewer groups": lambda saved: saved["param_groups"].pop(),
    }
    run = Run(placement)
    run.step(CUTS[1])
    raised = {}
    for name, spoil in attempts.items():
        saved = run.optimizer.state_dict()
        spoil(saved)
        before = seen(run.optimizer)
        try:
            run.optimizer.load_state_dict(saved)
            raised[name] = "nothing"
        except Exception as error:
            raised[name] = f"{type(error).__name__}: {error}"
        if differences(before, seen(run.optimizer)):
            raised[name] += " (and something has changed)"
    return {"raised": raised, **run.end()}


def owned(optimizer: SOAP, model: nn.Module) -> set[str]:
    """The parameters that this process works on: it alone has their factors."""
    states = {name: optimizer.state.get(weight, {}) for name, weight in model.named_parameters()}
    return {name for name, state in states.items() if "GG_0" in state and state["GG_0"].numel()}


def other_owners(placement: str, _: Path) -> Outcome:
    """Groups that came in another order and at other times, so that the matrices have other owners."""
    run = Run(placement)
    run.step(CUTS[1])
    optim = get_optimizer_state_dict(run.model, run.optimizer)
    model = get_model_state_dict(run.model)
    other = Run(placement, seed=5)
    reordered = list(reversed(other.optimizer.param_groups))
    arguments = {} if placement != "ddp" else {"process_group": dist.group.WORLD}
    optimizer = SOAP(reordered[:3], lr=LR, **arguments)
    for group in reordered[:3]:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    for group in reordered[3:]:
        optimizer.add_param_group(group)
    optimizer.state_dict()  # places the new ones beside the old
    set_model_state_dict(other.model, model)
    set_optimizer_state_dict(other.model, optimizer, optim, options=StateDictOptions(strict=False))
    other.optimizer, other.done = optimizer, CUTS[1]
    moved = len(owned(run.optimizer, run.model) ^ owned(optimizer, other.model))
    other.step(STEPS)
    return {"moved": moved, "weights": other.weights(), "end": run.end()}


def other_owners_save(placement: str, _: Path) -> Outcome:
    """Groups that were added between steps: what is saved there loads where all were there from the beginning."""
    arguments = {} if placement != "ddp" else {"process_group": dist.group.WORLD}
    run = Run(placement)
    groups = list(run.optimizer.param_groups)
    grown = SOAP(groups[:1], lr=LR, **arguments)
    grown.state_dict()
    for group in groups[1:]:
        grown.add_param_group(group)
        grown.state_dict()  # those that have a place keep it
    run.optimizer = grown
    run.step(CUTS[1])
    run.optimizer.state_dict()
    other = Run(placement, seed=5)
    set_model_state_dict(other.model, get_model_state_dict(run.model))
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    other.done = CUTS[1]
    moved = len(owned(grown, run.model) ^ owned(other.optimizer, other.model))
    return {"moved": moved, "weights": other.end()["weights"], "end": run.end()}


WIDE = (512, 384)


def wide(placement: str) -> tuple[nn.Module, SOAP]:
    """A model whose state is large beside the headers of files."""
    torch.manual_seed(0)
    model: nn.Module = nn.ModuleDict(
        {"a": nn.ParameterDict({n: nn.Parameter(torch.randn(WIDE)) for n in ("one", "two")})}
    )
    model["b"] = nn.ParameterDict({"embedding": nn.Parameter(torch.randn(200, 32))})  # type: ignore[index]
    arguments = place(model, placement)
    routed = {"params": list(model["b"].parameters()), "max_precond_dim": 0}  # type: ignore[index]
    return model, SOAP([{"params": list(model["a"].parameters())}, routed], lr=LR, **arguments)  # type: ignore[index]


def count_bytes(placement: str, folder: Path) -> Outcome:
    """The size of a checkpoint of the optimizer alone, and what this process has of the state it describes."""
    model, optimizer = wide(placement)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    path = folder / f"bytes-{placement}-{world_size()}"
    optim = get_optimizer_state_dict(model, optimizer)
    dcp.save(optim, checkpoint_id=path, no_dist=not dist.is_initialized())
    shares = [local(value) for state in optim["state"].values() for value in state.values()]
    return {
        "file": sum(file.stat().st_size for file in path.iterdir()),
        "here": sum(share.numel() * share.element_size() for share in shares),
    }


def call_alone(_: Path) -> Outcome:
    """``state_dict()`` on rank 0 only."""
    run = Run("ddp")
    run.step(1)
    dist.barrier()
    if dist.get_rank() != 0:
        time.sleep(SHORT + 2)  # alive, and somewhere else
        return {}
    start = time.perf_counter()
    try:
        run.optimizer.state_dict()
        raised = "nothing"
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    return {"raised": raised, "seconds": time.perf_counter() - start}


def go_on_flattened(placement: str, folder: Path) -> Outcome:
    """Saves and goes on with flattened optimizer state dicts, which have no place for a parameter without state."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    path = folder / f"flat-{placement}"
    run, resumed = (Run(placement, seed, ("plain", "kl", "conv", "routed")) for seed in (0, 5))
    run.step(CUTS[1])
    model, optim = get_state_dict(run.model, run.optimizer, options=options)
    dcp.save({"model": model, "optim": optim}, checkpoint_id=path)
    model, optim = get_state_dict(resumed.model, resumed.optimizer, options=options)
    dcp.load({"model": model, "optim": optim}, checkpoint_id=path)
    set_state_dict(resumed.model, resumed.optimizer, model_state_dict=model, optim_state_dict=optim, options=options)
    resumed.done = CUTS[1]
    return {"end": run.end(), **resumed.end()}


Scenario = Callable[[Path], Outcome]


def scenarios(*calls: tuple[Any, ...]) -> dict[str, Scenario]:
    """Functions with their arguments but the last, the folder; by name."""
    return {
        " ".join([do.__name__, *(str(a).removeprefix("torch.") for a in arguments)]): partial(do, *arguments)
        for do, *arguments in calls
    }


BOTH = ("fsdp", "ddp")

#: What sets of processes do; the number of processes comes first. "alone" is one process without a process group.
SETS: dict[str, dict[str, Scenario]] = {
    "4 save": scenarios(*((save_and_go_on, p) for p in ("fsdp", "ddp", "hsdp", "tp"))),
    "alone, save": scenarios((save_and_go_on, "single"), (save_full, "single"), (count_bytes, "single")),
    "4 load": scenarios(
        *((resume, f"{p}-4", 7, p) for p in ("fsdp", "ddp", "hsdp", "tp")),
        *((resume, "fsdp-4", 7, p) for p in ("ddp", "hsdp", "tp")),
        (resume, "fsdp-4", 3, "fsdp"),
        (resume, "single-1", 7, "hsdp"),
        *((count_bytes, p) for p in ("fsdp", "hsdp", "tp")),
    ),
    "3 load": scenarios(
        *((resume, "fsdp-4", 7, p) for p in ("fsdp", "ddp", "tp")),
        *((resume, "ddp-4", 7, p) for p in BOTH),
        (resume, "single-1", 3, "fsdp"),
    ),
    "2 load": scenarios(
        *((resume, source, 7, "fsdp") for source in ("fsdp-4", "ddp-4", "single-1", "tp-4")),
        *((resume, source, 7, "ddp") for source in ("fsdp-4", "hsdp-4", "single-1")),
        *((resume, "fsdp-4", 3, p) for p in ("ddp, mesh", "tp")),
        *((load, "single-1", p) for load in (load_full, load_full_from_rank_0, load_plain) for p in BOTH),
    ),
    "2 save": scenarios(
        *((do, p) for do in (uninterrupted, save_full, count_bytes, go_on_flattened) for p in BOTH),
        *((do, p) for do in (load_own_in_place, keep_and_go_on, refuse) for p in BOTH),
        *((do, p) for do in (other_owners, other_owners_save, save_asynchronously) for p in BOTH),
    ),
    "alone, load": scenarios(
        *((resume, f"{p}-4", 7, "single") for p in ("fsdp", "ddp", "hsdp", "tp")),
        *((resume, "single-1", cut, "single") for cut in CUTS),
        (resume, "fsdp-4", 3, "single"),
        *((load, f"{p}-2", "single") for load in (load_full, load_plain) for p in BOTH),
    ),
    "2 lonely": scenarios((call_alone,)),
}


def work(folder: Path, name: str) -> dict[str, Outcome]:
    """What one process of a set does. After an error the others would wait for it: the rest is not tried."""
    logging.getLogger("emerging_optimizers.soap.incidents").setLevel(logging.ERROR)  # the NaN are meant
    alone = name.startswith("alone")
    if alone:
        dist.destroy_process_group()
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as dcp says even with no_dist=True
    rank = 0 if alone else dist.get_rank()
    outcomes: dict[str, Outcome] = {}
    for scenario, do in SETS[name].items():
        try:
            outcome = do(folder)
        except (Exception, CheckpointException) as error:
            outcomes[scenario] = {"error": f"{type(error).__name__}: {error}\n{traceback.format_exc()}"}
            break
        if "weights" in outcome:
            outcome["digest"] = digest(outcome["weights"])
        if rank:  # what is whole is the same everywhere, and has to be sent
            outcome = {key: value for key, value in outcome.items() if key not in ("weights", "state", "end", "at cut")}
        outcomes[scenario] = outcome
    if alone:  # the harness takes leave of it
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return outcomes
