"""Files that are either whole or not there: a crash at any moment leaves the previous version readable."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from emerging_optimizers.lab.errors import LabError

CHECKPOINT = "checkpoint.pt"
RESULTS = "results.json"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that its name always stands for one complete version.

    Args:
        path: the file; its folder exists.
        write: writes the whole content into a binary file handle.
    """
    # In the same folder, as a rename is atomic only within one file system; a fixed name, so that the leftover of a
    # crash is overwritten by the next attempt.
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # the content is on the disk before the name points to it
        os.replace(temporary, path)
    except BaseException:  # a full disk is not to stay full of half a file
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename is already durable
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def save(folder: Path, state: dict[str, Any]) -> None:
    """Save a race's state: nested dicts and lists of tensors, numbers, strings and None."""
    # Made in memory: where a file takes no more bytes, torch.save raises an error of its own that hides the system's.
    content = io.BytesIO()
    torch.save(state, content)
    write_atomically(folder / CHECKPOINT, lambda file: file.write(content.getbuffer()))


def discard(folder: Path) -> None:
    """Delete a checkpoint, if there is one, and what a kill during a save has left."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    _temporary(folder / CHECKPOINT).unlink(missing_ok=True)


def _unfinished(file: Path) -> bool:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(results, dict) and results.get("finished") is False


def load(folder: Path) -> dict[str, Any]:
    """Load what `save` wrote. Nothing in the file is executed (``weights_only=True``).

    Raises:
        LabError: there is no checkpoint, or it cannot be read, or a byte of it is not what was written.
    """
    path = folder / CHECKPOINT
    if not path.exists() and _unfinished(folder / RESULTS):
        reason = "it was stopped before its first checkpoint, which comes after a minute: start it again"
        raise LabError(f"--resume {folder}: {reason}")
    if not path.exists():
        raise LabError(f"--resume {folder}: nothing to resume there (no {CHECKPOINT}; a finished race leaves none)")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch writes check sums and reads none: a flipped bit would change a weight
        if damaged is not None:
            raise zipfile.BadZipFile(f"bad check sum of {damaged}")
        state = torch.load(path, weights_only=True)
    except Exception as error:  # zip, pickle and storage errors share no base class
        raise LabError(f"--resume {folder}: {CHECKPOINT} is not a readable checkpoint; start a new race") from error
    if not isinstance(state, dict):
        raise LabError(f"--resume {folder}: {CHECKPOINT} is not a checkpoint of a race; start a new race")
    return state
