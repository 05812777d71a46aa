"""The code in README and docs runs as it stands."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from emerging_optimizers.soap import SOAP

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
        named = re.findall(r"`(unit/)?(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for folder, file, name in named:
            tree = ast.parse((ROOT / "tests" / (folder or "reliability") / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, name


def test_everything_that_the_algorithm_page_names_exists() -> None:
    page = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    suite = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    tests = set(re.findall(r"`(test_\w+)`", page))
    assert len(tests) > 25
    for name in tests:
        assert f"def {name}(" in suite, name
    for path in re.findall(r"`((?:benchmarks|tests)/[\w/.]+)`", page):
        assert (ROOT / path).exists(), path
    modules = {path.stem: path for path in (ROOT / "emerging_optimizers/soap").glob("*.py")}
    modules |= {path.stem: path for path in (ROOT / "emerging_optimizers").glob("*.py")}
    names = [name.split(".") for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", page) if name != "p.grad"]
    assert len(names) > 15
    for module, *attributes in names:
        assert module in modules, module
        here: object = importlib.import_module(".".join(modules[module].relative_to(ROOT).with_suffix("").parts))
        for attribute in attributes:
            assert hasattr(here, attribute), f"{module}.{'.'.join(attributes)}"
            here = getattr(here, attribute)


def test_the_algorithm_page_has_every_key_of_the_state_and_no_option_that_is_none() -> None:
    page = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    optimizer = SOAP([parameter], lr=0.1)
    optimizer.step()

    def names(header: str, column: int) -> set[str]:
        (table,) = re.findall(rf"^\| {header} .*?\n\n", page, flags=re.DOTALL | re.MULTILINE)
        return {name for row in table.splitlines()[2:-1] for name in re.findall(r"`(\w+)`", row.split("|")[column])}

    assert names("Symbol", 2) == set(optimizer.state[parameter])
    assert len(names("Option", 1)) > 5
    assert names("Option", 1) <= set(optimizer.defaults)


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
