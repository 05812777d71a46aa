"""Ranks that differ get an error that says how, on every rank; a rank that dies or hangs stops the others in time."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from emerging_optimizers.soap import SOAP
from tests.distributed import failures
from tests.distributed.failures import SHAPES
from tests.distributed.harness import Outcome, Processes
from tests.distributed.scenarios import PLACEMENTS, Case

LIST = "The processes have different parameters: first difference at number"
NAMES = ["first.weight", "second.weight", "bias"]

#: What ranks 0 and 1 construct from, by keywords of ``failures.construct``, and what the error says.
LISTS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "another shape": (
        {},
        {"shapes": ((4, 3), (5, 4), (7,))},
        [f"{LIST} 1: rank 0 has parameter 1 of its group, shape (5, 3)", "; rank 1 has parameter 1", "shape (5, 4)"],
    ),
    "one parameter fewer": (
        {},
        {"shapes": SHAPES[:2]},
        [f"{LIST} 2: rank 0 has parameter 2 of its group, shape (7,)", "rank 1 has nothing more"],
    ),
    "one parameter more": (
        {"shapes": SHAPES[:2]},
        {},
        [f"{LIST} 2: rank 0 has nothing more; rank 1 has parameter 2 of its group, shape (7,)"],
    ),
    "another order": (
        {"names": NAMES},
        {"shapes": SHAPES[1::-1] + SHAPES[2:], "names": [*NAMES[1::-1], NAMES[2]]},
        [f"{LIST} 0: rank 0 has parameter 'first.weight'", "rank 1 has parameter 'second.weight'"],
    ),
    "another name": (
        {"names": NAMES},
        {"names": [*NAMES[:2], "gain"]},
        [f"{LIST} 2: rank 0 has parameter 'bias'", "rank 1 has parameter 'gain'"],
    ),
    "another dtype": ({}, {"dtype": torch.bfloat16}, [f"{LIST} 0", "torch.float32", "torch.bfloat16"]),
    "a frozen parameter": ({}, {"requires_grad": False}, [f"{LIST} 0", "requires_grad=True", "requires_grad=False"]),
}
#: Values on ranks 0 and 1.
OPTIONS: dict[str, tuple[Any, Any]] = {
    "max_precond_dim": (10000, 4),
    "precondition_1d": (False, True),
    "merge_dims": (False, True),
    "precondition_frequency": (10, 5),
    "state_dtype": (None, torch.bfloat16),
    "nonfinite": ("skip", "raise"),
    "max_update_rms": (0.0, 0.2),
    "weight_decay_method": ("l2", "decoupled"),
    "betas": ((0.9, 0.95), (0.9, 0.99)),
}
each_way = pytest.mark.parametrize("sharded", [False, True], ids=["plain", "shards"])


def require_raised(outcome: Outcome) -> None:
    """It ended with a RuntimeError: it did not crash, go on alone, or wait until it was killed."""
    assert outcome.code == 0
    assert outcome.error is not None
    assert outcome.error.startswith("RuntimeError: ")


def require_all_say(outcomes: list[Outcome], *texts: str) -> None:
    """Every rank ended with the same RuntimeError, which has these texts."""
    for outcome in outcomes:
        require_raised(outcome)
        assert outcome.error == outcomes[0].error
        for text in texts:
            assert text in outcome.error


@each_way
@pytest.mark.parametrize("difference", LISTS)
def test_ranks_with_different_parameters_learn_the_first_difference_at_construction(
    difference: str, sharded: bool, processes: Processes
) -> None:
    mine, theirs, texts = LISTS[difference]
    require_all_say(processes.outcomes(2, failures.construct, sharded, mine, theirs), *texts)


@each_way
@pytest.mark.parametrize("option", OPTIONS)
def test_ranks_with_other_options_learn_it_at_construction(option: str, sharded: bool, processes: Processes) -> None:
    mine, theirs = OPTIONS[option]
    ranks = [{"options": {option: value}} for value in (mine, theirs)]
    require_all_say(
        processes.outcomes(2, failures.construct, sharded, *ranks),
        "The processes have different options: first difference at number",
        f"rank 0 has {option}={mine!r}",
        f"rank 1 has {option}={theirs!r}",
    )


def test_the_first_rank_that_differs_is_named(processes: Processes) -> None:
    outcomes = processes.outcomes(4, failures.construct, False, {}, {}, {"shapes": ((4, 3), (5, 4), (7,))}, {})
    require_all_say(outcomes, "rank 0 has parameter 1 of its group, shape (5, 3)", "rank 2 has parameter 1")


@each_way
def test_ranks_that_add_different_groups_learn_it(sharded: bool, processes: Processes) -> None:
    outcomes = processes.outcomes(2, failures.add_other_groups, sharded)
    require_all_say(outcomes, f"{LIST} 3", "shape (3, 3)", "shape (4, 4)")


@each_way
@pytest.mark.parametrize("index", range(3))
def test_ranks_that_differ_in_their_first_gradients_learn_it(sharded: bool, index: int, processes: Processes) -> None:
    outcomes = processes.outcomes(2, failures.lose_a_gradient, sharded, 0, index, {})
    name = f"parameter {index} of its group, shape {SHAPES[index]}"
    require_all_say(
        outcomes,
        "The processes have different gradients: first difference at number "
        f"{index}: rank 0 has {name} has a gradient; rank 1 has {name} has no gradient",
    )


def test_ranks_that_differ_in_their_first_gradients_learn_it_with_raise_too(processes: Processes) -> None:
    options = {"nonfinite": "raise"}
    outcomes = processes.outcomes(2, failures.lose_a_gradient, False, 0, 1, options, timeout=2)
    require_all_say(outcomes, "The processes have different gradients: first difference at number 1")


def test_ranks_of_which_one_adds_a_group_all_stop_in_time(processes: Processes) -> None:
    for outcome in processes.outcomes(2, failures.add_a_group_on_one_rank, timeout=2):
        require_raised(outcome)


@pytest.mark.parametrize(("sharded", "index"), [(False, 0), (False, 2), (True, 1)])
def test_ranks_that_come_to_differ_in_their_gradients_all_stop_in_time(
    sharded: bool, index: int, processes: Processes
) -> None:
    outcomes = processes.outcomes(2, failures.lose_a_gradient, sharded, 1, index, {}, timeout=3, limit=30)
    for outcome in outcomes:
        require_raised(outcome)


#: Placement, collective, which call of it, and what rank 1 does there.
DEATHS = [
    ("ddp of 2", "broadcast", 0, "die before"),
    ("ddp of 2", "broadcast", 7, "die before"),
    ("ddp of 2", "broadcast", 8, "die after"),
    ("ddp of 4", "broadcast", 9, "die before"),
    ("shard 0 of 2", "all_to_all_single", 4, "die before"),
    ("shard 0 of 2", "all_to_all_single", 5, "die after"),
    ("shard 0 of 2", "all_reduce", 3, "die before"),
    ("shard 0 of 4", "all_to_all_single", 5, "die before"),
    ("hsdp", "all_to_all_single", 4, "die before"),
    ("hsdp", "broadcast", 5, "die after"),
    ("ddp of 2", "broadcast", 5, "hang"),
    ("shard 0 of 2", "all_to_all_single", 5, "hang"),
]


@pytest.mark.parametrize(("placement", "collective", "call", "what"), DEATHS)
def test_a_rank_that_dies_or_hangs_in_a_step_makes_the_others_raise(
    placement: str, collective: str, call: int, what: str, processes: Processes
) -> None:
    outcomes = processes.outcomes(
        PLACEMENTS[placement][0],
        failures.train_until,
        Case(placement, chunk=60),
        collective,
        call,
        what,
        timeout=3 if what == "hang" else 20,
        limit=6 if what == "hang" else 40,
    )
    assert outcomes[1].code == -9
    for rank, outcome in enumerate(outcomes):
        if rank != 1:
            require_raised(outcome)


@pytest.mark.parametrize("placement", ["ddp of 2", "shard 0 of 2", "hsdp", "rows and columns"])
def test_a_step_that_raises_for_a_nan_has_changed_nothing_on_any_rank(placement: str, processes: Processes) -> None:
    for steps in processes.run(PLACEMENTS[placement][0], failures.raise_on_nan, placement):
        assert [step["said"].split(",")[0] for step in steps] == [
            "returned None",
            "returned None",
            "RuntimeError: The gradient of parameter 8 of its group",
            "RuntimeError: The gradient of parameter 5 of its group",
            "RuntimeError: The gradient of parameter 1 of its group",
            "returned None",
        ]
        for step in steps:
            (weights, state), (later_weights, later_state) = step["before"], step["after"]
            same = all(torch.equal(a, b) for a, b in zip(weights, later_weights, strict=True))
            same_state = state.keys() == later_state.keys() and all(
                torch.equal(value, later_state[number][key]) for number in state for key, value in state[number].items()
            )
            assert (same, same_state) == ((False, False) if step["said"] == "returned None" else (True, True))


WRONG_GROUPS = {
    "text": "TypeError: process_group must be a ProcessGroup, a DeviceMesh or None, got str",
    "ranks": "TypeError: process_group must be a ProcessGroup, a DeviceMesh or None, got list",
    "mesh of two dimensions": "ValueError: process_group must be a mesh of one dimension, got ",
    "not a member": "ValueError: process_group must be a group that this process is in",
    "not a member's number": "ValueError: process_group must be a group that this process is in",
}


def test_impossible_process_groups_are_refused(processes: Processes) -> None:
    for said in processes.run(2, failures.wrong_groups):
        for name, text in WRONG_GROUPS.items():
            assert said[name].startswith(text)


def test_a_group_of_another_type_is_refused_without_processes() -> None:
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup, a DeviceMesh or None, got int"):
        SOAP([nn.Parameter(torch.zeros(2, 2))], lr=0.1, process_group=2)


def test_an_optimizer_with_a_group_cannot_be_pickled(processes: Processes) -> None:
    for said in processes.run(2, failures.pickled):
        assert set(said) == {"group", "mesh"}
        for text in said.values():
            assert text.startswith(
                "TypeError: a SOAP optimizer with a process_group cannot be pickled; save its state_d"
            )


@each_way
def test_the_file_of_one_rank_is_refused_by_the_others(sharded: bool, processes: Processes, tmp_path: Path) -> None:
    outcomes = processes.run(2, failures.load_files, tmp_path, sharded)
    assert [outcome["own"] for outcome in outcomes] == ["returned None"] * 2, "a file per rank is whole"
    assert outcomes[1]["other"].startswith("ValueError: the loaded state 'exp_avg' of parameter 0 of its group")
    assert "share of another process alone" in outcomes[1]["other"]
    alone = SOAP([nn.Parameter(torch.zeros(shape)) for shape in SHAPES], lr=0.1)
    with pytest.raises(ValueError, match="share of another process alone"):
        alone.load_state_dict(torch.load(tmp_path / "rank 0.pt", weights_only=True))
    assert not alone.state


def test_a_parameter_in_summands_is_refused(processes: Processes) -> None:
    for said in processes.run(2, failures.partial_parameter):
        assert said.startswith("ValueError: a parameter must be sharded or replicated on its mesh, got (Partial")


def test_a_gradient_in_another_placement_is_brought_into_the_parameters(processes: Processes) -> None:
    for otherwise_placed, alike_placed in processes.run(2, failures.partial_gradient):
        assert torch.equal(otherwise_placed, alike_placed)


def test_parameters_flattened_by_fsdp1_are_told_of(processes: Processes) -> None:
    for said in processes.run(2, failures.flattened):
        assert len(said) == 1
        assert "is a vector of 10 elements that FSDP1 made: its matrices are gone" in said[0]
        assert "fully_shard" in said[0]


@pytest.mark.parametrize(("size", "told"), [(2**20 + 1, True), (2**20, False)])
def test_a_vector_as_long_as_a_model_is_told_of(size: int, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "emerging_optimizers"):
        SOAP([("flat", nn.Parameter(torch.zeros(size)))], lr=0.1)
    assert [f"'flat' is a vector of {size} elements: its" in text for text in caplog.messages] == [True] * told


def test_an_expert_that_is_idle_on_its_processes_alone_does_not_stop_the_others(processes: Processes) -> None:
    busy = processes.run(4, failures.train_experts, None, timeout=3)
    idle = processes.run(4, failures.train_experts, 2, timeout=3)
    for rank in range(4):
        for step, (with_all, with_one_idle) in enumerate(zip(busy[rank], idle[rank], strict=True)):
            assert torch.equal(with_all[0], with_one_idle[0])
            assert torch.equal(with_all[1], with_one_idle[1]) == (rank > 1 or step < 2)


@each_way
def test_a_nan_that_one_rank_has_seen_makes_all_raise(sharded: bool, processes: Processes) -> None:
    for said, unchanged in processes.run(2, failures.raise_on_nan_of_one, sharded, timeout=5):
        assert said.startswith("RuntimeError: The gradient of parameter 1 of its group, shape (5, 3) has NaN")
        assert unchanged
