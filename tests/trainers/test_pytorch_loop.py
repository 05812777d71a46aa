"""``examples/trainers/pytorch_loop.py``: it learns, and a resumed run ends with the bits of the uninterrupted one."""

from pathlib import Path

import pytest

from tests.differences import file_differences
from tests.trainers.harness import run_example


def losses(output: str) -> list[float]:
    return [float(line.split()[3]) for line in output.splitlines() if line.startswith("step ")]


@pytest.mark.slow
def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    # 27 steps: refreshes before and after the checkpoint at 17, of which none is at 17 itself.
    arguments = ["--steps=27", "--save-every=17", "--log-every=1", "--dtype=bfloat16"]
    whole, resumed = run_example(
        "pytorch_loop",
        ("run", *arguments, "--checkpoints", "whole"),
        ("copy", "whole/step-000017.pt", "resumed/step-000017.pt"),
        ("run", *arguments, "--checkpoints", "resumed", "--resume"),
        folder=tmp_path,
    )
    assert "0.weight          256x16  adamw   embedding" in whole
    assert "2.weight         128x256  soap    matrix" in whole
    assert losses(whole)[-1] < 3.5 < 5 < losses(whole)[0], "a guess among all bytes is at 5.5"
    assert losses(resumed) == losses(whole)[17:]
    assert file_differences(*(tmp_path / run / "step-000027.pt" for run in ("whole", "resumed"))) == []
