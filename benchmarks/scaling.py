"""SOAP on 1, 2 and 4 processes of this machine against ``cost_model.py``, and what that predicts for many GPUs.

    python -m benchmarks.scaling                   # all of it, 2 to 4 minutes; leave the machine alone
    python -m benchmarks.scaling --predict-only    # no processes: tables and pictures from shapes and the last result
    python -m benchmarks.scaling --width 32 --layers 1 --out /tmp/scaling.json --docs /tmp   # a dry run

Writes the result file, the pictures ``scale.png`` and ``scale-balance.png``, and the tables of ``scale.md`` between its
markers. Every process has one thread (gloo, float32). In each world of processes the rates of the machine are measured
first, on the kernels alone and in CPU time, by all processes at once; then come the placements, the first step (which
makes the first bases) unmeasured, then whole refresh periods. Processes meet before each step, as training makes them.
With more processes than cores only the CPU time of a process says what it would take on a core of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from math import prod
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.cost_model import (
    KINDS,
    Division,
    Options,
    divide,
    mesh_of,
    stagger,
    state_bytes,
    traffic,
)
from benchmarks.machines import MACHINES, Machine, busy_seconds, predict
from benchmarks.parameter_sets import Weight, gpt_model
from benchmarks.scaling_predictions import balances, predictions, sensitivity, sizes
from benchmarks.scaling_report import draw_balance, draw_scale, fill

ROOT = Path(__file__).parent.parent


# --- one of several processes ---------------------------------------------------------------------------------------


def work(rank: int, world: int, given: argparse.Namespace, store: str) -> None:
    """What each process does; the first one writes the result."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    model = gpt_model(given.width, given.layers, 8 * given.width, 128, biases=False)
    rates = measured_rates(model, world)
    placements = ["ddp"] if world == 1 else ["ddp", "fsdp"] + ["hsdp"] * (world > 2)
    runs = []
    for placement in placements:
        for staggered in (False, True) if placement == "ddp" else (False,):
            options = Options(frequency=given.frequency)
            mine = measured_steps(model, options, placement, staggered, given.periods, rank, world)
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, mine)
            division = divide(model, options, mesh_of(placement, world, 2))
            if staggered:
                division = stagger(division)
            runs.append(compared(division, placement, staggered, everyone, rates))
    if rank == 0:
        Path(given.worker).write_text(json.dumps({"processes": world, "rates": rates, "runs": runs}))
    dist.barrier()
    dist.destroy_process_group()


def measured_steps(
    model: Sequence[Weight], options: Options, placement: str, staggered: bool, periods: int, rank: int, world: int
) -> dict[str, Any]:
    """Runs the optimizer; what this process had to do, per step."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from benchmarks.step_time import low_rank, state_bytes
    from emerging_optimizers.soap import SOAP
    from emerging_optimizers.soap.distributed.collectives import sent

    place: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone
    if placement == "fsdp":
        whole = init_device_mesh("cpu", (world,))
        place = lambda tensor: distribute_tensor(tensor, whole, [Shard(0)], src_data_rank=None)  # noqa: E731
    elif placement == "hsdp":
        mesh = mesh_of("hsdp", world, 2)
        two = init_device_mesh("cpu", tuple(mesh), mesh_dim_names=("replicate", "shard"))
        place = lambda tensor: distribute_tensor(tensor, two, [Replicate(), Shard(0)], src_data_rank=None)  # noqa: E731

    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(place(torch.randn(w.shape, generator=generator))) for w in model]
    gradients = [
        [place(low_rank(w.shape, generator, "cpu")) if len(w.shape) > 1 else place(torch.ones(w.shape)) for w in model]
        for _ in range(2)
    ]
    soap = [p for p, weight in zip(parameters, model, strict=True) if weight.preconditioned]
    adamw = [p for p, weight in zip(parameters, model, strict=True) if not weight.preconditioned]
    groups: list[dict[str, Any]] = [{"params": soap}, {"params": adamw, "max_precond_dim": 0}]
    optimizer = SOAP(
        groups,
        lr=1e-3,
        precondition_frequency=options.frequency,
        stagger_updates=staggered,
        process_group=dist.group.WORLD if placement == "ddp" and world > 1 else None,
    )
    wall, cpu, moved = [], [], []
    for step in range(1 + periods * options.frequency):
        for p, gradient in zip(parameters, gradients[step % 2], strict=True):
            p.grad = gradient
        dist.barrier()
        before, begin, busy = sum(sent.values()), time.perf_counter(), time.process_time()
        optimizer.step()
        busy, end = time.process_time() - busy, time.perf_counter()
        if step:
            wall.append(1000 * (end - begin))
            cpu.append(1000 * busy)
            moved.append(sum(sent.values()) - before)
    factors = sum(
        value.numel() * value.dtype.itemsize
        for state in optimizer.state.values()
        for key, value in state.items()
        if key.startswith(("GG_", "Q_"))
    )
    return {"wall": wall, "cpu": cpu, "sent": moved, "state": state_bytes(optimizer), "factors": factors}


def measured_rates(model: Sequence[Weight], world: int) -> dict[str, float]:
    """The rates of a process, as :class:`Machine` has them, on the kernels and at the sizes of this model."""
    import torch.distributed as dist

    from emerging_optimizers.soap import SOAP
    from emerging_optimizers.soap.linalg import orthonormal_columns
    from emerging_optimizers.soap.distributed.collectives import all_to_all, broadcast, spec_of
    from emerging_optimizers.soap.linalg import project, project_back, update_factors

    shapes = sorted({weight.shape for weight in model if weight.preconditioned})
    widths = sorted(size for shape in shapes for size in shape)
    grads = [torch.randn(1, *shape) for shape in shapes]
    bases = [[torch.randn(1, size, size) for size in shape] for shape in shapes]

    def products() -> None:
        for grad, some in zip(grads, bases, strict=True):
            update_factors(some, grad, 0.5)
            project_back(project(grad, some), some)

    squares = [torch.randn(1, size, size) for size in widths]
    # Of bases that have hardly turned, as in most of a training.
    turned = [torch.eye(size) + 0.3 / size**0.5 * s for size, s in zip(widths, squares, strict=True)]
    vector = torch.nn.Parameter(torch.zeros(2**20))
    vector.grad = torch.ones(2**20)
    adamw = SOAP([vector], lr=1e-3)
    rates = {
        "products": sum(6 * prod(s) * sum(s) for s in shapes) / seconds_of(products, time.process_time),
        "full_products": sum(2 * d**3 for d in widths)
        / seconds_of(lambda: [s @ s for s in squares], time.process_time),
        "decompositions": sum(4 * d**3 for d in widths)
        / seconds_of(
            lambda: [orthonormal_columns(t, t, None, t.diagonal(dim1=-2, dim2=-1)) for t in turned],
            time.process_time,
            3,
        ),
        "elements": 2**20 / seconds_of(adamw.step, time.process_time),
    }
    group = dist.group.WORLD
    assert group is not None
    if world > 1:
        for size, tensor in (("small", torch.zeros(1)), ("large", torch.zeros(2**20))):
            specs = [[spec_of(tensor)]] * world

            def exchange(tensor: torch.Tensor = tensor, specs: Any = specs) -> None:
                all_to_all(group, [[tensor]] * world, specs, tensor.device).wait()

            def spread(tensor: torch.Tensor = tensor) -> None:
                transfers = [broadcast(group, source, [tensor]) for source in range(world)]
                for transfer in transfers:
                    transfer.wait()

            rates[f"all_to_all_{size}_s"] = seconds_of(exchange, time.perf_counter)
            rates[f"broadcast_{size}_s"] = seconds_of(spread, time.perf_counter) / world
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, rates)
    return {key: median(one[key] for one in everyone) for key in rates}


def seconds_of(do: Callable[[], object], clock: Callable[[], float], repeats: int = 5) -> float:
    """Median seconds of doing something."""
    times = []
    for _ in range(repeats + 1):
        begin = clock()
        do()
        times.append(clock() - begin)
    return median(times[1:])


def machine_of(rates: dict[str, float], placement: str, world: int) -> Machine:
    """The measured machine. Processes that share cores are no slower in CPU time."""
    bandwidth, latency = float("inf"), 0.0
    if world > 1:
        kind = "broadcast" if placement == "ddp" else "all_to_all"
        latency = rates[f"{kind}_small_s"]
        travelling = 4 * 2**20 * (1 if kind == "broadcast" else world - 1)
        bandwidth = travelling / max(rates[f"{kind}_large_s"] - latency, 1e-9)
    return Machine(
        **{kind: rates[kind] for kind in KINDS},  # type: ignore[arg-type]
        node=world,
        fast=bandwidth,
        slow=bandwidth,
        latency=latency,
        hop=0.0,
        cores=len(os.sched_getaffinity(0)),
        source="measured",
    )


def compared(
    division: Division, placement: str, staggered: bool, everyone: Sequence[dict[str, Any]], rates: dict[str, float]
) -> dict[str, Any]:
    """A run beside the model."""
    world = division.mesh.size
    machine = machine_of(rates, placement, world)
    here = predict(division, machine)
    expected_sent = traffic(division).all_sent.tolist()
    walls = [max(times) for times in zip(*(one["wall"] for one in everyone), strict=True)]
    return {
        "placement": placement,
        "staggered": staggered,
        "wall_ms": round(fmean(walls), 2),
        "worst_wall_ms": round(max(walls), 2),
        "cpu_ms": [round(fmean(one["cpu"]), 2) for one in everyone],
        "steps_wall_ms": [round(wall, 2) for wall in walls],
        "steps_cpu_ms": [[round(cpu, 2) for cpu in one["cpu"]] for one in everyone],
        "predicted_wall_ms": round(1000 * here.mean, 2),
        "predicted_cpu_ms": [round(1000 * busy, 2) for busy in busy_seconds(division, machine).tolist()],
        "state_bytes": [one["state"] for one in everyone],
        "state_bytes_exact": [one["state"] for one in everyone] == state_bytes(division).tolist(),
        "factor_bytes": [one["factors"] for one in everyone],
        "factor_share": round(max(one["factors"] for one in everyone) / sum(one["factors"] for one in everyone), 4),
        "sent_bytes": [fmean(one["sent"]) for one in everyone],
        "sent_over_formula": [
            round(fmean(one["sent"]) / expected, 4) if expected else 1.0 if not any(one["sent"]) else float("inf")
            for one, expected in zip(everyone, expected_sent, strict=True)
        ],
    }


# --- the run --------------------------------------------------------------------------------------------------------


def measure(given: argparse.Namespace, world: int) -> dict[str, Any]:
    """Starts the processes of a world, waits for them and returns what they found."""
    with tempfile.TemporaryDirectory() as folder:
        out, store = Path(folder) / "result.json", Path(folder) / "store"
        words = [sys.executable, "-m", "benchmarks.scaling", "--worker", str(out), "--store", str(store)]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="1,2,4", help="numbers of processes")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--frequency", type=int, default=10)
    parser.add_argument("--periods", type=int, default=2, help="refresh periods that are measured")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/scaling.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the pictures go, and scale.md is")
    parser.add_argument("--predict-only", action="store_true", help="measure nothing; keep what --out has")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.rank, given.world, given, given.store)
        return
    if given.predict_only:
        result = json.loads(given.out.read_text()) if given.out.exists() else {}
    else:
        from benchmarks.step_time import heading

        result = {
            **heading("cpu"),
            "set": {
                "width": given.width,
                "layers": given.layers,
                "frequency": given.frequency,
                "periods": given.periods,
            },
            "threads_per_process": 1,
            "worlds": [measure(given, world) for world in map(int, given.worlds.split(","))],
        }
    result["assumed"] = {name: machine._asdict() for name, machine in MACHINES.items()}
    result["predictions"] = predictions()
    result["balance"], result["sizes"], result["sensitivity"] = balances(), sizes(), sensitivity()
    if "worlds" in result:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    fill(given.docs / "scale.md", result)
    draw_scale(result["predictions"], given.docs / "scale.png")
    draw_balance(given.docs / "scale-balance.png")


if __name__ == "__main__":
    main()
