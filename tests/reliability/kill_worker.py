"""Kills savers. ``python -m tests.reliability.kill_worker FOLDER KILLS SEED`` prints what became of them as JSON.

A process of its own, because it forks: torch is imported once, and no thread of torch's runs yet when a child begins.
The parent never calls ``backward``, after which a fork could not.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import statistics
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from emerging_optimizers.lab.race import checkpoint, report
from emerging_optimizers.lab.race.race import Options, Race

PATIENCE = 60.0  # seconds for one child to come to the place where it is killed
STAGES = ("outside", "in memory", "writing", "at fsync", "at rename", "at the folder's fsync")


def options(steps: int) -> Options:
    rates = {"soap-kronecker": (1e-2,), "adamw": (1e-2,)}
    return Options("tiny_tasks:Tiny", None, rates, (0,), steps, frequency=4, threads=1)


class Shared:
    """A few whole numbers that parent and child both see, and that outlive the child."""

    NAMES = ("begun", "saved", "stage", "nanoseconds", "operations")

    def __init__(self) -> None:
        self.__dict__["memory"] = mmap.mmap(-1, 8 * len(self.NAMES))

    def __getattr__(self, name: str) -> int:
        return struct.unpack_from("q", self.memory, 8 * self.NAMES.index(name))[0]

    def __setattr__(self, name: str, value: int) -> None:
        struct.pack_into("q", self.memory, 8 * self.NAMES.index(name), value)


def digest(value: Any) -> str:
    """Hash all that a state holds: kinds, order, numbers to the last bit."""
    hashed = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, dict):
            hashed.update(b"{")
            for key, inner in item.items():
                add(key)
                add(inner)
        elif isinstance(item, list | tuple):
            hashed.update(b"[")
            for inner in item:
                add(inner)
        elif isinstance(item, Tensor):
            hashed.update(f"{item.dtype}{tuple(item.shape)}".encode())
            hashed.update(item.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            hashed.update(f"{type(item).__name__}:{item!r};".encode())

    add(value)
    return hashed.hexdigest()


def stamped(race: Race) -> dict[str, Any]:
    """A race's state with its version, the steps of all runs, in three more places and a check sum over everything."""
    version = sum(run.step for run in race.runs)
    state = {"version": version, **race.state(), "again": torch.full((257,), version), "last": [{"version": version}]}
    return {**state, "digest": digest(state)}


def version_of(state: dict[str, Any]) -> int:
    """The version of a complete state.

    Raises:
        ValueError: its parts are not of one version.
    """
    rest = {key: value for key, value in state.items() if key != "digest"}
    steps = sum(len(run["record"]["train_loss"]) for run in state["runs"])
    versions = {state["version"], state["last"][0]["version"], steps, *state["again"].tolist()}
    if len(versions) != 1 or state["digest"] != digest(rest):
        raise ValueError(f"a mixture of the versions {sorted(versions)}")
    return steps


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child; 0 is its exit status if nothing was raised."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait_for(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"a child ended with status {status}, which was not to be killed")


# --- kills at random moments ---------------------------------------------------------------------------------------


def announce_stages(shared: Shared) -> None:
    """Note in `shared` how far the save has come."""
    real_open, real_fsync, real_replace = Path.open, os.fsync, os.replace

    def path_open(path: Path, *arguments: Any, **named: Any) -> Any:
        shared.stage = 2
        return real_open(path, *arguments, **named)

    def fsync(number: int) -> None:
        shared.stage = 3 if shared.stage < 4 else 5
        real_fsync(number)

    def replace(*arguments: Any) -> None:
        shared.stage = 4
        real_replace(*arguments)

    Path.open, os.fsync, os.replace = path_open, fsync, replace  # type: ignore[method-assign,assignment]


def save_for_ever(folder: Path, shared: Shared) -> None:
    """Resume what is there, and save after every step."""
    announce_stages(shared)
    os.nice(5)  # the parent, who kills, goes first
    race = Race.restore(checkpoint.load(folder))
    for _ in race.play():
        state = stamped(race)
        shared.stage, shared.begun = 1, state["version"]
        begin = time.monotonic_ns()
        checkpoint.save(folder, state)
        shared.nanoseconds = time.monotonic_ns() - begin
        shared.stage, shared.saved = 0, state["version"]


def kill_at_random(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill one child after the other, each of which has resumed what the one before it left.

    On a busy machine a kill comes late, when the save is over: there are more of them, until half of `kills` have hit
    the file.
    """
    folder.mkdir()
    chance, shared = random.Random(seed), Shared()
    checkpoint.save(folder, stamped(Race(options(steps=2000))))
    lost: list[str] = []
    stages: Counter[str] = Counter()
    durations = []
    newer = saves = leftovers = 0
    for kill in range(3 * kills):
        if kill >= kills and sum(stages[stage] for stage in STAGES[2:]) >= kills / 2:
            break
        start = shared.begun = shared.saved = version_of(checkpoint.load(folder))
        child = fork(lambda: save_for_ever(folder, shared))
        goal, deadline = start + chance.randint(0, 2), time.monotonic() + PATIENCE
        stage = chance.choice((1, 2, 2, 2))  # most at the file, as half of a save's time goes into what is in memory
        while not (shared.saved >= goal and shared.begun > shared.saved and shared.stage >= stage):
            time.sleep(0.0001)
            if time.monotonic() > deadline or os.waitpid(child, os.WNOHANG) != (0, 0):
                raise RuntimeError("a child did not come to a save")
        time.sleep(chance.uniform(0, (0.6 if stage == 1 else 0.25) * shared.nanoseconds / 1e9))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise RuntimeError(f"a child ended by itself, with status {status}")
        begun, saved = shared.begun, shared.saved
        stages[STAGES[shared.stage if begun > saved else 0]] += 1
        durations.append(shared.nanoseconds / 1e6)
        leftovers += len(list(folder.iterdir())) - 1
        try:
            found = version_of(checkpoint.load(folder))
        except Exception as error:  # that is what the test is about
            lost.append(f"kill {kill}, between versions {saved} and {begun}: {error!r}")
            break
        if not saved <= found <= begun:
            lost.append(f"kill {kill}: found version {found}, saved was {saved}, begun {begun}")
        newer += found > saved
        saves += found - start
    return {
        "kills": sum(stages.values()),
        "inside": sum(stages.values()) - stages["outside"],
        "at the file": sum(stages[stage] for stage in STAGES[2:]),
        "stages": stages,
        "lost": lost,
        "newer": newer,
        "saves": saves,
        "leftovers": leftovers,
        "save_ms": statistics.median(durations),
    }


# --- a kill at every operation -------------------------------------------------------------------------------------


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


def save_and_die(folder: Path, state: dict[str, Any], at: int, shared: Shared, log: Path | None) -> None:
    """Save, and be killed at the moment number `at` (from 1); 0 is never."""
    moments: list[str] = []

    def moment(name: str) -> None:
        moments.append(name)
        shared.operations = len(moments)
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
    if log is not None:
        log.write_text(json.dumps(moments))


def losses(race: Race) -> list[Any]:
    return [[run.record.train_loss, run.record.validation] for run in race.runs]


def finish(folder: Path, out: Path) -> None:
    """Play a saved race to its end."""
    race = Race.restore(checkpoint.load(folder))
    for _ in race.play():
        pass
    out.write_text(json.dumps(losses(race)))


def make_versions(folder: Path) -> None:
    """Leave a checkpoint of an early step in old/ and one of a later step in new/."""
    race = Race(options(steps=15))
    for name, stop in (("old", 7), ("new", 8)):
        for _ in race.play():
            if sum(run.step for run in race.runs) == stop:
                break
        (folder / name).mkdir()
        report.write_results(folder / name, report.collect(race))
        checkpoint.save(folder / name, stamped(race))


def kill_everywhere(folder: Path) -> dict[str, Any]:
    """Kill a save at each of its moments in turn; look at what is left, save over it, and race on from it."""
    folder.mkdir()
    wait_for(fork(lambda: make_versions(folder)))
    new = checkpoint.load(folder / "new")
    versions = {version_of(checkpoint.load(folder / name)): name for name in ("old", "new")}
    shared, log = Shared(), folder / "moments.json"
    shutil.copytree(folder / "old", folder / "alive")
    wait_for(fork(lambda: save_and_die(folder / "alive", new, 0, shared, log)))
    moments = json.loads(log.read_text())
    left = []
    for at, name in enumerate(moments, start=1):
        place = folder / f"kill-{at}"
        shutil.copytree(folder / "old", place)
        child = fork(lambda at=at, place=place: save_and_die(place, new, at, shared, None))
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or shared.operations != at:
            raise RuntimeError(f"not killed at {name}: status {status}")
        entry = {"moment": name, "files": sorted(path.name for path in place.iterdir())}
        left.append(entry)
        try:
            entry["version"] = versions.get(version_of(checkpoint.load(place)))
        except Exception as error:  # that is what the test is about
            entry["version"] = repr(error)
            continue
        wait_for(fork(lambda at=at, place=place: finish(place, folder / f"end-{at}.json")))
        entry["end"] = json.loads((folder / f"end-{at}.json").read_text())
        over = folder / f"over-{at}"
        shutil.copytree(place, over)
        checkpoint.save(over, new)
        entry["after the next save"] = sorted(path.name for path in over.iterdir())
        entry["then"] = versions.get(version_of(checkpoint.load(over)))
    wait_for(fork(lambda: finish(folder / "old", folder / "end.json")))
    return {"left": left, "whole": json.loads((folder / "end.json").read_text())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    sys.path.insert(0, str(root))  # where tiny_tasks is
    found = {"random": kill_at_random(root / "random", int(sys.argv[2]), int(sys.argv[3]))}
    print(json.dumps(found | {"everywhere": kill_everywhere(root / "everywhere")}))
