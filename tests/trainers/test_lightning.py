"""SOAP in Lightning: resumed runs end as the uninterrupted one in every precision, and DDP divides and saves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from emerging_optimizers.soap import SOAP
from tests.differences import differences
from tests.trainers.harness import run_example

PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}  # of the weights
WIDTH = 96  # of the example's model

Checkpoint = dict[str, Any]


def checkpoint_of(folder: Path) -> Checkpoint:
    return torch.load(folder / "last.ckpt", weights_only=True)


def states_of(checkpoint: Checkpoint) -> list[dict[str, torch.Tensor]]:
    return list(checkpoint["optimizer_states"][0]["state"].values())


@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one_in_every_precision(tmp_path: Path) -> None:
    run = ("run", "--precision", *PRECISIONS, "--epochs", "2")
    kept = ("copy", "checkpoints", "uninterrupted")
    output, _ = run_example("lightning_module", run, kept, (*run, "--resume", "1"), folder=tmp_path)

    for precision, weights in PRECISIONS.items():
        resumed = checkpoint_of(tmp_path / "checkpoints" / precision)
        assert resumed["global_step"] == 40
        assert differences(resumed, checkpoint_of(tmp_path / "uninterrupted" / precision)) == []
        assert {value.dtype for value in resumed["state_dict"].values()} == {weights}
        kept = {value.dtype for state in states_of(resumed) for key, value in state.items() if key[0] in "eGQ"}
        assert kept == {torch.float32}
        assert any("Q_0" in state for state in states_of(resumed))
        loss = float(output.partition(f"{precision}: 40 steps, validation loss ")[2].split()[0])
        assert loss < 3.0  # 3.26 with no more than the frequencies of bytes


@pytest.mark.slow
def test_a_checkpoint_of_two_ddp_processes_has_the_state_that_was_divided_between_them(tmp_path: Path) -> None:
    (output,) = run_example("lightning_module", ("run", "--devices", "2", "--epochs", "1"), folder=tmp_path)

    assert "32-true: 10 steps" in output  # on each, half of the epoch
    checkpoint = checkpoint_of(tmp_path / "checkpoints" / "32-true")
    tensors = [value for state in states_of(checkpoint) for value in state.values()]
    assert {type(value) for value in [*tensors, *checkpoint["state_dict"].values()]} == {torch.Tensor}
    bases = [state["Q_0"] for state in states_of(checkpoint) if "Q_0" in state]
    assert len(bases) == 3  # the matrices of the layers, which the two share out
    for basis in bases:
        # What a refresh accepts is orthonormal to some dozens of roundings.
        torch.testing.assert_close(basis.T @ basis, torch.eye(WIDTH), atol=100 * torch.finfo().eps, rtol=0)


def test_the_momentum_that_one_cycle_sets_reaches_the_first_moment_as_it_does_in_adamw() -> None:
    finished = []
    for make in (SOAP, torch.optim.AdamW):
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(6, generator=generator))  # one axis: AdamW, in SOAP too
        optimizer = make([weight], lr=0.01, betas=(0.9, 0.95), weight_decay=0.01)
        schedule, momenta = OneCycleLR(optimizer, max_lr=0.01, total_steps=30), []
        for _ in range(30):
            weight.grad = torch.randn(6, generator=generator)
            optimizer.step()
            schedule.step()
            momenta.append(optimizer.param_groups[0]["betas"])
        assert min(momenta) == (pytest.approx(0.85), 0.95)
        assert momenta[-1][0] > 0.949
        finished.append(weight.detach())
    torch.testing.assert_close(*finished)
