"""Runs the examples as a user does, from any folder."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.trainers.runs import NEXT

ROOT = Path(__file__).parents[2]
LIMIT = 180  # seconds for all runs of an example; they take about ten, most of them for imports


def run_example(
    name: str, *steps: Sequence[str], folder: Path, processes: int = 0, imports: Sequence[Path] = ()
) -> list[str]:
    """Standard output and error, in order, of each run of ``examples/trainers/NAME.py`` in ``folder``.

    Args:
        name: The example.
        *steps: ("run", arguments ...) or ("copy", from, to), between runs.
        folder: The current one.
        processes: So many under ``torchrun``; 0 for one without it.
        imports: Further folders to import from.
    """
    path = os.pathsep.join(map(str, [ROOT, *imports]))
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    driver, example = Path(__file__).with_name("runs.py"), ROOT / "examples" / "trainers" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, *torchrun, driver, example, json.dumps(steps)],
        cwd=folder,
        env={**os.environ, **settings, "GLOO_SOCKET_IFNAME": "lo"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.split(f"{NEXT}\n")[1:]
