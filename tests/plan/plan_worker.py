"""Three processes that train under DDP and under FSDP2, and print what the plan said of their memory and what it is.

Run by ``test_plan_ranks.py``: ``python plan_worker.py FOLDER``.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from emerging_optimizers.plan import plan
from emerging_optimizers.routing import route_parameters
from emerging_optimizers.soap import SOAP

RANKS = 3
CASES: list[tuple[bool, dict[str, Any]]] = [
    (False, {}),
    (False, {"pack_factors": True}),
    (True, {}),
    (True, {"state_dtype": torch.bfloat16}),
]


def held(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.numel() * local.element_size())


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    for sharded, options in CASES:
        torch.manual_seed(0)
        layers = [nn.Embedding(50, 8), nn.Linear(8, 24), nn.LayerNorm(24), nn.Linear(24, 9), nn.Linear(9, 50)]
        model = nn.Sequential(*layers)
        share = plan(model, ranks=RANKS, sharded=sharded, precondition_frequency=3, **options).shares[rank]
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
        group = None if sharded else dist.group.WORLD
        groups = route_parameters(model).param_groups()
        optimizer = SOAP(groups, lr=0.01, precondition_frequency=3, process_group=group, **options)
        for _ in range(2):
            model(torch.arange(10)).sum().backward()
            optimizer.step()
        state = sum(held(value) for entry in optimizer.state.values() for value in entry.values())
        weights = sum(held(p) + held(p.grad) for p in model.parameters())
        print(f"{int(sharded)} {share.state_bytes} {state} {share.weight_bytes} {weights}\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=RANKS)
