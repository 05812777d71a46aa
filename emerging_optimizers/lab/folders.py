"""Output folders: made, or taken over from an earlier run of the same command, and never from anything else."""

from __future__ import annotations

import json
from pathlib import Path

from emerging_optimizers.lab.errors import LabError


def claim_folder(folder: Path, results: str, kind: str, owner: str) -> None:
    """Make the output folder, or take over one whose results are of the same format.

    Args:
        folder: The folder.
        results: The name of the JSON file that it would hold.
        kind: The format that this file names.
        owner: Whose it would be, in words.

    Raises:
        LabError: the folder holds something else, or cannot be made.
    """
    if folder.is_dir() and any(folder.iterdir()) and not _holds(folder / results, kind):
        raise LabError(f"--out {folder}: the folder is not empty and not {owner}; name another with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"--out {folder}: cannot be made ({error.strerror}); name another with --out") from error


def _holds(file: Path, kind: str) -> bool:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(results, dict) and results.get("format") == kind
