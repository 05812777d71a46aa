"""The state of a stopped race, in a file that is either whole or not there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from emerging_optimizers.lab.common import LabError, damaged_entry, read_results, temporary, write_atomically

CHECKPOINT = "checkpoint.pt"
RESULTS = "results.json"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Save a race's state: nested dicts and lists of tensors, numbers, strings and None."""
    # Made in memory: where a file takes no more bytes, torch.save raises an error of its own that hides the system's.
    content = io.BytesIO()
    torch.save(state, content)
    write_atomically(folder / CHECKPOINT, lambda file: file.write(content.getbuffer()))


def discard(folder: Path) -> None:
    """Delete a checkpoint, if there is one, and what a kill during a save has left."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    temporary(folder / CHECKPOINT).unlink(missing_ok=True)


def load(folder: Path) -> dict[str, Any]:
    """Load what `save` wrote, or raise a LabError. Nothing in the file is executed (``weights_only=True``)."""
    path = folder / CHECKPOINT
    if not path.exists() and read_results(folder / RESULTS).get("finished") is False:
        reason = "it was stopped before its first checkpoint, which comes after a minute: start it again"
        raise LabError(f"--resume {folder}: {reason}")
    if not path.exists():
        raise LabError(f"--resume {folder}: nothing to resume there (no {CHECKPOINT}; a finished race leaves none)")
    try:
        if (damaged := damaged_entry(path)) is not None:
            raise ValueError(f"bad check sum of {damaged}")
        state = torch.load(path, weights_only=True)
    except Exception as error:  # zip, pickle and storage errors share no base class
        raise LabError(f"--resume {folder}: {CHECKPOINT} is not a readable checkpoint; start a new race") from error
    if not isinstance(state, dict):
        raise LabError(f"--resume {folder}: {CHECKPOINT} is not a checkpoint of a race; start a new race")
    return state
