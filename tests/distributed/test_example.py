"""``examples/train_gpt.py`` as a user starts it: real ``torchrun``, kill -9, and resuming with other ranks."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.differences import differences
from tests.distributed.scenarios import MAGNIFIED

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "train_gpt.py"
# Six windows: divisible by 1, 2 and 3 ranks. 24 steps: refreshes at 10 and 20, checkpoints before, between and after.
TINY = [
    f"--{name}={value}"
    for name, value in {"steps": 24, "batch-size": 6, "layers": 2, "width": 32, "log-every": 1, "save-every": 8}.items()
]
pytestmark = pytest.mark.xdist_group("example")
LIMIT = 120  # seconds for one job; it takes about ten

# Of the loss, in nats: other ranks add up the same gradients in another order. One window that is left out, or an
# eigenbasis that rounding chose (no adam_warmup_steps), costs far more.
ROUNDING = MAGNIFIED * torch.finfo(torch.float32).eps


@contextmanager
def job(ranks: int, *arguments: str | Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The example on so many ranks, or, if 0, without torchrun; it is gone when the block is left."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    command = [sys.executable, *torchrun, EXAMPLE, *arguments]
    environment = {**os.environ, **settings}
    with log.open("wb") as output:
        started = subprocess.Popen(command, cwd=log.parent, env=environment, stdout=output, stderr=output)
    try:
        yield started
    finally:
        if started.poll() is None:
            started.terminate()  # not kill: torchrun then ends its ranks
            started.wait(60)


def output_of(ranks: int, *arguments: str | Path, log: Path, fails: bool = False) -> str:
    with job(ranks, *arguments, log=log) as started:
        code = started.wait(LIMIT)
    output = log.read_text()
    # What torch's threads may do to the end of a process, once everything has been done, is not what is tested here.
    done = code == 0 or ("validation loss" in output and "terminate called without an active exception" in output)
    assert done != fails, output
    return output


def validation_loss(output: str) -> float:
    return float(output.rpartition("validation loss ")[2].split()[0])


def saved(folder: Path) -> dict[str, Any]:
    """Everything in the last checkpoint."""
    name = (folder / "latest").read_text().strip()
    dcp_to_torch_save(folder / name, folder / "whole.pt")
    return torch.load(folder / "whole.pt", weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], tuple[Path, str]]:
    """Checkpoints and output of a whole run on so many ranks with this parallelism, which is run once."""
    found: dict[tuple[int, str], tuple[Path, str]] = {}

    def run(ranks: int, parallel: str) -> tuple[Path, str]:
        if (ranks, parallel) not in found:
            folder = tmp_path_factory.mktemp(f"{parallel}-{ranks}")
            arguments = [*TINY, "--parallel", parallel, "--checkpoint", folder / "saved"]
            found[ranks, parallel] = folder / "saved", output_of(ranks, *arguments, log=folder / "log")
        return found[ranks, parallel]

    return run


@pytest.mark.slow
def test_ddp_fsdp2_and_one_process_end_with_the_same_loss(uninterrupted: Callable[..., Any]) -> None:
    alone, ddp, fsdp = (uninterrupted(*how)[1] for how in [(0, "ddp"), (2, "ddp"), (2, "fsdp")])
    assert "one process" in alone
    assert "ddp on 2 ranks" in ddp
    assert "fsdp on 2 ranks" in fsdp
    assert validation_loss(alone) < 4  # learned something: a guess among all bytes is at 5.5
    assert validation_loss(ddp) == pytest.approx(validation_loss(alone), abs=ROUNDING)
    assert validation_loss(fsdp) == pytest.approx(validation_loss(alone), abs=ROUNDING)


def pid_of(rank: int, agent: int) -> int:
    """The process that torchrun, process ``agent``, started for this rank."""
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no rank {rank}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process of a rank in /proc")
def test_a_run_whose_rank_was_killed_resumes_and_ends_exactly_like_the_whole_one(
    uninterrupted: Callable[..., Any], tmp_path: Path
) -> None:
    checkpoints = tmp_path / "saved"
    arguments = [*TINY, "--checkpoint", checkpoints]
    with job(2, *arguments, log=tmp_path / "log") as started:
        # In the middle: the second of three checkpoints is being written. Rank 1, so that it is left to rank 0, which
        # publishes checkpoints, not to publish this one unless it is whole.
        deadline = time.monotonic() + LIMIT
        while not (checkpoints / "step-000016").exists():
            assert started.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(pid_of(1, started.pid), signal.SIGKILL)
        assert started.wait(60) != 0
    output = (tmp_path / "log").read_text()
    assert "step     24" not in output
    assert "validation loss" not in output

    last = (checkpoints / "latest").read_text().strip()
    assert last in ("step-000008", "step-000016")
    resumed = output_of(2, *arguments, "--resume", log=tmp_path / "log of the second run")
    assert f"resumed after step {int(last[5:])}\n" in resumed
    folder, whole = uninterrupted(2, "ddp")
    assert validation_loss(resumed) == validation_loss(whole)
    expected = saved(folder)
    assert any("GG_1" in state for state in expected["optimizer"]["state"].values())
    assert differences(expected, saved(checkpoints)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((2, "ddp"), (3, "fsdp")), ((2, "fsdp"), (0, "ddp"))], ids=str)
def test_a_run_resumes_with_other_ranks_and_the_other_parallelism(
    before: tuple[int, str], after: tuple[int, str], uninterrupted: Callable[..., Any], tmp_path: Path
) -> None:
    folder, whole = uninterrupted(*before)
    shutil.copytree(folder / "step-000016", tmp_path / "saved" / "step-000016")
    (tmp_path / "saved" / "latest").write_text("step-000016\n")
    ranks, parallel = after
    arguments = [*TINY, "--parallel", parallel, "--checkpoint", tmp_path / "saved", "--resume"]
    resumed = output_of(ranks, *arguments, log=tmp_path / "log")
    assert "resumed after step 16\n" in resumed
    assert "step     16 " not in resumed
    assert validation_loss(resumed) == pytest.approx(validation_loss(whole), abs=ROUNDING)


def test_a_folder_with_checkpoints_is_not_written_to_without_resume(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "latest").write_text("step-000016\n")
    output = output_of(0, *TINY, "--checkpoint", tmp_path / "saved", log=tmp_path / "log", fails=True)
    assert "has checkpoints: add --resume" in output
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["latest"]


def test_help_names_every_option(tmp_path: Path) -> None:
    options = {"--parallel", "--steps", "--batch-size", "--layers", "--width", "--lr", "--dtype", "--seed"}
    options |= {"--log-every", "--checkpoint", "--save-every", "--resume"}
    output = output_of(0, "--help", log=tmp_path / "log")
    described = {line.split()[0] for line in output.splitlines() if line.startswith("  --")}
    assert described == options
    assert "torchrun --nproc_per_node 2 examples/train_gpt.py --parallel fsdp" in output
