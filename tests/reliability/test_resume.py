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
PHASES = ("whole", "first", "second")


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each of the three processes shows, by phase and case."""
    folder = tmp_path_factory.mktemp("resume")
    for phase in PHASES:
        command = [sys.executable, "-W", "error", "-m", "tests.reliability.resume_worker", phase, str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
    return {phase: torch.load(folder / f"{phase}.pt", weights_only=True) for phase in PHASES}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_bit_for_bit_in_a_new_process(case: str, phases: dict[str, dict[str, Any]]) -> None:
    for phase in PHASES:
        assert "error" not in phases[phase][case], phases[phase][case]["error"]
    whole, second = phases["whole"][case], phases["second"][case]
    assert len(whole[STEPS]["losses"]) == STEPS
    for cut in CUTS:
        assert differences(whole[cut], second[cut]["loaded"]) == []
        assert differences(whole[STEPS], second[cut]["end"]) == []
        assert differences(whole[cut]["model"], whole[STEPS]["model"])  # there was something to get wrong


@pytest.mark.slow
def test_the_cuts_are_where_they_are_meant_to_be(phases: dict[str, dict[str, Any]]) -> None:
    """In a warm-up with no basis yet, and in the middle of a refresh period, of an epoch and of both schedules."""
    early, late = CUTS
    whole = phases["whole"]
    matrix = 6  # hidden.weight

    def refreshed(case: str, step: int) -> int:
        return int(whole[case][step]["optimizer"]["state"][matrix]["refresh_step"])

    assert refreshed("warm-up", early) == 0
    assert (refreshed("warm-up", late), refreshed("warm-up", STEPS)) == (4, 11)
    assert (refreshed("frequency 10", early), refreshed("frequency 10", late)) == (1, 1)
    assert refreshed("frequency 10", STEPS) == 11
    for case in CASES:
        assert 0 < len(whole[case][early]["order"]) < 48
        assert whole[case][early]["scheduler"]["last_epoch"] == early < 4 < late
        assert len({whole[case][step]["optimizer"]["param_groups"][0]["lr"] for step in (early, late, STEPS)}) == 3
