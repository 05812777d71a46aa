"""A small model under torch's own engines, as the processes of ``test_placements`` run them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.distributed.grid import ProcessGrids, shards_of
from tests.distributed.scenarios import whole

WIDTH = 6


class Model(nn.Module):
    """Two residual blocks' worth of layers: sizes that no number of processes divides, vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 10)
        self.down = nn.Linear(10, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """(batch, WIDTH) to (batch, 3)."""
        return self.head(inputs + self.down(torch.tanh(self.up(self.norm(inputs)))))


def train_model(engine: str) -> dict[str, Any]:
    """Trains the model on this process's part of the data.

    Returns:
        "weights": all of each parameter, by name; "losses": of the joint batch, before each step.
    """
    torch.manual_seed(0)
    model = Model().double()
    inputs, targets = torch.randn(16, WIDTH, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
    rank, parts, group = dist.get_rank(), dist.get_world_size(), None
    trained: nn.Module = model
    tensor_parallel = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if engine.startswith("DDP"):
        trained, group = DistributedDataParallel(model), dist.group.WORLD
    elif engine.startswith("fully_shard"):
        fully_shard(model.up)
        fully_shard(model)
    elif engine == "HSDP":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))
    elif engine == "TP":
        parallelize_module(model, init_device_mesh("cpu", (parts,)), tensor_parallel)
        rank, parts = 0, 1
    elif engine == "FSDP and TP":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], tensor_parallel)
        fully_shard(model, mesh=mesh["data"])
        rank, parts = mesh.get_local_rank("data"), 2
    # The first gradients leave factors that are singular, and an eigenbasis of a null space is whatever rounding makes
    # it: the sums of gradients, which an engine adds up in another order, would show. Later factors are regular.
    options = {"adam_warmup_steps": 10, "precondition_frequency": 3}
    optimizer = SOAP(model.named_parameters(), lr=0.02, **options, process_group=group)
    losses = []
    for _ in range(24):
        optimizer.zero_grad()
        loss = (trained(inputs.chunk(parts)[rank]) - targets.chunk(parts)[rank]).square().mean()
        loss.backward()
        optimizer.step()
        joint = loss.detach().clone()
        dist.all_reduce(joint)
        losses.append(joint.item() / dist.get_world_size())
    return {"weights": {name: whole(parameter) for name, parameter in model.named_parameters()}, "losses": losses}


def wrong_pieces(shards: int, splits: int) -> list[str]:
    """Compares what each process of a grid is taken to hold with what torch gives it.

    The processes are played one after the other by this one, on torch's fake process group: nothing is communicated.
    """
    dist.destroy_process_group()
    wrong = []
    for rows in range(1, 14):
        for rank in range(shards * splits):
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=shards * splits)
            mesh = init_device_mesh("cpu", (shards, splits), mesh_dim_names=("data", "tensor"))
            model = nn.Sequential(nn.Linear(2, rows, bias=False))
            weight = torch.arange(2.0 * rows).view(rows, 2)
            with torch.no_grad():
                model[0].weight.copy_(weight)
            parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()}, src_data_rank=None)
            fully_shard(model, mesh=mesh["data"])
            parameter = model[0].weight
            grid = ProcessGrids(None).of(parameter)
            assert grid is not None
            piece = weight[shards_of(parameter, grid)[grid.shard]]
            if not torch.equal(piece, parameter.to_local()):
                wrong.append(f"{rows} rows, rank {rank}: {piece[:, 0]} for {parameter.to_local()[:, 0]}")
            dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # as it was
    return wrong
