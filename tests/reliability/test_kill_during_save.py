"""What `kill -9`, a full disk and a damaged file do to a race that is being saved: nothing that cannot be resumed."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from emerging_optimizers.lab import cli
from emerging_optimizers.lab.common import LabError
from emerging_optimizers.lab.race import checkpoint, command
from emerging_optimizers.lab.race.race import FORMAT, Race
from tests.lab.conftest import TINY
from tests.reliability.kill_worker import digest, losses, options, stamped, version_of

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
KILLS = 100


def play(race: Race, steps: int) -> Race:
    for _ in race.play():
        if sum(run.step for run in race.runs) == steps:
            break
    return race


# --- kill -9 -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What the process that kills savers reports, and the folder that it worked in."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "tiny_tasks.py").write_text(TINY)
    command = [sys.executable, "-m", "tests.reliability.kill_worker", str(folder), str(KILLS), "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.slow
def test_of_a_hundred_kills_at_random_moments_none_loses_a_checkpoint(
    killed: tuple[Path, dict[str, Any]], record_property: Any
) -> None:
    found = killed[1]["random"]
    for name, value in found.items():
        record_property(name, value)
    print(found)  # shown with -s or -rP
    assert found["lost"] == []
    assert found["kills"] >= KILLS
    assert found["inside"] >= KILLS / 2
    assert found["at the file"] >= KILLS / 2
    assert found["leftovers"] > KILLS / 20  # files that were cut off, each overwritten by the save after it


@pytest.mark.slow
def test_a_race_that_was_killed_a_hundred_times_equals_one_that_never_was(
    killed: tuple[Path, dict[str, Any]], folder: Path
) -> None:
    state = checkpoint.load(killed[0] / "random")
    steps = version_of(state)
    assert steps == killed[1]["random"]["saves"] > 50
    whole = play(Race(options(steps=2000)), steps)
    assert losses(whole) == losses(Race.restore(state))
    assert version_of(stamped(whole)) == steps


@pytest.mark.slow
def test_a_kill_at_any_operation_of_a_save_leaves_the_old_or_the_new_version(
    killed: tuple[Path, dict[str, Any]],
) -> None:
    found = killed[1]["everywhere"]
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
        assert entry["end"] == found["whole"], entry["moment"]
    assert [".checkpoint.pt.tmp" in entry["files"] for entry in found["left"]].count(True) == renamed - 1


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half is on the disk", "after replace"])
def test_the_command_resumes_after_a_kill_and_leaves_nothing_of_it(
    killed: tuple[Path, dict[str, Any]], folder: Path, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    at = [entry["moment"] for entry in killed[1]["everywhere"]["left"]].index(moment) + 1
    shutil.copytree(killed[0] / "everywhere" / f"kill-{at}", folder / "race")
    assert cli.main(["race", "--resume", "race"]) == 0
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in (folder / "race").iterdir()) == ["loss.png", "report.html", "results.json"]
    runs = json.loads((folder / "race" / "results.json").read_text())["runs"]
    assert [[run["train_loss"], run["validation"]] for run in runs] == killed[1]["everywhere"]["whole"]


@pytest.mark.slow
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


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The system takes no byte beyond `size` of a file: EFBIG, as Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Every file that is opened for writing takes `size` bytes, then the disk is full."""
    real = Path.open

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > size:
                super().write(memoryview(data)[: size - self.tell()])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def path_open(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        return Full(path, mode) if "w" in mode else real(path, mode, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", path_open)
        yield


DISKS = {"File too large": file_size_limit, "No space left on device": full_disk}


@pytest.mark.parametrize("size", [0, 1, 4096, 20_000])
@pytest.mark.parametrize("reason", DISKS)
def test_a_full_disk_is_an_oserror_that_leaves_the_old_checkpoint_alone(folder: Path, reason: str, size: int) -> None:
    race = play(Race(options(steps=15)), 4)
    checkpoint.save(folder, stamped(race))
    old = (folder / checkpoint.CHECKPOINT).read_bytes()
    assert len(old) > 20_000
    play(race, 5)
    with DISKS[reason](size), pytest.raises(OSError, match=reason):
        checkpoint.save(folder, stamped(race))
    assert (folder / checkpoint.CHECKPOINT).read_bytes() == old
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["checkpoint.pt", "tiny_tasks.py"]
    checkpoint.save(folder, stamped(race))  # there is room again
    assert version_of(checkpoint.load(folder)) == 5


@pytest.mark.parametrize("reason", DISKS)
def test_a_disk_that_fills_up_during_a_race_is_one_line_and_the_race_resumes_later(
    folder: Path, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "race").mkdir()
    checkpoint.save(folder / "race", play(Race(options(steps=15)), 7).state())
    old = (folder / "race" / checkpoint.CHECKPOINT).read_bytes()
    monkeypatch.setattr(command, "SECONDS_BETWEEN_SAVES", -1.0)
    with DISKS[reason](20_000):
        assert cli.main(["race", "--resume", "race"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("soap: ")
    assert reason in err
    assert err.count("\n") == 1
    assert [path.name for path in (folder / "race").iterdir()] == [checkpoint.CHECKPOINT]
    assert (folder / "race" / checkpoint.CHECKPOINT).read_bytes() == old
    assert cli.main(["race", "--resume", "race"]) == 0


# --- a file that is not what was written ---------------------------------------------------------------------------


@pytest.fixture
def saved(folder: Path) -> tuple[Path, bytes, str]:
    """A folder with a checkpoint, its bytes and the hash of its content."""
    state = play(Race(options(steps=15)), 7).state()
    checkpoint.save(folder, state)
    return folder / checkpoint.CHECKPOINT, (folder / checkpoint.CHECKPOINT).read_bytes(), digest(state)


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
    assert err.startswith(f"soap: --resume {path.parent}: {checkpoint.CHECKPOINT} is not ")
    assert err.endswith("; start a new race\n")
    assert err.count("\n") == 1
    return True


def test_a_truncated_checkpoint_is_refused_wherever_it_ends(
    saved: tuple[Path, bytes, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path, data, _ = saved
    ends = {0, 1, 3, 4, 64, len(data) - 22, len(data) - 2, len(data) - 1, *range(0, len(data), len(data) // 30)}
    for end in sorted(ends):
        path.write_bytes(data[:end])
        assert is_refused(path, capsys), end


def test_flipped_bits_are_refused_or_change_nothing(
    saved: tuple[Path, bytes, str], capsys: pytest.CaptureFixture[str]
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
            assert digest(checkpoint.load(path.parent)) == content, place
    assert harmless < len(places) // 2


def test_a_flipped_bit_of_any_tensor_is_refused(saved: tuple[Path, bytes, str]) -> None:
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
            torch.save({**play(Race(options(steps=15)), 7).state(), "more": [{"deep": (bomb,)}]}, path)
        case "tensor subclass state":
            parameter = torch.nn.Parameter(torch.zeros(2))
            parameter.bomb = bomb  # type: ignore[attr-defined]
            torch.save({"format": FORMAT, "options": parameter}, path)
    assert is_refused(path, capsys)
    assert not (folder / "exploded").exists()
    with open(path, "rb") as file:  # the bomb is live: an unsafe load sets it off
        pickle.load(file) if form == "pickle" else torch.load(file, weights_only=False)
    assert (folder / "exploded").exists()


def spoiled(state: dict[str, Any], how: str) -> Any:
    match how:
        case "not a dict":
            return [1, 2, 3]
        case "empty":
            return {}
        case "other format":
            return {**state, "format": "soap-race-checkpoint/0"}
        case "no options":
            return {key: value for key, value in state.items() if key != "options"}
        case "no runs":
            return {key: value for key, value in state.items() if key != "runs"}
        case "options of a list":
            return {**state, "options": ["task"]}
        case "unknown option":
            return {**state, "options": {**state["options"], "gpu": 1}}
        case "threads":
            return {**state, "options": {**state["options"], "threads": 0}}
        case "rates":
            return {**state, "options": {**state["options"], "learning_rates": {"soup": (1e-2,)}}}
        case "task":
            return {**state, "options": {**state["options"], "task": 7}}
        case "one run too few":
            return {**state, "runs": state["runs"][:1]}
        case "another model":
            return {**state, "runs": [{**run, "model": {"0.weight": torch.zeros(1)}} for run in state["runs"]]}
        case "record":
            return {**state, "runs": [{**run, "record": {"optimizer": "soap"}} for run in state["runs"]]}
        case "optimizer":
            return {**state, "runs": [{**run, "optimizer": {}} for run in state["runs"]]}
    raise ValueError(how)


@pytest.mark.parametrize(
    "how",
    ["not a dict", "empty", "other format", "no options", "no runs", "options of a list", "unknown option", "threads",
     "rates", "task", "one run too few", "another model", "record", "optimizer"],
)  # fmt: skip
def test_a_whole_file_that_is_no_race_is_refused_in_one_line(
    folder: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(folder, spoiled(play(Race(options(steps=15)), 7).state(), how))
    before = (folder / checkpoint.CHECKPOINT).read_bytes()
    assert cli.main(["race", "--resume", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("soap: ")
    assert err.endswith("; start a new race\n")
    assert err.count("\n") == 1
    assert (folder / checkpoint.CHECKPOINT).read_bytes() == before
