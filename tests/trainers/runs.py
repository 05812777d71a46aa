"""Runs an example several times in one process: what it imports takes longer than what it does."""

import json
import os
import runpy
import shutil
import sys
import time
from pathlib import Path

NEXT = "--- the next run ---"


def copy(source: Path, target: Path) -> None:
    """Copies a file or a folder, once for all processes of torchrun."""
    if os.environ.get("RANK", "0") == "0":
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name("partial")
        (shutil.copytree if source.is_dir() else shutil.copy)(source, partial)
        os.replace(partial, target)
    while not target.exists():
        time.sleep(0.01)


if __name__ == "__main__":
    example, steps = sys.argv[1], json.loads(sys.argv[2])
    sys.path[0] = str(Path(example).parent)
    for kind, *words in steps:
        if kind == "copy":
            copy(*map(Path, words))
        else:
            print(NEXT if os.environ.get("RANK", "0") == "0" else "", flush=True)
            sys.argv = [example, *words]
            runpy.run_path(example, run_name="__main__")
    # Threads of torch's that are still alive when an interpreter ends can abort the process, after all is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
