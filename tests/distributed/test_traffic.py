"""How many bytes each process sends in a step, counted where torch sends them, is what the shapes say."""

from dataclasses import replace
from math import prod

import pytest
import torch

from tests.distributed import scenarios
from tests.distributed.harness import Processes
from tests.distributed.scenarios import PLACEMENTS, Case

WIDTH = 16
BLOCK = ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH))
SHAPES = (*BLOCK, *BLOCK, (WIDTH,), (4 * WIDTH,))
MATRICES = [shape for shape in SHAPES if len(shape) == 2]
VECTORS = len(SHAPES) - len(MATRICES)
ELEMENTS = sum(map(prod, MATRICES))
DTYPES = [torch.float32, torch.bfloat16, torch.float64]

#: Sent by "sent" (the library's own count), and by the wrapped functions of torch.distributed.
Counts = dict[str, dict[str, int]]


def counted(processes: Processes, case: Case) -> list[Counts]:
    """What each process sent in one step that is not the first."""
    found = processes.run(PLACEMENTS[case.placement][0], scenarios.traffic, replace(case, steps=3))
    for one in found:
        for kind in ("all_to_all", "broadcast"):
            assert one["library"].get(kind, 0) == one["torch"].get(kind, 0)
        assert set(one["torch"]) <= {"all_to_all", "broadcast", "all_reduce"}
    return found


def total(counts: list[Counts], kind: str) -> int:
    return sum(one["torch"].get(kind, 0) for one in counts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("placement", ["ddp of 2", "ddp of 4", "replicate"])
def test_replicas_get_every_new_matrix_once_from_its_owner(
    placement: str, dtype: torch.dtype, processes: Processes
) -> None:
    counts = counted(processes, Case(placement, shapes=SHAPES, dtype=dtype))
    assert total(counts, "broadcast") == pytest.approx(ELEMENTS * dtype.itemsize, rel=0.05)
    assert total(counts, "all_to_all") == 0
    assert total(counts, "all_reduce") == 0
    assert all(one["torch"].get("broadcast", 0) > 0 for one in counts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("placement", ["shard 0 of 2", "shard 0 of 4", "shard 1", "rows and columns"])
def test_shards_send_gradients_in_their_dtype_and_get_updates_in_the_working_dtype(
    placement: str, dtype: torch.dtype, processes: Processes
) -> None:
    counts = counted(processes, Case(placement, shapes=SHAPES, dtype=dtype))
    size = PLACEMENTS[placement][0]
    working = max(dtype.itemsize, 4)
    # The owner has 1 / n of the gradient already and keeps 1 / n of the update; with each piece of that goes a flag,
    # which the alignment makes eight bytes.
    flags = len(MATRICES) * (size - 1) * 8
    wanted = ELEMENTS * (size - 1) / size * (dtype.itemsize + working) + flags
    assert total(counts, "all_to_all") == pytest.approx(wanted, rel=0.05)
    assert total(counts, "broadcast") == 0
    assert total(counts, "all_reduce") == size * 8 * VECTORS  # squared norms, for "skip"


def test_each_process_sends_the_pieces_that_others_own_and_gets_its_own_back(processes: Processes) -> None:
    case = Case("shard 0 of 4", shapes=SHAPES, dtype=torch.bfloat16)
    owned = [one["owned"] for one in processes.run(4, scenarios.traffic, replace(case, steps=3))]
    assert sum(owned) == ELEMENTS
    for mine, one in zip(owned, counted(processes, case), strict=True):
        wanted = (ELEMENTS - mine) / 4 * 2 + mine * 3 / 4 * 4
        assert one["torch"]["all_to_all"] == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_of_shards_divide_gradients_updates_and_weights(dtype: torch.dtype, processes: Processes) -> None:
    counts = counted(processes, Case("hsdp", shapes=SHAPES, dtype=dtype))
    # Within the owner's row of two half of a matrix goes one way, half of the update the other; then both processes
    # of that row hand their half of the weights to the other row.
    flags = len(MATRICES) * 8
    assert total(counts, "all_to_all") == pytest.approx(ELEMENTS / 2 * (dtype.itemsize + 4) + flags, rel=0.05)
    assert total(counts, "broadcast") == pytest.approx(ELEMENTS * dtype.itemsize, rel=0.05)


@pytest.mark.parametrize(("nonfinite", "norms"), [("skip", 1), ("propagate", 0)])
@pytest.mark.parametrize("placement", ["ddp of 2", "shard 0 of 2", "hsdp"])
def test_tensors_with_adamw_stay_where_they_are(
    placement: str, nonfinite: str, norms: int, processes: Processes
) -> None:
    options = {"max_precond_dim": 0, "nonfinite": nonfinite}
    counts = counted(processes, Case(placement, options, shapes=SHAPES))
    pieces = placement != "ddp of 2"
    for one in counts:
        assert sum(one["torch"].values()) == pieces * norms * 8 * len(SHAPES)


def test_a_matrix_without_a_gradient_does_not_travel(processes: Processes) -> None:
    for placement in ("ddp of 2", "shard 0 of 2"):
        case = Case(placement, shapes=SHAPES)
        everything = counted(processes, case)
        rest = counted(processes, replace(case, missing=frozenset({(2, 0), (2, 4)})))  # (48, 16) twice
        kind = "broadcast" if placement == "ddp of 2" else "all_to_all"
        halves = 1 if placement == "ddp of 2" else 2 / 2
        missing = 2 * prod(BLOCK[0]) * 8 * halves
        assert total(everything, kind) - total(rest, kind) == pytest.approx(missing, rel=0.05)


def test_many_rounds_send_no_more_than_one(processes: Processes) -> None:
    for placement in ("ddp of 2", "shard 0 of 2"):
        case = Case(placement, shapes=SHAPES)
        one, many = counted(processes, case), counted(processes, replace(case, chunk=300))
        for kind in ("broadcast", "all_to_all"):
            assert total(one, kind) == total(many, kind)
        assert many[0]["calls"] > one[0]["calls"]
