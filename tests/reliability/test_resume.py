"""A training that stops, is saved, and goes on in another process equals one that never stopped, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.differences import differences
from tests.reliability.resume_worker import CASES, CUTS, STEPS

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("resume")]
PHASES = ("first", "second")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes show, and the checkpoints between them."""
    folder = tmp_path_factory.mktemp("resume")
    for phase in PHASES:
        command = [sys.executable, "-W", "error", "-m", "tests.reliability.resume_worker", phase, str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def phases(folder: Path) -> list[dict[str, Any]]:
    """What each of the two processes shows, by case."""
    return [torch.load(folder / f"{phase}.pt", weights_only=True) for phase in PHASES]


def saved_at(cut: int, case: str, folder: Path) -> dict[str, Any]:
    return torch.load(folder / f"{list(CASES).index(case)}-{cut}.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_bit_for_bit_in_a_new_process(case: str, phases: list[dict[str, Any]], folder: Path) -> None:
    first, second = (phase[case] for phase in phases)
    for shown in (first, second):
        assert "error" not in shown, shown["error"]
    assert len(first["losses"]) == STEPS
    for cut in CUTS:
        saved = saved_at(cut, case, folder)
        assert differences(saved, second[cut]["loaded"]) == []
        assert differences(first, second[cut]["end"]) == []
        assert differences(saved["model"], first["model"])  # there was something to get wrong


def test_the_cuts_are_where_they_are_meant_to_be(phases: list[dict[str, Any]], folder: Path) -> None:
    """In a warm-up with no basis yet, and in the middle of a refresh period, of an epoch and of both schedules."""
    early, late = CUTS
    matrix = 6  # hidden.weight

    def refreshed(case: str) -> tuple[int, ...]:
        states = [*(saved_at(cut, case, folder) for cut in CUTS), phases[0][case]]
        return tuple(int(state["optimizer"]["state"][matrix]["refresh_step"]) for state in states)

    assert refreshed("warm-up") == (0, 4, 11)
    assert refreshed("frequency 10") == (1, 1, 11)
    for case in CASES:
        saved = saved_at(early, case, folder)
        assert 0 < len(saved["order"]) < 48
        assert saved["scheduler"]["last_epoch"] == early < 4 < late
        assert len({state["optimizer"]["param_groups"][0]["lr"] for state in (saved, phases[0][case])}) == 2
