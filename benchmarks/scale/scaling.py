"""SOAP on 1, 2 and 4 processes of this machine beside ``division.py``, and what that predicts for many GPUs.

    python -m benchmarks.scale.scaling                   # all of it, 2 to 4 minutes; leave the machine alone
    python -m benchmarks.scale.scaling --predict-only    # no processes: tables and pictures, from the last result
    python -m benchmarks.scale.scaling --width 32 --layers 1 --gpus 64 --out /tmp/scaling.json --docs /tmp   # a dry run

Writes the result file, the pictures ``scale.png`` and ``scale-balance.png``, and the tables of ``scale.md`` between its
markers. Every process has one thread (gloo, float32). In each world of processes the rates of the machine are measured
first, in CPU time, by all processes at once; then come the placements, the first step (which makes the first bases)
unmeasured, then whole refresh periods. Processes meet before each step, as training makes them. With more processes
than cores only the CPU time of a process says what it would take on a core of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from math import prod
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from benchmarks.common import ROOT, Shape, heading, low_rank, parser, seconds, state_bytes, write
from benchmarks.scale.division import (
    H100,
    Division,
    Machine,
    busy_seconds,
    divide,
    gpt_model,
    mesh_of,
    predict,
    stagger,
    traffic,
)
from benchmarks.scale.predictions import balances, predictions, sensitivity, sizes
from benchmarks.scale.report import draw_balance, draw_scale, fill
from emerging_optimizers.plan import plan
from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.distributed.collectives import sent
from emerging_optimizers.soap.soap import precondition, update_eigenbasis_and_momentum, update_kronecker_factors

# --- one of several processes -----------------------------------------------------------------------------------------


def work(given: argparse.Namespace) -> None:
    """What each process does; the first one writes the result."""
    torch.set_num_threads(1)
    world, store = given.world, f"file://{given.store}"
    wait = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=given.rank, world_size=world, timeout=wait)
    model = gpt_model(given.width, given.layers, 8 * given.width, 128)
    rates = measured_rates(model, world)
    runs = []
    for placement in ["ddp"] if world == 1 else ["ddp", "fsdp"] + ["hsdp"] * (world > 2):
        for staggered in (False, True) if placement == "ddp" else (False,):
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, measured_steps(model, given, placement, staggered))
            division = divide(model, mesh_of(placement, world, 2), precondition_frequency=given.frequency)
            compared_with = stagger(division) if staggered else division
            runs.append(compared(compared_with, placement, staggered, everyone, rates))
    if given.rank == 0:
        Path(given.worker).write_text(json.dumps({"processes": world, "rates": rates, "runs": runs}))
    dist.barrier()
    dist.destroy_process_group()


def measured_steps(
    model: Mapping[str, Shape], given: argparse.Namespace, placement: str, staggered: bool
) -> dict[str, Any]:
    """Runs the optimizer; what this process had to do, per step."""
    place: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone
    if placement != "ddp":
        mesh = init_device_mesh("cpu", tuple(mesh_of(placement, given.world, 2)), mesh_dim_names=("rows", "columns"))
        if placement == "fsdp":
            place = partial(distribute_tensor, device_mesh=mesh["columns"], placements=[Shard(0)], src_data_rank=None)
        else:
            both = [Replicate(), Shard(0)]
            place = partial(distribute_tensor, device_mesh=mesh, placements=both, src_data_rank=None)
    generator = torch.Generator().manual_seed(0)
    shapes = model.values()
    parameters = [torch.nn.Parameter(place(torch.randn(shape, generator=generator))) for shape in shapes]
    gradients = [
        [place(low_rank(shape, generator) if len(shape) > 1 else torch.ones(shape)) for shape in shapes]
        for _ in range(2)
    ]
    groups: dict[str, dict[str, Any]] = {"soap": {"params": []}, "adamw": {"params": [], "max_precond_dim": 0}}
    for p, row in zip(parameters, plan(model).rows, strict=True):
        groups[row.optimizer]["params"].append(p)
    optimizer = SOAP(
        groups.values(),
        lr=1e-3,
        precondition_frequency=given.frequency,
        stagger_updates=staggered,
        process_group=dist.group.WORLD if placement == "ddp" and given.world > 1 else None,
    )
    found: dict[str, Any] = {"wall": [], "cpu": [], "sent": []}
    for step in range(1 + given.periods * given.frequency):
        for p, gradient in zip(parameters, gradients[step % 2], strict=True):
            p.grad = gradient
        dist.barrier()
        before, busy = sum(sent.values()), time.process_time()
        wall = seconds(optimizer.step)
        if step:
            found["wall"].append(1000 * wall)
            found["cpu"].append(1000 * (time.process_time() - busy))
            found["sent"].append(sum(sent.values()) - before)
    entries = (entry for state in optimizer.state.values() for entry in state.items())
    factors = sum(value.nbytes for key, value in entries if key.startswith(("GG_", "Q_")))
    return {**found, "state": state_bytes(optimizer), "factors": factors}


def measured_rates(model: Mapping[str, Shape], world: int) -> dict[str, float]:
    """The rates of a process, as :class:`Machine` has them, at the sizes of this model."""
    rows = {row.shape: row for row in plan(model).rows if row.layout.axes}.values()
    grads = [torch.randn(row.shape) for row in rows]
    factors = [[torch.eye(size) for size in row.shape] for row in rows]
    # Of bases that have hardly turned, as in most of a training.
    bases = [[torch.linalg.qr(torch.eye(size) + 0.3 / size * torch.randn(size, size)).Q for size in row.shape]
             for row in rows]  # fmt: skip

    def products() -> None:
        for grad, some, factor in zip(grads, bases, factors, strict=True):
            update_kronecker_factors(factor, grad, 0.5)
            precondition(precondition(grad, some), some, [[0], [1]])

    def refreshes() -> None:
        for grad, some, factor in zip(grads, bases, factors, strict=True):
            update_eigenbasis_and_momentum(factor, some, grad.square(), grad.clone())

    vector = torch.nn.Parameter(torch.zeros(2**20))
    vector.grad = torch.ones(2**20)
    rates = {
        "products": sum(6 * prod(row.shape) * sum(row.shape) for row in rows) / median_of(products, time.process_time),
        "refreshes": sum(row.soap.refresh_flops for row in rows) / median_of(refreshes, time.process_time),
        "elements": 2**20 / median_of(SOAP([vector], lr=1e-3).step, time.process_time),
    }
    for size, count in (("small", 1), ("large", 2**20)) if world > 1 else ():
        tensor = torch.zeros(count)
        out, into = torch.zeros(2, world * count)
        rates[f"broadcast_{size}_s"] = median_of(lambda: [dist.broadcast(tensor, r) for r in range(world)]) / world  # noqa: B023
        rates[f"all_to_all_{size}_s"] = median_of(lambda: dist.all_to_all_single(into, out))  # noqa: B023
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, rates)
    return {key: median(one[key] for one in everyone) for key in rates}


def median_of(do: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Median seconds of doing something, the first time left out."""
    return median([seconds(do, clock=clock) for _ in range(6)][1:])


def machine_of(rates: dict[str, float], placement: str, world: int) -> Machine:
    """The measured machine. Processes that share cores are no slower in CPU time."""
    bandwidth, latency = float("inf"), 0.0
    if world > 1:
        kind, peers = ("broadcast", 1) if placement == "ddp" else ("all_to_all", world - 1)
        latency = rates[f"{kind}_small_s"]
        bandwidth = 4 * 2**20 * peers / max(rates[f"{kind}_large_s"] - latency, 1e-9)
    speeds = (rates[key] for key in ("products", "refreshes", "elements"))
    cores = len(os.sched_getaffinity(0))
    return Machine(*speeds, node=world, fast=bandwidth, slow=bandwidth, latency=latency, hop=0.0, cores=cores,
                   source="measured")  # fmt: skip


def compared(
    division: Division, placement: str, staggered: bool, everyone: list[dict[str, Any]], rates: dict[str, float]
) -> dict[str, Any]:
    """A run beside the model."""
    machine = machine_of(rates, placement, division.mesh.size)
    moved = traffic(division)
    expected = (moved.sent + moved.broadcast_sent).tolist()
    sent_bytes = [fmean(one["sent"]) for one in everyone]
    walls = [max(times) for times in zip(*(one["wall"] for one in everyone), strict=True)]
    return {
        "placement": placement,
        "staggered": staggered,
        "wall_ms": round(fmean(walls), 2),
        "worst_wall_ms": round(max(walls), 2),
        "cpu_ms": [round(fmean(one["cpu"]), 2) for one in everyone],
        "steps_wall_ms": [round(wall, 2) for wall in walls],
        "steps_cpu_ms": [[round(cpu, 2) for cpu in one["cpu"]] for one in everyone],
        "predicted_wall_ms": round(1000 * predict(division, machine).mean, 2),
        "predicted_cpu_ms": [round(1000 * busy, 2) for busy in busy_seconds(division, machine).mean(0).tolist()],
        "state_bytes": [one["state"] for one in everyone],
        "state_bytes_exact": [one["state"] for one in everyone] == division.state.tolist(),
        "factor_bytes": [one["factors"] for one in everyone],
        "sent_bytes": sent_bytes,
        "sent_over_formula": [
            round(mean / wanted, 4) if wanted else 1.0 if not mean else float("inf")
            for mean, wanted in zip(sent_bytes, expected, strict=True)
        ],
    }


# --- the run ----------------------------------------------------------------------------------------------------------


def measure(given: argparse.Namespace, world: int) -> dict[str, Any]:
    """Starts the processes of a world, waits for them and returns what they found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        words = [sys.executable, "-m", "benchmarks.scale.scaling", "--worker", str(out), "--store", f"{folder}/store"]
        for name in ("width", "layers", "frequency", "periods"):
            words += [f"--{name}", str(getattr(given, name))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen([*words, "--rank", str(rank), "--world", str(world)], cwd=ROOT, env=environment)
            for rank in range(world)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"a world of {world} processes ended with {codes}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def main() -> None:
    arguments = parser(__doc__, "scaling.json")
    arguments.add_argument("--worlds", default="1,2,4", help="numbers of processes")
    arguments.add_argument("--width", type=int, default=256)
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--frequency", type=int, default=10)
    arguments.add_argument("--periods", type=int, default=2, help="refresh periods that are measured")
    arguments.add_argument("--gpus", type=int, default=4096, help="the largest number that is predicted")
    arguments.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the pictures go, and scale.md is")
    arguments.add_argument("--predict-only", action="store_true", help="measure nothing; keep what --out has")
    for name, kind in (("worker", str), ("store", str), ("rank", int), ("world", int)):
        arguments.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.worker:
        work(given)
        return
    if given.predict_only:
        result = json.loads(given.out.read_text()) if given.out.exists() else {}
    else:
        kept = {name: getattr(given, name) for name in ("width", "layers", "frequency", "periods")}
        worlds = [measure(given, world) for world in map(int, given.worlds.split(","))]
        result = {**heading(), "set": kept, "threads_per_process": 1, "worlds": worlds}
    result |= {"assumed": {"H100": H100._asdict()}, "predictions": predictions(given.gpus)}
    result |= {"balance": balances(), "sizes": sizes(), "sensitivity": sensitivity()}
    write(given.out, result)
    fill(given.docs / "scale.md", result)
    draw_scale(result["predictions"], given.docs / "scale.png")
    draw_balance(given.docs / "scale-balance.png")


if __name__ == "__main__":
    main()
