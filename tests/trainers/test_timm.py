"""SOAP under a name of timm's registry: the groups of timm's factory, its schedule, and a run resumed exactly."""

from pathlib import Path

import pytest
import torch

from tests.trainers.harness import run_example
from tests.trainers.separate import DECLARE_OPERATORS, folders_with


@pytest.mark.slow
def test_timm_makes_soap_by_name_with_its_decays_and_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    imports = folders_with("timm", "torchvision")
    if imports and torch.version.cuda is None:
        (tmp_path / "sitecustomize.py").write_text(DECLARE_OPERATORS)
        imports = [tmp_path, *imports]
    (output,) = run_example("timm_registry", ("run",), folder=tmp_path, imports=imports)

    assert "weights equal" in output
    groups = [line for line in output.splitlines() if "weight decay" in line]
    # Class token and positions; head.
    assert [group for group in groups if group.startswith("AdamW") and "864" in group and "decay 0.00" in group]
    assert [group for group in groups if group.startswith("AdamW") and "480" in group and "x 1.00" in group]
    matrices = [group for group in groups if group.startswith("SOAP")]
    assert len(matrices) == 3  # patches and two blocks, each with a scale of its own
    assert len({group.partition("lr x ")[2].split()[0] for group in matrices}) == 3
    assert all("decay 0.05" in group for group in matrices)
    saved = torch.load(tmp_path / "half-way.pt", weights_only=True)
    rates = {group["lr"] / group["lr_scale"] for group in saved["optimizer"]["param_groups"]}
    assert max(rates) == pytest.approx(min(rates))  # the schedule's, times the layer's scale
    assert len({group["lr"] for group in saved["optimizer"]["param_groups"]}) == 4
    assert float(output.splitlines()[-1].partition("%")[0]) > 60
