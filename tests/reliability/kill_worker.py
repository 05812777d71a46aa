"""Kills a save at every moment. ``python -m tests.reliability.kill_worker FOLDER`` prints what it left, as JSON.

A process of its own, because it forks: torch is imported once, and no thread of torch's runs yet when a child begins.
The parent never calls ``backward``, after which a fork could not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from emerging_optimizers.lab.race import checkpoint, report
from emerging_optimizers.lab.race.race import Options, Race
from tests.differences import differences


def new_race() -> Race:
    rates = {"soap-kronecker": (1e-2,), "adamw": (1e-2,)}
    return Race(Options("tiny_tasks:Tiny", None, rates, (0,), 15, frequency=4, threads=1))


def play(race: Race, steps: int) -> Race:
    """Play until the runs have done so many steps together, or to the end."""
    for _ in race.play():
        if sum(run.step for run in race.runs) == steps:
            break
    return race


def in_a_child(work: Callable[[], object]) -> int:
    """Run `work` in a child; its exit code, or minus the signal that killed it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        work()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


class Stepwise:
    """A file whose every operation is two moments to be killed in, and whose writes come to the disk in two halves."""

    def __init__(self, file: BinaryIO, around: Callable[..., Any], moment: Callable[[str], None]) -> None:
        self._file, self._around, self._moment = file, around, moment

    def __enter__(self) -> Stepwise:
        return self

    def __exit__(self, *_: object) -> None:
        self._around("close", self._file.close)

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        half = len(data) // 2
        self._around("write", self._file.write, data[:half])
        self._file.flush()
        self._moment("half is on the disk")
        self._around("write", self._file.write, data[half:])
        return len(data)

    def flush(self) -> None:
        self._around("flush", self._file.flush)

    def fileno(self) -> int:
        return self._file.fileno()


def save_and_die(folder: Path, state: dict[str, Any], at: int, log: Path) -> None:
    """Save, and be killed at the moment number `at` (from 1); 0 is never, and writes the moments' names to `log`."""
    moments: list[str] = []

    def moment(name: str) -> None:
        moments.append(name)
        if len(moments) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(name: str, operation: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        moment(f"before {name}")
        result = operation(*arguments, **named)
        moment(f"after {name}")
        return result

    real_open = Path.open

    def path_open(path: Path, *arguments: Any, **named: Any) -> Stepwise:
        return Stepwise(around("open", real_open, path, *arguments, **named), around, moment)

    Path.open = path_open  # type: ignore[method-assign,assignment]
    for name in ("fsync", "replace", "open", "close"):
        real = getattr(os, name)
        label = {"open": "open folder", "close": "close folder"}.get(name, name)
        setattr(os, name, lambda *a, _real=real, _label=label, **k: around(_label, _real, *a, **k))
    checkpoint.save(folder, state)
    Path.open = real_open  # type: ignore[method-assign]
    log.write_text(json.dumps(moments))


def make_versions(folder: Path) -> None:
    """Leave a checkpoint of an early step in old/, one of a later step in new/, and how the race ends in whole.json."""
    race = new_race()
    for name, steps in (("old", 7), ("new", 8)):
        play(race, steps)
        (folder / name).mkdir()
        report.write_results(folder / name, report.collect(race))
        checkpoint.save(folder / name, race.state())
    play(race, -1)
    (folder / "whole.json").write_text(
        json.dumps([[run.record.train_loss, run.record.validation] for run in race.runs])
    )


def kill_everywhere(folder: Path) -> dict[str, Any]:
    """Kill a save at each of its moments in turn; look at what is left, and save over it."""
    assert in_a_child(lambda: make_versions(folder)) == 0
    states = {name: checkpoint.load(folder / name) for name in ("old", "new")}

    def version_in(place: Path) -> str:
        found = checkpoint.load(place)
        return " and ".join(name for name, state in states.items() if not differences(state, found))

    log = folder / "moments.json"
    shutil.copytree(folder / "old", folder / "alive")
    assert in_a_child(lambda: save_and_die(folder / "alive", states["new"], 0, log)) == 0
    left = []
    for at, name in enumerate(json.loads(log.read_text()), start=1):
        place, over = folder / f"kill-{at}", folder / f"over-{at}"
        shutil.copytree(folder / "old", place)
        code = in_a_child(lambda at=at, place=place: save_and_die(place, states["new"], at, log))
        assert code == -signal.SIGKILL, f"not killed at {name}, but {code}"
        entry = {"moment": name, "files": sorted(path.name for path in place.iterdir())}
        left.append(entry)
        try:
            entry["version"] = version_in(place)
        except Exception as error:  # that is what the test is about
            entry["version"] = repr(error)
            continue
        shutil.copytree(place, over)
        checkpoint.save(over, states["new"])
        entry["after the next save"] = sorted(path.name for path in over.iterdir())
        entry["then"] = version_in(over)
    return {"left": left, "whole": json.loads((folder / "whole.json").read_text())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[1])  # where tiny_tasks is
    print(json.dumps(kill_everywhere(Path(sys.argv[1]))))
