"""A checkpoint continues under any number of processes and any placement as if nothing had happened.

Each set of ``checkpoint_worker`` runs once, at the first test that asks for it, after the sets whose files it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.differences import differences
from tests.distributed.checkpoint_worker import BLOCKS, LR, SETS, SHORT, STEPS, Outcome, Values, work
from tests.distributed.harness import Processes
from tests.distributed.scenarios import MAGNIFIED

#: How far a run may be from another one that summed in another order, relative to the tensor's norm. In 16 bits a
#: weight may round to its neighbour, and moments and bases that did make so much of the updates, at most lr each.
TOLERANCES = {dtype: MAGNIFIED * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
TOLERANCES[torch.bfloat16] = torch.finfo(torch.bfloat16).eps
HALVED = STEPS * LR * torch.finfo(torch.bfloat16).eps

#: The sets that write what a set reads.
FIRST = {
    "4 load": ("4 save", "alone, save"),
    "3 load": ("4 save", "alone, save"),
    "2 load": ("4 save", "alone, save"),
    "alone, load": ("4 save", "alone, save", "2 save"),
}

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("checkpoints")]

Look = Callable[[str, str], list[Outcome]]


@pytest.fixture(scope="module")
def look(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Look:
    """What each process of a set shows of a scenario, by their names."""
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    seen: dict[str, list[dict[str, Outcome]]] = {}

    def run(name: str) -> None:
        if name not in seen:
            for earlier in FIRST.get(name, ()):
                run(earlier)
            size = 1 if name.startswith("alone") else int(name[0])
            seen[name] = processes.run(size, work, folder, name, timeout=60, limit=240)

    def look_up(name: str, scenario: str) -> list[Outcome]:
        run(name)
        for outcomes in seen[name]:
            failed = next(((s, o["error"]) for s, o in outcomes.items() if "error" in o), None)
            if failed is not None and scenario not in outcomes:
                pytest.fail(f"not tried, since {failed[0]} failed: {failed[1].splitlines()[0]}")
            assert "error" not in outcomes[scenario], outcomes[scenario]["error"]
        return [outcomes[scenario] for outcomes in seen[name]]

    return look_up


def distances(a: Values, b: Values) -> dict[str, str]:
    """The tensors that are further apart than rounding explains, and how far."""
    assert a.keys() == b.keys()
    found = {}
    for name in a:
        assert a[name].dtype == b[name].dtype
        tolerance = HALVED if name.startswith("halved") else TOLERANCES[a[name].dtype]
        distance = float((a[name].double() - b[name].double()).norm() / b[name].double().norm())
        if not distance <= tolerance:
            found[name] = f"{distance:.1e}"
    return found


def agree(outcomes: list[Outcome]) -> bool:
    """Whether all processes end with the same weights, bit for bit."""
    return len({outcome["digest"] for outcome in outcomes}) == 1


def saved_in(placement: str) -> str:
    return "alone, save" if placement == "single" else "4 save"


# -- Resuming ---------------------------------------------------------------------------------------------------------


RESUMED = [
    (name, *scenario.removeprefix("resume ").split(" ", 2))
    for name in SETS
    for scenario in SETS[name]
    if scenario.startswith("resume ")
]
#: Loaded by as many processes as saved, in the same placement.
AT_HOME = [case for case in RESUMED if case[1] == f"{case[3]}-{1 if case[0].startswith('alone') else case[0][0]}"]


@pytest.mark.parametrize(("name", "source", "cut", "placement"), AT_HOME)
def test_the_same_world_goes_on_bit_for_bit(name: str, source: str, cut: str, placement: str, look: Look) -> None:
    whole = look(saved_in(placement), f"save_and_go_on {placement}")[0]
    resumed = look(name, f"resume {source} {cut} {placement}")
    assert differences(whole["weights"], resumed[0]["weights"]) == []
    assert differences(whole["state"], resumed[0]["state"]) == []
    assert agree(resumed)


@pytest.mark.parametrize(("name", "source", "cut", "placement"), [case for case in RESUMED if case not in AT_HOME])
def test_another_world_goes_on_as_the_uninterrupted_run(
    name: str, source: str, cut: str, placement: str, look: Look
) -> None:
    origin = source.split("-")[0]
    whole = look(saved_in(origin), f"save_and_go_on {origin}")[0]
    resumed = look(name, f"resume {source} {cut} {placement}")
    assert distances(resumed[0]["weights"], whole["weights"]) == {}
    assert resumed[0]["state"].keys() == whole["state"].keys()
    counters = [key for key in whole["state"] if key.endswith(("step", "steps", "refreshes"))]
    assert [key for key in counters if not torch.equal(whole["state"][key], resumed[0]["state"][key])] == []
    assert agree(resumed)


def test_every_way_is_gone() -> None:
    """Saved on 4 and loaded on 4, 3, 2 and 1, and from and to every placement."""
    ways = {(case[0].split()[0].strip(","), case[1], case[3]) for case in RESUMED}
    assert {size for size, source, _ in ways if source == "fsdp-4"} == {"4", "3", "2", "alone"}
    assert {source for _, source, _ in ways} == {"fsdp-4", "ddp-4", "hsdp-4", "tp-4", "single-1"}
    assert {placement for *_, placement in ways} == {"fsdp", "ddp", "ddp, mesh", "hsdp", "tp", "single"}
    assert len(AT_HOME) == 7


def test_the_cases_are_what_they_are_meant_to_be(look: Look) -> None:
    """Cuts in a warm-up and in a refresh period; gradients that were skipped, late, or never came."""
    state = look("2 save", "save_asynchronously fsdp")[0]["at cut"]
    assert int(state["plain.matrix.refresh_step"]) == 5
    assert int(state["skipped.matrix.skipped_steps"]) == int(state["skipped.bias.skipped_steps"]) == 1
    assert int(state["skipped.matrix.step"]) == 7
    assert int(state["plain.other.step"]) == 6
    assert not [name for name in state if name.startswith(("late", "never"))]
    assert "routed.embedding.GG_0" not in state
    assert state["conv.kernel.GG_1"].shape == (12, 12)
    assert state["bf16.matrix.GG_0"].dtype == torch.float32
    assert state["f64.matrix.GG_0"].dtype == torch.float64
    assert state["halved.matrix.Q_0"].dtype == torch.bfloat16
    assert state["packed.matrix.GG_0"].shape == (21,)
    end = look("4 load", "resume fsdp-4 7 fsdp")[0]["state"]
    assert int(end["late.matrix.step"]) == int(end["late.routed.step"]) == 5
    assert not [name for name in end if name.startswith("never")]
    assert int(end["warm-up.matrix.refresh_step"]) == 10
    assert {name.split(".")[0] for name in end} == BLOCKS.keys() - {"never"}


# -- State dicts in memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["fsdp", "ddp"])
def test_flattened_state_dicts_go_on_bit_for_bit(placement: str, look: Look) -> None:
    outcome = look("2 save", f"go_on_flattened {placement}")[0]
    assert differences(outcome["end"], {key: outcome[key] for key in outcome["end"]}) == []


@pytest.mark.parametrize("placement", ["fsdp", "ddp"])
def test_loading_the_own_state_changes_nothing(placement: str, look: Look) -> None:
    whole = look("2 save", f"uninterrupted {placement}")[0]
    reloaded = look("2 save", f"load_own_in_place {placement}")
    assert differences(whole["weights"], reloaded[0]["weights"]) == []
    assert differences(whole["state"], reloaded[0]["state"]) == []
    assert agree(reloaded)


@pytest.mark.parametrize("placement", ["fsdp", "ddp"])
def test_a_state_dict_is_of_one_moment(placement: str, look: Look) -> None:
    """Steps that follow change none of its tensors: with some that move and others that do not it would be useless."""
    for outcome in look("2 save", f"keep_and_go_on {placement}"):
        assert outcome["size"] > 100
        assert outcome["moved"] == []


@pytest.mark.parametrize("placement", ["fsdp", "ddp"])
def test_asynchronous_saves_have_the_state_of_the_call(placement: str, look: Look) -> None:
    outcome = look("2 save", f"save_asynchronously {placement}")[0]
    assert differences(outcome["at cut"], outcome["loaded"]) == []
    assert differences(outcome["end"]["weights"], outcome["resumed"]["weights"]) == []
    assert differences(outcome["end"]["state"], outcome["resumed"]["state"]) == []


@pytest.mark.parametrize("placement", ["fsdp", "ddp"])
def test_state_dicts_load_whoever_owned_what(placement: str, look: Look) -> None:
    """Groups in another order and added later, by torch's tools; and groups that were added later, by number."""
    for scenario in ("other_owners", "other_owners_save"):
        outcomes = look("2 save", f"{scenario} {placement}")
        assert outcomes[0]["moved"], "no owner has changed, so nothing was tested"
        assert distances(outcomes[0]["weights"], outcomes[0]["end"]["weights"]) == {}
        assert agree(outcomes)


# -- Whole state dicts on one process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["fsdp", "ddp"])
def test_full_state_dicts_have_each_tensor_under_its_name(placement: str, look: Look) -> None:
    first, second = look("2 save", f"save_full {placement}")
    assert differences(first["at cut"], first["gathered"]) == []
    assert second["gathered"] == {}


@pytest.mark.parametrize("how", ["load_full", "load_plain"])
@pytest.mark.parametrize("placement", ["fsdp", "ddp"])
def test_full_state_dicts_go_on_in_one_process(placement: str, how: str, look: Look) -> None:
    whole = look("2 save", f"save_full {placement}")[0]["end"]
    resumed = look("alone, load", f"{how} {placement}-2 single")[0]
    assert distances(resumed["weights"], whole["weights"]) == {}


@pytest.mark.parametrize("how", ["load_full", "load_full_from_rank_0", "load_plain"])
@pytest.mark.parametrize("placement", ["fsdp", "ddp"])
def test_full_state_dicts_of_one_process_go_on_in_several(placement: str, how: str, look: Look) -> None:
    whole = look("alone, save", "save_full single")[0]
    resumed = look("2 load", f"{how} single-1 {placement}")
    expected, weights = whole["end"]["weights"], resumed[0]["weights"]
    if how != "load_plain":
        # torch leaves a parameter without a saved state the one that it made by a step with zero gradients.
        def known(values: Values) -> Values:
            return {name: value for name, value in values.items() if not name.startswith(("late", "never"))}

        assert differences(whole["at cut"], known(resumed[0]["loaded"])) == []
        expected, weights = known(expected), known(weights)
    assert distances(weights, expected) == {}
    assert agree(resumed)


# -- Size, and what goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "placement"),
    [("2 save", "fsdp"), ("2 save", "ddp"), ("4 load", "fsdp"), ("4 load", "hsdp"), ("4 load", "tp")],
)
def test_every_tensor_is_stored_once(name: str, placement: str, look: Look) -> None:
    alone = look("alone, save", "count_bytes single")[0]["here"]
    several = look(name, f"count_bytes {placement}")
    assert alone > 5_000_000  # bytes; headers are small beside it
    assert 0.95 * alone < several[0]["file"] < 1.05 * alone
    if placement != "ddp":  # which has the moments of its embedding everywhere
        assert all(outcome["here"] < 1.05 * alone / len(several) for outcome in several)


@pytest.mark.parametrize("placement", ["fsdp", "ddp"])
def test_state_dicts_that_do_not_fit_are_refused_by_all(placement: str, look: Look) -> None:
    outcomes = look("2 save", f"refuse {placement}")
    for outcome in outcomes:
        for attempt, raised in outcome["raised"].items():
            assert raised.startswith("ValueError: "), attempt
            assert "something has changed" not in raised, attempt
    assert outcomes[0]["raised"] == outcomes[1]["raised"]
    whole = look("2 save", f"uninterrupted {placement}")[0]
    assert differences(whole["weights"], outcomes[0]["weights"]) == []


def test_a_state_dict_that_one_process_asks_for_alone_is_an_error(processes: Processes, tmp_path: Path) -> None:
    outcomes = processes.outcomes(2, work, tmp_path, "2 lonely", timeout=SHORT, limit=60)
    lonely = outcomes[0].result["call_alone"]
    assert "error" not in lonely, lonely["error"]
    assert lonely["raised"].startswith("RuntimeError: ")
    assert lonely["seconds"] < 2 * SHORT
