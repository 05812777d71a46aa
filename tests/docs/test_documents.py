"""The code of the pages runs as it stands, their tables are current, and what they race can be raced."""

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import torch.distributed as dist

from emerging_optimizers.lab.cli import main
from tools import tables

ROOT = Path(__file__).parent.parent.parent


def python_blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [dedent(code) for _, code in re.findall(r"^( *)```python\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)]


PAGES = [str(path.relative_to(ROOT)) for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])]


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_the_code_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_of_one: None
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in python_blocks(page):
        exec(compile(block, page, "exec"), names)


def test_the_task_of_the_race_page_can_be_raced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = python_blocks("docs/race.md")
    (tmp_path / "mytask.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    words = ["race", "--task", "mytask:Regression", "--optimizers", "soap,adamw", "--steps", "20", "--threads", "1"]
    assert main([*words, "--lr", "soap=3e-3,1e-2", "--lr", "adamw=1e-3"]) == 0
    assert (tmp_path / "race-Regression" / "report.html").exists()


def test_the_tables_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_table_that_is_out_of_date_is_seen_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text("Before\n<!-- table: races -->\nold\n<!-- end of table -->\nafter\n")
    assert tables.main(["--check"], tmp_path) == 1
    assert "page.md is out of date" in capsys.readouterr().out
    assert "old" in page.read_text()
    assert tables.main([], tmp_path) == tables.main(["--check"], tmp_path) == 0
    text = page.read_text()
    assert text == f"Before\n<!-- table: races -->\n{tables.races()}\n<!-- end of table -->\nafter\n"


def test_every_table_is_on_a_page() -> None:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert {name for _, name, _ in tables.REGION.findall(text)} == set(tables.TABLES)
