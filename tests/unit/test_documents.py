"""The code in README and docs runs as it stands."""

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent.parent


def python_blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_readme_example_trains() -> None:
    block, several_processes = python_blocks("README.md")
    torch.manual_seed(0)
    names: dict = {"dist": dist}
    exec(compile(block, "README.md", "exec"), names)
    assert names["loss"].item() < 0.01
    assert len(names["optimizer"].param_groups) == 2
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        exec(compile(several_processes, "README.md", "exec"), names)
    finally:
        dist.destroy_process_group()


def test_the_task_in_the_docs_can_be_raced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emerging_optimizers.lab.cli import main

    (block,) = python_blocks("docs/race.md")
    (tmp_path / "mytask.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    words = ["race", "--task", "mytask:Regression", "--optimizers", "soap,adamw", "--steps", "20", "--threads", "1"]
    assert main([*words, "--lr", "soap=3e-3,1e-2", "--lr", "adamw=1e-3"]) == 0
    assert (tmp_path / "race-Regression" / "report.html").exists()


def test_every_test_that_the_reliability_page_names_exists() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| What", "| ---"))]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, name in named:
            tree = ast.parse((ROOT / "tests" / "reliability" / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, name


def test_the_example_of_the_planners_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = python_blocks("docs/planner.md")
    exec(compile(block, "docs/planner.md", "exec"), {})
    assert "True [('pack_factors', True), ('state_dtype', torch.bfloat16)]" in capsys.readouterr().out


def test_the_output_on_the_planners_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    from emerging_optimizers.lab.cli import main

    page = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"```\nsoap (.*?)\n```", page)
    (shown,) = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    assert main(command.split()) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown.splitlines()
