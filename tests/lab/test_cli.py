"""The command as its user meets it: files it leaves, mistakes answered in one line, Ctrl-C and resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emerging_optimizers import __version__
from emerging_optimizers.lab.cli import main
from emerging_optimizers.lab.common import StopRequest
from emerging_optimizers.lab.race.race import Race, Run

from .conftest import complaint


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_a_short_race_leaves_results_picture_and_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["race", "--task", "tiny_tasks:Tiny", "--steps", "20", "--seeds", "0,1", "--lr", "soap=1e-2,3e-2"]
    assert main([*words, "--threads", "1"]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    assert "not tuned for this task" in out.out
    assert "wins" in out.out or "level" in out.out
    assert "fewer than 2 axes" in out.out  # the routing and its reasons
    left = folder / "race-Tiny"
    assert sorted(path.name for path in left.iterdir()) == ["loss.png", "report.html", "results.json"]
    assert (left / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (left / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "Machine" in page
    found = results(left)
    assert found["finished"] is True
    assert found["verdict"] in out.out.replace("\n", " ")
    assert [(r["optimizer"], r["lr"]) for r in found["runs"]][:3] == [("soap", 0.01), ("soap", 0.03),
                                                                     ("soap-kronecker", 0.003)]  # fmt: skip
    assert len(found["runs"]) == 10
    assert {line["optimizer"] for line in found["summary"]} == {"soap", "soap-kronecker", "adamw", "muon"}
    assert str(folder) not in (left / "results.json").read_text()

    assert main([*words, "--threads", "1"]) == 0  # a folder of ours is overwritten
    again = results(left)
    assert [r["train_loss"] for r in again["runs"]] == [r["train_loss"] for r in found["runs"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "2"], True),
        (["--steps", "2", "--task", "digits", "--lr", "soap=0.1"], False),
        (["--steps", "300", "--task", "digits"], False),
    ],
)
def test_tuned_rates_at_other_steps_are_remarked_upon(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], said: bool
) -> None:
    if "300" in words:  # the set-up is enough
        monkeypatch.setattr(Race, "play", lambda race: iter(()))
    assert main(["race", "--optimizers", "soap", "--threads", "1", "--out", "here", *words]) == 0
    task, usual = ("digits", 300) if "digits" in words else ("charlm", 500)  # the default
    note = f"The learning rates are tuned for {usual} steps; at 2 the order may differ."
    assert (note in capsys.readouterr().out) is said
    assert (note in (folder / "here" / "report.html").read_text()) is said
    found = results(folder / "here")
    assert found["note"] == (note if said else None)
    assert found["task"]["name"] == task


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--task", "digit"],
            "unknown task 'digit': did you mean 'digits'? choose charlm, digits, pinn or package.module:TaskClass",
        ),
        (["--task", "tiny_tasks:torch"], "module 'tiny_tasks' has no class 'torch'"),
        (["--task", "tiny_tasks:NoSeed"], "task 'tiny_tasks:NoSeed' cannot be constructed with seed=0"),
        (["--task", "tiny_tasks:Half"], "lacks the method(s) loss, validate"),
        (["--optimizers", "soap,adamv"], "--optimizers: unknown optimizer 'adamv': did you mean 'adamw'?"),
        (["--optimizers", "soap,soap"], "an optimizer is there twice"),
        (["--stps", "3"], "--stps"),
        (["--steps", "0"], "--steps 0: expected a whole number of at least 1"),
        (["--steps", "many"], "--steps many: expected a whole number of at least 1"),
        (["--steps", 5000 * "9"], "expected a whole number of at least 1"),
        (["--threads", "99999"], "--threads 99999: expected a whole number from 1 to 1,024"),
        (["--frequency", "-3"], "--frequency -3: expected a whole number of at least 1"),
        (["--task"], "Option '--task' requires an argument. See soap race --help."),
        (["--task", ""], "unknown task ''"),
        (["--task", "nowhere:Task"], "importing 'nowhere' failed (ModuleNotFoundError"),
        (["--task", "nowhere:Task"], "on Python's path; start in its folder)"),
        (["--task", "pkg/mod.py:Task"], "task 'pkg/mod.py:Task': write pkg.mod:Task"),
        (["--task", "tiny_tasks:Missing"], "module 'tiny_tasks' has no class 'Missing'"),
        (["--optimizers", ""], "--optimizers: unknown optimizer ''"),
        (["--seeds", ""], "--seeds : expected different whole numbers"),
        (["--text", "foreign"], "Is a directory; name a readable text file"),
        (["--text", "bytes"], "not UTF-8 (byte 2); convert it first"),
        (["--task", "tiny_tasks:Tiny", "--out", "short.txt/in"], "--out short.txt/in: cannot be made (Not a directory"),
        (["--resume", "nowhere"], "--resume nowhere: nothing to resume there"),
        (["--resume", "short.txt"], "--resume short.txt: nothing to resume there"),
        (["--lr", "soap"], "--lr soap: expected optimizer=rate"),
        (["--lr", "soap=fast"], "--lr soap=fast: expected optimizer=rate"),
        (["--lr", "soap=-1"], "--lr soap=-1: expected optimizer=rate"),
        (["--lr", "soup=1e-3"], "--lr: unknown optimizer 'soup': did you mean 'soap'?"),
        (["--lr", "kl-soap=1e-3"], "kl-soap does not race; add it with --optimizers"),
        (["--seeds", "0,x"], "--seeds 0,x: expected different whole numbers"),
        (["--seeds", "1,1"], "--seeds 1,1: expected different whole numbers"),
        (["--text", "missing.txt"], "missing.txt: No such file or directory; name a readable text file"),
        (["--task", "digits", "--text", "short.txt"], "--text belongs to the task charlm"),
        (["--text", "short.txt"], "5 characters are too few"),
        (["--task", "tiny_tasks:Tiny", "--out", "foreign"], "--out foreign: the folder is not empty and not a race's"),
        (["--task", "tiny_tasks:Tiny", "--out", "short.txt"], "--out short.txt: cannot be made"),
        (["--resume", "early"], "early: it was stopped before its first checkpoint, which comes after"),
        (["--resume", "foreign"], "--resume foreign: nothing to resume there"),
        (["--resume", "foreign", "--steps", "3"], "leave out --steps"),
        (["--resume", "foreign", "--overwrite"], "leave out --overwrite"),
        (["extra"], "extra"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("precious")
    (folder / "early").mkdir()
    (folder / "early" / "results.json").write_text('{"finished": false}')
    (folder / "short.txt").write_text("short")
    (folder / "bytes").write_bytes(b"ab\xff\xfe")
    assert said in complaint(capsys, "race", *words)
    assert [path.name for path in (folder / "foreign").iterdir()] == ["thesis.tex"]
    assert not list(folder.glob("race-*"))


def test_a_folder_that_goes_away_during_the_race_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_play = Race.play

    def play(race: Race) -> Iterator[Run]:
        shutil.rmtree(folder / "race-Tiny")
        return real_play(race)

    monkeypatch.setattr(Race, "play", play)
    words = ["race", "--task", "tiny_tasks:Tiny", "--steps", "2", "--threads", "1"]
    assert "No such file or directory" in complaint(capsys, *words)


def test_a_diverged_run_is_reported_as_diverged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--optimizers", "soap,adamw", "--lr", "adamw=1e9", "--lr", "soap=1e-2", "--threads", "1"]
    assert main(["race", "--task", "tiny_tasks:Tiny", *words]) == 0
    assert "Diverged, at the learning rates given: AdamW." in capsys.readouterr().out
    found = results(folder / "race-Tiny")
    assert found["summary"][1]["best"] is None
    assert "diverged" in (folder / "race-Tiny" / "report.html").read_text()


def test_without_the_extra_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['typer'] = None; import emerging_optimizers.lab.cli"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr == 'soap: this command needs an extra; in your clone of the repository: pip install ".[lab]"\n'


def test_a_mistake_before_the_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such command 'rase'. Did you mean 'race'? See soap --help." in complaint(capsys, "rase")
    assert "No such option: --verson" in complaint(capsys, "--verson")


def test_no_words_at_all_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    wanted = capsys.readouterr().out
    assert main([]) == 0
    out = capsys.readouterr()
    assert out.out == wanted
    assert out.err == ""


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"soap {__version__}\n"


@pytest.mark.parametrize("command", [[], ["race"], ["plan"], ["inspect"]])
def test_help_reads_well_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "..." in line and "[OPTIONS]" not in line]  # a summary that was cut short
    assert not [line for line in lines if "range>" in line or "<=" in line]  # how typer shows a number with limits
    assert len(lines) <= 45


def test_help_does_not_wait_for_torch() -> None:
    look = (
        "import sys; from emerging_optimizers.lab.cli import main;"
        "[main([*command, '--help']) for command in ([], ['race'], ['plan'], ['inspect'])];"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'sklearn', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert all(word in done.stdout for word in ("race", "--optimizers", "--memory", "CHECKPOINT"))
    assert done.stdout.endswith("[]\n")


def test_a_stopped_race_leaves_a_report_and_resumes_bit_for_bit(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["race", "--task", "tiny_tasks:Slow", "--optimizers", "soap-kronecker,muon", "--threads", "1"]
    command = [sys.executable, "-m", "emerging_optimizers.lab", *words, "--out", "cut"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:  # well into the race, but far from its end
            if line.startswith("step 10/30"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 130
    assert "soap race --resume cut" in rest
    assert "Stopped early; so far:" in rest
    names = ["checkpoint.pt", "loss.png", "report.html", "results.json"]
    assert sorted(path.name for path in (folder / "cut").iterdir()) == names
    stopped = results(folder / "cut")
    assert stopped["finished"] is False
    assert all(0 < len(run["train_loss"]) < 30 for run in stopped["runs"])

    capsys.readouterr()
    instead = "go on with soap race --resume cut, or start over with --overwrite"  # hours of work may be in it
    assert f"--out cut: a race was stopped there; {instead}" in complaint(capsys, *words, "--out", "cut")
    shutil.copytree("cut", "again")
    assert main([*words, "--steps", "2", "--out", "again", "--overwrite"]) == 0
    assert sorted(path.name for path in (folder / "again").iterdir()) == names[1:]

    assert main(["race", "--resume", "cut"]) == 0
    assert main([*words, "--out", "whole"]) == 0
    cut, whole = results(folder / "cut"), results(folder / "whole")
    assert cut["finished"] is True
    assert not (folder / "cut" / "checkpoint.pt").exists()
    for a, b in zip(cut["runs"], whole["runs"], strict=True):
        assert len(a["train_loss"]) == 30
        assert (a["train_loss"], a["validation"]) == (b["train_loss"], b["validation"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request_until_the_second_one(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received == number
        assert signal.getsignal(number) is signal.SIG_DFL
    assert signal.getsignal(number) is before
