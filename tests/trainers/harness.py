"""Runs an example of ``examples/trainers`` as a user starts it: a process of its own, offline, in an empty folder."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 180  # seconds for one run; it takes about ten, most of them for imports


def run_example(
    name: str,
    *arguments: str | Path,
    folder: Path,
    fails: bool = False,
    processes: int = 0,
    imports: Sequence[Path] = (),
) -> str:
    """Standard output and error, in order, of ``python examples/trainers/NAME.py ARGUMENTS`` in ``folder``.

    With ``processes``, of that many under ``torchrun``. ``imports`` are further folders to import from.
    """
    path = os.pathsep.join(map(str, [ROOT, *imports]))
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    example = ROOT / "examples" / "trainers" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, *torchrun, str(example), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **settings, "GLOO_SOCKET_IFNAME": "lo"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout
