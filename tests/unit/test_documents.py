"""The code in README and docs runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


def python_blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_readme_example_trains() -> None:
    (block,) = python_blocks("README.md")
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["loss"].item() < 0.01
    assert len(names["optimizer"].param_groups) == 2


def test_the_task_in_the_docs_can_be_raced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emerging_optimizers.lab.cli import main

    (block,) = python_blocks("docs/race.md")
    (tmp_path / "mytask.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    words = ["race", "--task", "mytask:Regression", "--optimizers", "soap,adamw", "--steps", "20", "--threads", "1"]
    assert main([*words, "--lr", "soap=3e-3,1e-2", "--lr", "adamw=1e-3"]) == 0
    assert (tmp_path / "race-Regression" / "report.html").exists()
