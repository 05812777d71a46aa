"""The cost model of ``benchmarks/``: exact about state and bytes, by hand on small cases; the balance that we claim."""

from math import prod

import pytest
import torch
from torch import nn

from benchmarks.cost_model import (
    Mesh,
    Options,
    balance,
    divide,
    factor_bytes,
    flops,
    mesh_of,
    piece_sizes,
    refresh_work,
    slowest,
    stagger,
    state_bytes,
    step_work,
    traffic,
)
from benchmarks.machines import MACHINES, busy_seconds, predict
from benchmarks.parameter_sets import MODELS, Weight, gpt_model
from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.costs import refresh_flops, step_flops
from emerging_optimizers.soap.state import Layout

GPT2 = MODELS["GPT-2 124M"]
ONE_MATRIX = [Weight("w", (5, 3), True)]
MIXED = [
    Weight("embedding", (11, 4), False),
    Weight("w", (6, 4), True),
    Weight("convolution", (4, 3, 2, 2), True),
    Weight("long", (9, 3), True),
    Weight("bias", (5,), False),
]


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(merge_dims=True),
        Options(max_precond_dim=8),
        Options(pack_factors=True, state_dtype=torch.bfloat16),
        Options(dtype=torch.bfloat16),
        Options(dtype=torch.float64),
    ],
)
def test_the_state_of_one_process_has_as_many_bytes_as_predicted(options: Options) -> None:
    groups: list = [{"params": [], "max_precond_dim": options.max_precond_dim}, {"params": [], "max_precond_dim": 0}]
    for weight in MIXED:
        parameter = nn.Parameter(torch.ones(weight.shape, dtype=options.dtype))
        parameter.grad = torch.randn_like(parameter)
        groups[not weight.preconditioned]["params"].append(parameter)
    same = {name: getattr(options, name) for name in ("merge_dims", "pack_factors", "state_dtype")}
    optimizer = SOAP(groups, lr=0.01, **same)
    optimizer.step()
    states = optimizer.state.values()
    real = [(key, value.numel() * value.dtype.itemsize) for state in states for key, value in state.items()]
    division = divide(MIXED, options, Mesh(1, 1))
    assert state_bytes(division).tolist() == [sum(size for _, size in real)]
    assert factor_bytes(division).tolist() == [sum(size for key, size in real if key.startswith(("GG_", "Q_")))]


def test_state_is_divided_and_counters_are_not() -> None:
    alone = int(state_bytes(divide(MIXED, Options(), Mesh(1, 1))))
    matrices, others = 3, 2
    for mesh in (Mesh(2, 1), Mesh(1, 2), Mesh(1, 4), Mesh(2, 2)):
        owned_elsewhere = 8 * matrices * (mesh.size - 1)
        copies = mesh.rows  # of a tensor that gets AdamW
        vectors = 2 * 4 * sum(prod(w.shape) for w in MIXED if not w.preconditioned) * (copies - 1)
        counters = 16 * others * (mesh.size - 1)
        total = int(state_bytes(divide(MIXED, Options(), mesh)).sum())
        assert total == alone + owned_elsewhere + vectors + counters


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 16, 17])
def test_pieces_are_those_of_torch_chunk(rows: int) -> None:
    chunks = [chunk.numel() for chunk in torch.zeros(rows, 3).chunk(8)]
    assert piece_sizes((rows, 3), Mesh(2, 8)).tolist() == 2 * (chunks + [0] * (8 - len(chunks)))


def test_bytes_of_a_broadcast_by_hand() -> None:
    moved = traffic(divide(ONE_MATRIX, Options(), Mesh(3, 1)))
    assert moved.all_sent.tolist() == [64, 0, 0]  # 15 floats, rounded up to 8 bytes
    assert moved.all_received.tolist() == [0, 64, 64]
    assert (moved.all_to_alls, moved.broadcasts, moved.all_reduces) == (0, 1, 0)


def test_bytes_of_an_exchange_by_hand() -> None:
    # Rows 3 and 2: the second process sends 6 floats of gradient, gets 6 of the update and its flag, 4 bytes in 8.
    moved = traffic(divide(ONE_MATRIX, Options(), Mesh(1, 2)))
    assert moved.all_sent.tolist() == [24 + 8, 24]
    assert moved.all_received.tolist() == [24, 24 + 8]
    half = traffic(divide(ONE_MATRIX, Options(dtype=torch.bfloat16), Mesh(1, 2)))
    assert half.all_sent.tolist() == [24 + 8, 16]
    assert (half.all_to_alls, half.broadcasts) == (2, 0)


def test_bytes_of_rows_and_columns_by_hand() -> None:
    # The owner's row exchanges; then both of its processes send the other row what they hold: 9 and 6 floats.
    moved = traffic(divide(ONE_MATRIX, Options(), Mesh(2, 2)))
    assert moved.sent.tolist() == [32, 24, 0, 0]
    assert moved.broadcast_sent.tolist() == [40, 24, 0, 0]
    assert moved.all_received.tolist() == [24, 32, 40, 24]
    assert (moved.all_to_alls, moved.broadcasts) == (2, 1)


def test_one_process_sends_nothing() -> None:
    moved = traffic(divide(MIXED, Options(), Mesh(1, 1)))
    assert not moved.all_sent.any()
    assert not moved.all_received.any()


@pytest.mark.parametrize("placement", ["ddp", "fsdp", "hsdp"])
def test_the_formulas_of_the_docs(placement: str) -> None:
    model = gpt_model(64, 8, 128, 32, biases=False)
    elements = sum(prod(weight.shape) for weight in model if weight.preconditioned)
    mesh = mesh_of(placement, 8, 4)
    moved = traffic(divide(model, Options(), mesh))
    exchanged = elements * (4 + 4) * (mesh.columns - 1) / mesh.columns if mesh.columns > 1 else 0
    broadcast = elements * 4 if mesh.rows > 1 else 0
    assert int(moved.all_sent.sum()) == pytest.approx(exchanged + broadcast, rel=0.01)
    assert int(moved.sent.sum()) == int(moved.received.sum())
    assert int(moved.broadcast_received.sum()) == broadcast * (mesh.rows - 1)


def test_work_is_that_of_the_package_and_only_divided() -> None:
    for layout in (Layout((768, 3072), (0, 1)), Layout((50, 7), (1,)), Layout((4, 5, 6), (0, 2))):
        assert sum(step_work(layout)[:3]) == step_flops(layout)
        for axis in layout.axes:
            assert sum(refresh_work(layout, axis)) == refresh_flops(layout, axis)
    alone = divide(MIXED, Options(frequency=4), Mesh(1, 1))
    total = flops(alone).sum()
    layouts = [member.layout for member in alone.members]
    assert total == sum(
        4 * step_flops(layout) + sum(refresh_flops(layout, axis) for axis in layout.axes) for layout in layouts
    )
    for mesh in (Mesh(3, 1), Mesh(1, 4)):
        division = divide(MIXED, Options(frequency=4), mesh)
        for variant in (division, stagger(division), stagger(division, 1)):
            assert flops(variant).sum() == total


def test_a_process_waits_for_the_others_but_for_the_last_rounds() -> None:
    # One step, three rounds, two processes: 5, 1, 1 and 1, 1, 9.
    loads = torch.tensor([[[5.0, 1.0], [1.0, 1.0], [1.0, 9.0]]])
    assert slowest(loads, 1).tolist() == [14.0]  # the 9 begin when the other is done with its 5
    assert slowest(loads, 2).tolist() == [11.0]
    assert slowest(loads[..., :1], 1).tolist() == [7.0]


def test_predicted_time_by_hand() -> None:
    machine = MACHINES["H100"]._replace(
        products=10.0, full_products=5.0, decompositions=2.0, elements=1.0, fast=16.0, latency=0.5, hop=0.25
    )
    # (4, 2), refreshed in one of two steps: 8 elements, 6 * 8 * (4 + 2) FLOPs; 2 and 4 d^3 for d = 4, 2; the moment is
    # carried by 4 * 8 d along 4 and by 2 d^3 + 2 * 8 d along 2.
    step = 288 / 10 + 8 / 1
    refresh = (4 * 8 * 4 + 2 * 8 + 2 * 8 * 2) / 10 + 2 * 72 / 5 + 4 * 72 / 2
    alone = predict(divide([Weight("w", (4, 2), True)], Options(frequency=2), Mesh(1, 1)), machine)
    assert alone.mean == pytest.approx(step + refresh / 2)
    assert alone.worst == pytest.approx(step + refresh)
    # Two such matrices on two processes, 32 bytes each, two broadcasts of one hop.
    both = divide([Weight("a", (4, 2), True), Weight("b", (4, 2), True)], Options(frequency=2), Mesh(2, 1))
    two = predict(both, machine)
    assert two.exchange == pytest.approx(64 / 16 + 2 * (0.5 + 0.25))
    assert two.mean == pytest.approx(alone.mean + two.exchange)
    assert busy_seconds(both, machine).tolist() == pytest.approx(2 * [alone.mean])
    assert predict(both, machine._replace(cores=1)).work == pytest.approx(2 * alone.mean)


def test_the_models_have_as_many_parameters_as_published() -> None:
    counts = {name: sum(prod(weight.shape) for weight in model) for name, model in MODELS.items()}
    assert counts["GPT-2 124M"] == 124_439_808
    assert counts["Llama-3 8B"] == 8_030_261_248
    assert counts["Llama-3 70B"] == 70_553_706_496
    assert 1.3e9 < counts["GPT-3 1.3B"] < 1.35e9


@pytest.mark.parametrize("placement", ["ddp", "fsdp"])
def test_eight_processes_share_gpt2_evenly(placement: str) -> None:
    division = divide(GPT2, Options(), mesh_of(placement, 8))
    found = balance(division)
    assert found.ranks <= 1.15
    assert found.critical_path <= 1.15
    factors = factor_bytes(division)
    assert float(factors.max() / factors.sum()) <= 1.15 / 8


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16])
def test_places_per_owner_keep_the_slowest_process_near_the_mean(processes: int) -> None:
    division = divide(GPT2, Options(), mesh_of("fsdp", processes))
    own, of_one = stagger(division), stagger(division, 1)
    assert balance(own).critical_path <= 1.15
    assert all(0 <= place < 10 for member in own.members for place in member.places)
    if processes == 1:
        assert own == of_one
    else:
        assert balance(own).worst_step < balance(of_one).worst_step
