"""However parameters are spread over processes, training equals that of one process, bit for bit on all of them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import models, scenarios
from tests.distributed.harness import Processes
from tests.distributed.scenarios import MAGNIFIED, PLACEMENTS, Case

#: A gradient missing at the first step, in the middle, of a whole run of steps; of a matrix, a vector, the scalar.
MISSING = frozenset({(0, 1), (0, 5), (3, 0), (4, 0), (5, 8), (6, 6), (7, 4)})
EVERY_3 = {"precondition_frequency": 3}
SEVERAL = [name for name in PLACEMENTS if name != "one process"]

MODES: Mapping[str, dict[str, Any]] = {
    "default": {},
    "KL": {"use_kl_shampoo": True, "precondition_frequency": 2},
    "eigh": {"use_eigh": True, "precondition_frequency": 2},
    "adaptive": {"use_adaptive_criteria": True, "adaptive_update_tolerance": 0.1},
    "adaptive eigh": {"use_adaptive_criteria": True, "adaptive_update_tolerance": 0.1, "use_eigh": True},
    "warm-up": {"adam_warmup_steps": 4, "precondition_frequency": 3},
    "Nesterov": {"use_nesterov": True, **EVERY_3},
    "decoupled decay": {"weight_decay": 0.3, **EVERY_3},
    "l2 decay": {"weight_decay": 0.3, "weight_decay_method": "l2", **EVERY_3},
    "independent decay": {"weight_decay": 0.01, "weight_decay_method": "independent", **EVERY_3},
    "clipped": {"max_update_rms": 0.3, **EVERY_3},
    "maximize": {"maximize": True, **EVERY_3},
    "maximize, l2": {"maximize": True, "weight_decay": 0.3, "weight_decay_method": "l2", **EVERY_3},
    "vectors": {"precondition_1d": True, **EVERY_3},
    "folded": {"merge_dims": True, **EVERY_3},
    "one-sided": {"max_precond_dim": 5, **EVERY_3},
    "AdamW": {"max_precond_dim": 0},
    "clipped AdamW": {"max_precond_dim": 0, "max_update_rms": 0.3},
    "staggered": {"stagger_updates": True, "precondition_frequency": 4},
    "staggered KL": {"stagger_updates": True, "precondition_frequency": 4, "use_kl_shampoo": True},
    "Kronecker": {"second_moment_refresh": "kronecker", **EVERY_3},
    "uncorrected": {"correct_bias": False, **EVERY_3},
    "scheduled": {"precondition_frequency": scenarios.frequency},
    "two power steps": {"power_iter_steps": 2, **EVERY_3},
    "packed": {"pack_factors": True, **EVERY_3},
    "16-bit state": {"state_dtype": torch.bfloat16, "pack_factors": True, **EVERY_3},
    "no policy": {"nonfinite": "propagate", **EVERY_3},
    "no NaN": {"nonfinite": "raise", **EVERY_3},
}
#: Each mode is tried in one of the first two, and in one of the others, in turn.
IN_TURN = ("ddp of 2", "shard 0 of 2", "tensor parallel", "hsdp", "plain and shards", "rows and columns", "ddp of 4")

GROUPS = (
    ((0, 4), {"lr": 0.02, "precondition_frequency": 2}),
    ((5, 6, 1), {"weight_decay": 0.1, "precondition_1d": True}),
    ((2, 3), {"max_precond_dim": 0, "max_update_rms": 0.2}),
    ((7, 8), {"use_kl_shampoo": True, "weight_decay_method": "l2", "weight_decay": 0.2, "stagger_updates": True}),
)

SPOILT = {
    (1, 0): "first",
    (2, 1): "last",
    (2, 5): "first",
    (3, 5): "last",
    (4, 4): "all",
    (5, 6): "all",
    (0, 8): "first",
}
SPOILT |= {(6, 0): "large", (7, 5): "large"}


NEVER = frozenset({0, 1})


def cases() -> dict[str, Case]:
    """All by name."""
    found: dict[str, Case] = {}

    def add(placement: str, name: str, options: dict[str, Any], steps: int, **what: Any) -> None:
        found[f"{placement}, {name}"] = Case(placement, options, steps=steps, **{"missing": MISSING, **what})

    for placement in SEVERAL:
        add(placement, "gradients missing", EVERY_3, 30 if "2" in placement else 10, never=frozenset({3}))
    for place, (mode, options) in enumerate(MODES.items()):
        for placement in (IN_TURN[place % 2], IN_TURN[2 + place % (len(IN_TURN) - 2)]):
            add(placement, mode, options, 9)
    for placement in ("ddp of 2", "shard 0 of 2", "hsdp", "rows and columns"):
        add(placement, "several groups", {}, 9, groups=GROUPS)
        add(placement, "many rounds", EVERY_3, 9, chunk=20)
        add(placement, "a round each", EVERY_3, 6, chunk=1)
        add(placement, "NaN skipped", EVERY_3, 9, spoilt=SPOILT, chunk=60)
        add(placement, "NaN raised", {"nonfinite": "raise"}, 8, spoilt=SPOILT)
        add(placement, "a group added", EVERY_3, 8, late=5)
        add(placement, "copied", EVERY_3, 8, copied=4)
    for placement in ("ddp of 2", "shard 0 of 2"):
        add(placement, "NaN skipped with l2", MODES["l2 decay"], 8, spoilt=SPOILT)
        spoilt = {(2, 5): "first", (2, 7): "last"}
        add(placement, "NaN propagated", {"nonfinite": "propagate", "use_eigh": True}, 4, spoilt=spoilt)
        add(placement, "no matrix", {}, 3, shapes=((5,), ()))
        add(placement, "never a gradient", {}, 2, shapes=((5, 4), (3,)), never=NEVER)
        add(placement, "an empty tensor", {}, 3, shapes=((5, 4), (0, 3), (4, 0), (0,)))
        add(placement, "float32", EVERY_3, 30, dtype=torch.float32)
        add(placement, "float16", EVERY_3, 6, dtype=torch.float16)
        for mode in ("l2 decay", "KL", "clipped", "16-bit state"):
            add(placement, f"bfloat16, {mode}", MODES[mode], 9, dtype=torch.bfloat16)
    add("hsdp", "float32", EVERY_3, 30, dtype=torch.float32)
    add("hsdp", "bfloat16", EVERY_3, 9, dtype=torch.bfloat16)
    for placement in ("ddp of 2", "shard 0 of 2", "hsdp"):  # a new optimizer would choose other owners
        shapes = ((4, 3), (5, 3), (7,), (6, 6), (9, 2), (20, 20))
        add(placement, "copied with its owners", {}, 7, missing=frozenset(), shapes=shapes, late=3, copied=5)
    for placement in ("ddp of 4", "shard 0 of 4", "hsdp"):
        add(placement, "fewer matrices than processes", {}, 6, shapes=((2, 4), (3,)))
    return found


CASES = cases()


def alone(case: Case) -> Case:
    """The same in one process, with plain parameters."""
    staggered = "stagger_updates" in repr(case)
    processes = PLACEMENTS[case.placement][0] if staggered else 0
    return replace(case, placement="one process", chunk=None, stagger_processes=processes)


Results = Callable[[str], tuple[dict[str, Any], list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def results(processes: Processes) -> Results:
    """What a case comes to in one process, and in each that takes part; all cases of a placement run in one group."""
    known: dict[str, dict[str, Any]] = {}

    def run(size: int, cases: list[Case]) -> list[list[Any]]:
        found = processes.run(size, scenarios.train_all, cases, limit=300)
        return [list(one) for one in zip(*found, strict=False)]  # shorter where one has failed

    def look(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        placement = CASES[name].placement
        if placement not in known:
            cases = {other: case for other, case in CASES.items() if case.placement == placement}
            plain = run(1, [alone(case) for case in cases.values()])
            placed = run(PLACEMENTS[placement][0], list(cases.values()))
            known[placement] = dict(zip(cases, zip(plain, placed, strict=False), strict=False))
        assert name in known[placement], "not tried, since another case of this placement has failed"
        (wanted,), found = known[placement][name]
        assert not any(isinstance(one, str) for one in (wanted, *found)), (wanted, *found)
        return wanted, [one for one in found if one is not None]

    return look


@pytest.mark.xdist_group("placements")
@pytest.mark.parametrize("name", CASES)
def test_training_equals_that_of_one_process(name: str, results: Results) -> None:
    case, (wanted, found) = CASES[name], results(name)
    for result in found:
        for index, (weight, other) in enumerate(zip(result["weights"], wanted["weights"], strict=True)):
            require_close(weight, other, case, f"parameter {index}")
        assert result["errors"] == wanted["errors"]
        assert list(result["state"]) == list(wanted["state"])
        for number, state in wanted["state"].items():
            assert list(result["state"][number]) == list(state)
            for key, value in state.items():
                require_close(result["state"][number][key], value, case, f"{key} of parameter {number}")
        assert_bit_identical(result["weights"], found[0]["weights"])


def require_close(found: Tensor, wanted: Tensor, case: Case, name: str) -> None:
    """Relative to the largest entry, to rounding; NaN and Inf in the same places."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    finite = wanted.isfinite()
    assert torch.equal(finite, found.isfinite()), name
    narrow = case.options.get("state_dtype") or case.dtype
    roundings = 4 if narrow.itemsize == 2 else MAGNIFIED  # in 16 bits a neighbour, of what another has made of it
    if finite.any():
        error = (found.double() - wanted.double())[finite].abs().max()
        largest = wanted.double()[finite].abs().max()
        assert error <= roundings * torch.finfo(narrow).eps * largest, f"{name} is off by {error / largest:.1e}"


def assert_bit_identical(some: list[Tensor], others: list[Tensor]) -> None:
    """Zero's sign and NaN's payload included."""
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


HALF_THE_DIGITS = torch.finfo(torch.float64).eps ** 0.5  # are left of a rounding that training feeds back
MODELS = {"DDP": 2, "DDP of 4": 4, "fully_shard": 2, "fully_shard of 4": 4, "HSDP": 4, "TP": 2, "FSDP and TP": 4}


@pytest.mark.parametrize("engine", MODELS)
def test_a_model_trained_by_a_real_engine_equals_one_process_on_the_joint_batch(
    engine: str, processes: Processes
) -> None:
    (wanted,) = processes.run(1, models.train_model, "one process")
    found = processes.run(MODELS[engine], models.train_model, engine)
    for result in found:
        assert list(result["weights"]) == list(wanted["weights"])
        for name, weight in wanted["weights"].items():
            error = (result["weights"][name] - weight).abs().max() / weight.abs().max()
            assert error <= HALF_THE_DIGITS, f"{name} is off by {error:.1e}"
        assert result["losses"] == pytest.approx(wanted["losses"], rel=HALF_THE_DIGITS)
        assert_bit_identical(list(result["weights"].values()), list(found[0]["weights"].values()))
    assert wanted["losses"][-1] < 0.5 * wanted["losses"][0]


@pytest.mark.parametrize(("shards", "splits"), [(2, 2), (2, 3), (2, 4), (3, 2), (4, 2)])
def test_the_piece_of_a_process_is_what_fully_shard_over_tensor_parallelism_gives_it(
    shards: int, splits: int, processes: Processes
) -> None:
    (wrong,) = processes.run(1, models.wrong_pieces, shards, splits)
    assert wrong == []
