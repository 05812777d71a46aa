"""The division of work in ``benchmarks/scale``: bytes by hand on small cases; the balance that we claim."""

from math import prod

import pytest
import torch
from torch import nn

from benchmarks.scale.division import (
    H100,
    Mesh,
    balance,
    busy_seconds,
    divide,
    gpt_model,
    mesh_of,
    model,
    piece_sizes,
    predict,
    stagger,
    traffic,
    work,
)
from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.costs import refresh_flops, step_flops
from emerging_optimizers.soap.state import Layout

ONE_MATRIX = {"w": (5, 3)}
MIXED = {"embedding.weight": (11, 4), "w": (6, 4), "convolution": (4, 3, 2, 2), "long": (9, 3), "bias": (5,)}


@pytest.mark.parametrize("options", [{}, {"merge_dims": True}, {"pack_factors": True, "state_dtype": torch.bfloat16}])
def test_the_state_of_one_process_has_as_many_bytes_as_predicted(options: dict) -> None:
    groups: list = [{"params": []}, {"params": [], "max_precond_dim": 0}]
    for name, shape in MIXED.items():
        parameter = nn.Parameter(torch.ones(shape))
        parameter.grad = torch.randn_like(parameter)
        groups[name in ("embedding.weight", "bias")]["params"].append(parameter)
    optimizer = SOAP(groups, lr=0.01, **options)
    optimizer.step()
    real = sum(value.numel() * value.dtype.itemsize for state in optimizer.state.values() for value in state.values())
    assert divide(MIXED, Mesh(1, 1), **options).state.tolist() == [real]


def test_state_is_divided_and_counters_are_not() -> None:
    alone = int(divide(MIXED, Mesh(1, 1)).state)
    matrices, others = 3, 2
    for mesh in (Mesh(2, 1), Mesh(1, 2), Mesh(1, 4), Mesh(2, 2)):
        owned_elsewhere = 8 * matrices * (mesh.size - 1)
        copies = mesh.rows  # of a tensor that gets AdamW
        moments = 2 * 4 * (11 * 4 + 5) * (copies - 1)
        counters = 16 * others * (mesh.size - 1)
        assert int(divide(MIXED, mesh).state.sum()) == alone + owned_elsewhere + moments + counters


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 16, 17])
def test_pieces_are_those_of_torch_chunk(rows: int) -> None:
    chunks = [chunk.numel() for chunk in torch.zeros(rows, 3).chunk(8)]
    assert piece_sizes((rows, 3), Mesh(2, 8)).tolist() == 2 * (chunks + [0] * (8 - len(chunks)))


def test_bytes_of_a_broadcast_by_hand() -> None:
    moved = traffic(divide(ONE_MATRIX, Mesh(3, 1)))
    assert moved.broadcast_sent.tolist() == [64, 0, 0]  # 15 floats, rounded up to 8 bytes
    assert moved.broadcast_received.tolist() == [0, 64, 64]
    assert not moved.sent.any()


def test_bytes_of_an_exchange_by_hand() -> None:
    # Rows 3 and 2: the second process sends 6 floats of gradient, gets 6 of the update and its flag, 4 bytes in 8.
    moved = traffic(divide(ONE_MATRIX, Mesh(1, 2)))
    assert moved.sent.tolist() == [24 + 8, 24]
    assert moved.received.tolist() == [24, 24 + 8]
    assert not moved.broadcast_sent.any()


def test_bytes_of_rows_and_columns_by_hand() -> None:
    # The owner's row exchanges; then both of its processes send the other row what they hold: 9 and 6 floats.
    moved = traffic(divide(ONE_MATRIX, Mesh(2, 2)))
    assert moved.sent.tolist() == [32, 24, 0, 0]
    assert moved.broadcast_sent.tolist() == [40, 24, 0, 0]
    assert (moved.received + moved.broadcast_received).tolist() == [24, 32, 40, 24]


@pytest.mark.parametrize("placement", ["ddp", "fsdp", "hsdp"])
def test_the_formulas_of_the_docs(placement: str) -> None:
    shapes = gpt_model(64, 8, 128, 32)
    elements = sum(prod(shape) for name, shape in shapes.items() if len(shape) > 1 and name.startswith("h."))
    mesh = mesh_of(placement, 8, 4)
    moved = traffic(divide(shapes, mesh))
    exchanged = elements * (4 + 4) * (mesh.columns - 1) / mesh.columns if mesh.columns > 1 else 0
    broadcast = elements * 4 if mesh.rows > 1 else 0
    assert int((moved.sent + moved.broadcast_sent).sum()) == pytest.approx(exchanged + broadcast, rel=0.01)
    assert int(moved.sent.sum()) == int(moved.received.sum())
    assert int(moved.broadcast_received.sum()) == broadcast * (mesh.rows - 1)


def test_work_is_that_of_the_package_and_only_divided() -> None:
    layouts = [Layout(shape, tuple(range(len(shape)))) for shape in ((6, 4), (4, 3, 2, 2), (9, 3))]
    refreshes = sum(refresh_flops(layout, axis) for layout in layouts for axis in layout.axes)
    elements = sum(map(prod, MIXED.values()))
    for mesh in (Mesh(1, 1), Mesh(3, 1), Mesh(1, 4)):
        division = divide(MIXED, mesh, precondition_frequency=4)
        for variant in (division, stagger(division), stagger(division, 1)):
            step, refresh, adam = work(variant).sum((1, 2)).tolist()
            assert step == 4 * sum(map(step_flops, layouts))
            assert refresh == refreshes
            assert adam == 4 * (elements + (mesh.rows - 1) * (11 * 4 + 5))


def test_predicted_time_by_hand() -> None:
    machine = H100._replace(products=10.0, refreshes=5.0, elements=1.0, fast=16.0, latency=0.5, hop=0.25)
    # (4, 2), refreshed in one of two steps: 8 elements, 6 * 8 * (4 + 2) FLOPs.
    step = 288 / 10 + 8 / 1
    refresh = sum(refresh_flops(Layout((4, 2), (0, 1)), axis) for axis in (0, 1)) / 5
    alone = predict(divide({"w": (4, 2)}, Mesh(1, 1), precondition_frequency=2), machine)
    assert alone.mean == pytest.approx(step + refresh / 2)
    assert alone.worst == pytest.approx(step + refresh)
    # Two such matrices on two processes, 32 bytes each, two broadcasts of one hop.
    both = divide({"a": (4, 2), "b": (4, 2)}, Mesh(2, 1), precondition_frequency=2)
    two = predict(both, machine)
    assert two.exchange == pytest.approx(64 / 16 + 2 * (0.5 + 0.25))
    assert two.mean == pytest.approx(alone.mean + two.exchange)
    assert busy_seconds(both, machine).mean(0).tolist() == pytest.approx(2 * [alone.mean])
    assert predict(both, machine._replace(cores=1)).mean == pytest.approx(2 * alone.mean + two.exchange)


def test_the_models_have_as_many_parameters_as_published() -> None:
    counts = {name: sum(prod(route.shape) for route in model(name).routes) for name in ("GPT-2 124M", "GPT-3 1.3B")}
    assert counts["GPT-2 124M"] == 124_439_808
    assert 1.3e9 < counts["GPT-3 1.3B"] < 1.35e9


@pytest.mark.parametrize("placement", ["ddp", "fsdp"])
def test_eight_processes_share_gpt2_evenly(placement: str) -> None:
    found = balance(divide(model("GPT-2 124M"), mesh_of(placement, 8), precondition_frequency=10))
    assert found.ranks <= 1.15
    assert found.critical_path <= 1.15


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16])
def test_places_per_owner_keep_the_slowest_process_near_the_mean(processes: int) -> None:
    division = divide(model("GPT-2 124M"), mesh_of("fsdp", processes), precondition_frequency=10)
    own, of_one = stagger(division), stagger(division, 1)
    assert balance(own).critical_path <= 1.15
    assert all(0 <= place < 10 for places in own.places for place in places)
    if processes == 1:
        assert own.places == of_one.places
    else:
        assert balance(own).critical_path < balance(of_one).critical_path
