"""Runs an example of ``examples/trainers`` as a user starts it: a process of its own, offline, in an empty folder."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 180  # seconds for one run; it takes about ten, most of them for imports


def run_example(
    name: str, *arguments: str | Path, folder: Path, fails: bool = False, imports: Sequence[Path] = ()
) -> str:
    """Standard output and error, in order, of ``python examples/trainers/NAME.py ARGUMENTS`` in ``folder``.

    ``imports`` are folders to import from, beside what is installed.
    """
    path = os.pathsep.join(map(str, [ROOT, *imports]))
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "examples" / "trainers" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **settings},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout
