"""Real processes for the distributed tests: ``Processes.run`` runs a function in several at once, over gloo."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]


class Outcome(NamedTuple):
    """What became of one process.

    Attributes:
        result: What the function returned.
        error: "Type: message" of what it raised; None if it returned.
        trace: The traceback.
        code: The exit code, minus the signal where it was killed.
    """

    result: Any
    error: str | None
    trace: str
    code: int


class Processes:
    """Runs functions in groups of fresh processes; see ``zygote``."""

    def __init__(self) -> None:
        self._zygote: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        """The zygote, started on first use. It is ready seconds later."""
        if self._zygote is None:
            self._zygote = subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.zygote"],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert self._zygote.stdout is not None
            assert self._zygote.stdout.readline() == "ready\n"
        return self._zygote

    def outcomes(
        self, size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 30, limit: float = 60
    ) -> list[Outcome]:
        """What becomes of ``size`` processes that call a function with the same arguments, as ranks of one group.

        Args:
            size: The number of processes.
            function: A function of a module, imported there by its name.
            *arguments: Must be picklable.
            timeout: Of the process group, in seconds.
            limit: After so many seconds the processes are killed, which is an error.
        """
        folder = Path(tempfile.mkdtemp(prefix="soap-"))
        try:
            (folder / "job").write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments)))
            zygote = self.start()
            assert zygote.stdin is not None
            assert zygote.stdout is not None
            print(
                json.dumps({"folder": str(folder), "size": size, "timeout": timeout, "limit": limit}),
                file=zygote.stdin,
                flush=True,
            )
            codes = json.loads(zygote.stdout.readline())
            return [_outcome(folder / f"{rank}.outcome", code) for rank, code in enumerate(codes)]
        finally:
            shutil.rmtree(folder)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any, **limits: float) -> list[Any]:
        """What the function returns in each of ``size`` processes.

        Raises:
            AssertionError: It raised in one of them, or one died.
        """
        outcomes = self.outcomes(size, function, *arguments, **limits)
        codes = [outcome.code for outcome in outcomes]
        for rank, outcome in enumerate(outcomes):
            assert outcome.error is None, f"rank {rank}, exit codes {codes}: {outcome.error}\n{outcome.trace}"
        assert not any(codes), f"exit codes {codes}"
        return [outcome.result for outcome in outcomes]

    def close(self) -> None:
        """Ends the zygote."""
        if self._zygote is not None:
            assert self._zygote.stdin is not None
            self._zygote.stdin.close()
            self._zygote.wait(timeout=30)
            assert self._zygote.stdout is not None
            self._zygote.stdout.close()


def _outcome(path: Path, code: int) -> Outcome:
    if not path.exists():
        return Outcome(None, f"died with exit code {code}", "", code)
    kind, *content = torch.load(path, weights_only=False)
    if kind == "result":
        return Outcome(content[0], None, "", code)
    return Outcome(None, content[0], content[1], code)
