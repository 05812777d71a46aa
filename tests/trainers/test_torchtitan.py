"""SOAP in torchtitan's containers: made by name, saved and loaded by distributed checkpointing, resumed exactly."""

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.trainers.harness import run_example
from tests.trainers.separate import folders_with


@pytest.mark.slow
def test_a_run_resumed_from_torchtitans_containers_ends_with_the_same_weights(tmp_path: Path) -> None:
    imports = folders_with("torchtitan", "tyro", "docstring_parser", "typeguard", "spmd_types")
    (output,) = run_example("torchtitan_optimizer", ("run",), folder=tmp_path, imports=imports)

    assert "weights equal" in output
    first = float(output.partition("rank 0: loss ")[2].split()[0])
    second = float(output.rpartition("rank 0: loss ")[2].split()[0])
    assert second < 3.1 < first  # 3.26 with no more than the frequencies of bytes

    dcp_to_torch_save(tmp_path / "checkpoints" / "step-20", tmp_path / "whole.pt")
    saved = torch.load(tmp_path / "whole.pt", weights_only=True)["optimizer"]
    factors = {name.removesuffix(".GG_0") for name in saved if name.endswith(".GG_0")}
    assert factors == {"state.layers.0.weight", "state.layers.1.weight"}
    assert saved["state.layers.0.weight.step"] == 20
    assert saved["param_groups.lm_head.weight.lr"] == saved["param_groups.layers.0.weight.lr"] != 0.01  # the schedule's
