"""What the planner says of each rank's memory, compared with three real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_every_ranks_bytes_equal_those_of_the_real_state_and_weights(tmp_path: Path) -> None:
    command = [sys.executable, "tests/plan/plan_worker.py", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 12
    for _, planned_state, state, planned_weights, weights in lines:
        assert (planned_state, planned_weights) == (state, weights)
    assert len({line[1] for line in lines}) > 4  # the ranks differ
