"""``examples/trainers/huggingface_trainer.py``: the groups of each way, and a resume that changes no bit."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.differences import file_differences
from tests.trainers.harness import run_example

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="needs the extra trainers")
NAME = "huggingface_trainer"


def losses(output: str) -> list[str]:
    return [line.split("'")[3] for line in output.splitlines() if line.startswith("{'loss'")]


@pytest.mark.slow
def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    arguments = ["--steps=22", "--save-every=11"]
    whole, resumed, own = run_example(
        NAME,
        ("run", *arguments, "--output", "whole"),
        ("copy", "whole/checkpoint-11", "resumed/checkpoint-11"),
        ("run", *arguments, "--output", "resumed", "--resume"),
        ("run", "--groups=trainer", "--steps=2", "--bf16", "--output", "run"),
        folder=tmp_path,
    )
    assert "SOAP, weight decay 0.01: transformer.h.0.attn.c_attn.weight and 7 more\n" in whole
    assert "AdamW, weight decay 0.01: transformer.wte.weight and 1 more\n" in whole
    assert "AdamW, weight decay 0.0: transformer.h.0.ln_1.weight and 17 more\n" in whole
    assert float(losses(whole)[-1]) < 3.5, "a guess among all bytes is at 5.5"
    assert len(losses(resumed)) == 1, "it goes on after step 11, and reports at 20"
    for file in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        assert file_differences(*(tmp_path / run / "checkpoint-22" / file for run in ("whole", "resumed"))) == [], file

    # The Trainer's own groups, which precondition the embeddings.
    assert "SOAP, weight decay 0.01: transformer.wte.weight and 9 more\n" in own
    assert "AdamW, weight decay 0.0: transformer.h.0.ln_1.weight and 17 more\n" in own
