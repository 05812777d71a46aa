"""What `kill -9`, a full disk and a damaged file do to a race that is being saved: nothing that cannot be resumed."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from emerging_optimizers.lab import cli
from emerging_optimizers.lab.common import LabError
from emerging_optimizers.lab.race import checkpoint, command
from emerging_optimizers.lab.race.race import FORMAT
from tests.differences import differences
from tests.lab.conftest import TINY
from tests.reliability.kill_worker import new_race, play

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}

pytestmark = pytest.mark.xdist_group("kill")


# --- kill -9 -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the process that kills savers, and what it reports."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "tiny_tasks.py").write_text(TINY)
    command = [sys.executable, "-m", "tests.reliability.kill_worker", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_a_kill_at_any_operation_of_a_save_leaves_the_old_or_the_new_version(
    killed: tuple[Path, dict[str, Any]],
) -> None:
    found = killed[1]
    moments = [entry["moment"] for entry in found["left"]]
    steps = ["open", "write", "write", "flush", "fsync", "close", "replace", "open folder", "fsync", "close folder"]
    wanted = [f"{when} {step}" for step in steps for when in ("before", "after")]
    assert [moment for moment in moments if moment != "half is on the disk"] == wanted
    assert len(moments) == len(wanted) + 1
    renamed = moments.index("after replace")
    assert [entry["version"] for entry in found["left"]] == ["old"] * renamed + ["new"] * (len(moments) - renamed)
    names = ["checkpoint.pt", "results.json"]
    for entry in found["left"]:
        assert set(entry["files"]) - {".checkpoint.pt.tmp"} == set(names)
        assert (entry["after the next save"], entry["then"]) == (names, "new"), entry["moment"]
    assert [".checkpoint.pt.tmp" in entry["files"] for entry in found["left"]].count(True) == renamed - 1


@pytest.mark.parametrize("moment", ["half is on the disk", "after replace"])
def test_the_command_resumes_after_a_kill_and_leaves_nothing_of_it(
    killed: tuple[Path, dict[str, Any]], folder: Path, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    at = [entry["moment"] for entry in killed[1]["left"]].index(moment) + 1
    shutil.copytree(killed[0] / f"kill-{at}", folder / "race")
    assert cli.main(["race", "--resume", "race"]) == 0
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in (folder / "race").iterdir()) == ["loss.png", "report.html", "results.json"]
    runs = json.loads((folder / "race" / "results.json").read_text())["runs"]
    assert [[run["train_loss"], run["validation"]] for run in runs] == killed[1]["whole"]


def test_a_killed_command_goes_on_bit_for_bit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["race", "--task", "tiny_tasks:Slow", "--optimizers", "soap,adamw", "--seeds", "0,1", "--threads", "1"]
    start = (
        "import sys; from emerging_optimizers.lab import cli; from emerging_optimizers.lab.race import command;"
        "command.SECONDS_BETWEEN_SAVES = 0; sys.exit(cli.main())"
    )
    command = [sys.executable, "-c", start, *words, "--out", "cut"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        for line in process.stdout:  # well into the race, but far from its end
            if line.startswith("step 10/30"):
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    found = checkpoint.load(folder / "cut")
    assert 30 < sum(len(run["record"]["train_loss"]) for run in found["runs"]) < 120
    assert not (folder / "cut" / "report.html").exists()

    assert cli.main(["race", "--resume", "cut"]) == 0
    assert cli.main([*words, "--out", "whole"]) == 0
    assert capsys.readouterr().err == ""
    cut, whole = (json.loads((folder / name / "results.json").read_text()) for name in ("cut", "whole"))
    assert cut["finished"] is True
    assert not list((folder / "cut").glob("*checkpoint*"))
    for a, b in zip(cut["runs"], whole["runs"], strict=True):
        assert len(a["train_loss"]) == 30
        assert all(a[key] == b[key] for key in ("train_loss", "validation", "eval_steps", "diverged"))


# --- a full disk ---------------------------------------------------------------------------------------------------


def assert_one_line(err: str, text: str) -> None:
    assert err.startswith("soap: ")
    assert text in err
    assert err.count("\n") == 1


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """The system takes no byte beyond `size` of a file: EFBIG, as Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1, 4096, 20_000])
def test_a_full_disk_is_an_oserror_that_leaves_the_old_checkpoint_alone(folder: Path, size: int) -> None:
    race = play(new_race(), 4)
    checkpoint.save(folder, race.state())
    old = (folder / checkpoint.CHECKPOINT).read_bytes()
    assert len(old) > 20_000
    play(race, 5)
    with full_disk(size), pytest.raises(OSError, match="File too large"):
        checkpoint.save(folder, race.state())
    assert (folder / checkpoint.CHECKPOINT).read_bytes() == old
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["checkpoint.pt", "tiny_tasks.py"]
    checkpoint.save(folder, race.state())  # there is room again
    assert differences(checkpoint.load(folder), race.state()) == []


def test_a_disk_that_fills_up_during_a_race_is_one_line_and_the_race_resumes_later(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "race").mkdir()
    checkpoint.save(folder / "race", play(new_race(), 7).state())
    old = (folder / "race" / checkpoint.CHECKPOINT).read_bytes()
    monkeypatch.setattr(command, "SECONDS_BETWEEN_SAVES", -1.0)
    with full_disk(20_000):
        assert cli.main(["race", "--resume", "race"]) == 2
    assert_one_line(capsys.readouterr().err, "File too large")
    assert [path.name for path in (folder / "race").iterdir()] == [checkpoint.CHECKPOINT]
    assert (folder / "race" / checkpoint.CHECKPOINT).read_bytes() == old
    assert cli.main(["race", "--resume", "race"]) == 0


# --- a file that is not what was written ---------------------------------------------------------------------------


@pytest.fixture
def saved(folder: Path) -> tuple[Path, bytes, dict[str, Any]]:
    """A checkpoint, its bytes and its content."""
    state = play(new_race(), 7).state()
    checkpoint.save(folder, state)
    return folder / checkpoint.CHECKPOINT, (folder / checkpoint.CHECKPOINT).read_bytes(), state


def is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    """Tell whether `--resume` answers with one line and nothing else; False if the file can be loaded."""
    try:
        checkpoint.load(path.parent)
    except LabError:
        pass
    else:
        return False
    assert cli.main(["race", "--resume", str(path.parent)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line(err, "; start a new race\n")
    return True


def test_a_truncated_checkpoint_is_refused_wherever_it_ends(
    saved: tuple[Path, bytes, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, data, _ = saved
    ends = {0, 1, 3, 4, 64, len(data) - 22, len(data) - 2, len(data) - 1, *range(0, len(data), len(data) // 30)}
    for end in sorted(ends):
        path.write_bytes(data[:end])
        assert is_refused(path, capsys), end


def test_flipped_bits_are_refused_or_change_nothing(
    saved: tuple[Path, bytes, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, data, content = saved
    chance = random.Random(0)
    places = [*range(40), *range(len(data) - 40, len(data)), *(chance.randrange(len(data)) for _ in range(100))]
    harmless = 0
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        if not is_refused(path, capsys):  # padding between the parts of the archive, or a date
            harmless += 1
            assert differences(checkpoint.load(path.parent), content) == [], place
    assert harmless < len(places) // 2


def test_a_flipped_bit_of_any_tensor_is_refused(saved: tuple[Path, bytes, dict[str, Any]]) -> None:
    path, data, _ = saved
    weights = [tensor for run in checkpoint.load(path.parent)["runs"] for tensor in run["model"].values()]
    assert len(weights) == 12
    for tensor in weights:
        raw = tensor.numpy().tobytes()
        damaged = bytearray(data)
        damaged[data.index(raw) + len(raw) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(LabError, match="not a readable checkpoint"):
            checkpoint.load(path.parent)


class Malicious:
    """A pickle that would make a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy", "inside a race", "tensor subclass state"])
def test_a_malicious_pickle_is_refused_and_does_nothing(
    folder: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bomb, path = Malicious(folder / "exploded"), folder / checkpoint.CHECKPOINT
    match form:
        case "pickle":
            path.write_bytes(pickle.dumps(bomb))
        case "zip":
            torch.save(bomb, path)
        case "legacy":
            torch.save({"format": FORMAT, "options": bomb}, path, _use_new_zipfile_serialization=False)
        case "inside a race":
            torch.save({**play(new_race(), 7).state(), "more": [{"deep": (bomb,)}]}, path)
        case "tensor subclass state":
            parameter = torch.nn.Parameter(torch.zeros(2))
            parameter.bomb = bomb  # type: ignore[attr-defined]
            torch.save({"format": FORMAT, "options": parameter}, path)
    assert is_refused(path, capsys)
    assert not (folder / "exploded").exists()
    with open(path, "rb") as file:  # the bomb is live: an unsafe load sets it off
        pickle.load(file) if form == "pickle" else torch.load(file, weights_only=False)
    assert (folder / "exploded").exists()


def with_option(state: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return {**state, "options": {**state["options"], **changed}}


def with_runs(state: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return {**state, "runs": [{**run, **changed} for run in state["runs"]]}


SPOILED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "not a dict": lambda state: [1, 2, 3],
    "empty": lambda state: {},
    "other format": lambda state: {**state, "format": "soap-race-checkpoint/0"},
    "no options": lambda state: {key: value for key, value in state.items() if key != "options"},
    "no runs": lambda state: {key: value for key, value in state.items() if key != "runs"},
    "options of a list": lambda state: {**state, "options": ["task"]},
    "unknown option": lambda state: with_option(state, gpu=1),
    "threads": lambda state: with_option(state, threads=0),
    "rates": lambda state: with_option(state, learning_rates={"soup": (1e-2,)}),
    "task": lambda state: with_option(state, task=7),
    "one run too few": lambda state: {**state, "runs": state["runs"][:1]},
    "another model": lambda state: with_runs(state, model={"0.weight": torch.zeros(1)}),
    "record": lambda state: with_runs(state, record={"optimizer": "soap"}),
    "optimizer": lambda state: with_runs(state, optimizer={}),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_whole_file_that_is_no_race_is_refused_in_one_line(
    folder: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(folder, SPOILED[how](play(new_race(), 7).state()))
    before = (folder / checkpoint.CHECKPOINT).read_bytes()
    assert cli.main(["race", "--resume", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line(err, "; start a new race\n")
    assert (folder / checkpoint.CHECKPOINT).read_bytes() == before
