"""``examples/trainers/accelerate_loop.py`` on two processes, and a resume in the middle of an epoch."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.differences import file_differences
from tests.trainers.harness import run_example

pytestmark = pytest.mark.skipif(find_spec("accelerate") is None, reason="needs the extra trainers")
NAME = "accelerate_loop"


def losses(output: str) -> list[float]:
    return [float(line.split()[3]) for line in output.splitlines() if line.startswith("step ")]


@pytest.mark.slow
def test_a_resumed_run_on_two_processes_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    # 4,807 examples are 9 batches of 256 for each of two processes, hence 4 steps: step 6 is in the second epoch.
    arguments = ["--steps=12", "--save-every=6", "--batch-size=256", "--stride=97", "--log-every=1"]
    arguments.append("--mixed-precision=bf16")
    # Not in one process: a process group cannot be made twice.
    (whole,) = run_example(NAME, ("run", *arguments, "--checkpoints", "whole"), folder=tmp_path, processes=2)
    copied = ("copy", "whole/step-000006", "resumed/step-000006")
    again = ("run", *arguments, "--checkpoints", "resumed", "--resume")
    (resumed,) = run_example(NAME, copied, again, folder=tmp_path, processes=2)
    assert len(losses(whole)) == 12, "one process reports"
    assert losses(whole)[-1] < 4.5 < 5 < losses(whole)[0], "a guess among all bytes is at 5.5"
    assert "step    12  loss" in whole
    assert "learning rate 0.00000" in whole.splitlines()[-1], "the schedule ends with the run"
    assert losses(resumed) == losses(whole)[6:]
    for file in ("model.safetensors", "optimizer.bin", "scheduler.bin"):
        assert file_differences(*(tmp_path / run / "step-000012" / file for run in ("whole", "resumed"))) == [], file
