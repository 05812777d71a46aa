"""What ``docs/checkpointing.md`` says: its blocks run, its tables have every option, and each does what they say."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from emerging_optimizers.lab.cli import main
from emerging_optimizers.soap import SOAP

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "checkpointing.md").read_text(encoding="utf-8")

#: Another value of each option than the default.
OTHER: dict[str, Any] = {
    "lr": 0.5, "betas": (0.8, 0.9), "shampoo_beta": 0.8, "eps": 1e-6, "weight_decay": 0.1,
    "weight_decay_method": "l2", "use_nesterov": True, "precondition_frequency": 2, "adam_warmup_steps": 20,
    "precondition_1d": True, "correct_bias": False, "fp32_matmul_prec": "highest", "use_eigh": True,
    "qr_fp32_matmul_prec": "highest", "use_adaptive_criteria": True, "adaptive_update_tolerance": 1e-3,
    "power_iter_steps": 2, "max_update_rms": 0.1, "use_kl_shampoo": True, "correct_shampoo_beta_bias": False,
    "maximize": True, "max_precond_dim": 5, "merge_dims": True, "second_moment_refresh": "kronecker",
    "nonfinite": "raise", "stagger_updates": True, "pack_factors": True, "state_dtype": torch.bfloat16,
}  # fmt: skip

#: What makes an option count at all in a few steps.
SHOWN_BY = {"use_adaptive_criteria": {"adaptive_update_tolerance": 0.5}}


def options_in_table(heading: str) -> list[str]:
    table = PAGE.split(f"| {heading} |", 1)[1].split("\n\n", 1)[0]
    return [word for row in table.splitlines()[2:] for word in re.findall(r"`(\w+)`", row.split("|")[1])]


MAY, MAY_NOT = options_in_table("May change"), options_in_table("May not change")


def trained(steps: int = 5, **options: Any) -> tuple[nn.Module, SOAP]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(6 * 4, 6))
    optimizer = SOAP(model.parameters(), **{"lr": 1e-2, "precondition_frequency": 3, **options})
    go_on(model, optimizer, steps)
    return model, optimizer


def go_on(model: nn.Module, optimizer: SOAP, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 2, 4, 4)).square().mean().backward()
        optimizer.step()


def test_the_blocks_run_and_the_checkpoint_can_be_inspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    for block in blocks:
        exec(compile(block, "docs/checkpointing.md", "exec"), names)
    assert len(blocks) == 3
    assert names["optimizer"].defaults["adam_warmup_steps"] == 10
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert main(["inspect", "checkpoint.pt"]) == 0
    assert "4 tensors (2 preconditioned; 25 steps)" in capsys.readouterr().out


def test_every_option_is_in_one_of_the_two_tables() -> None:
    assert sorted([*MAY, *MAY_NOT]) == sorted(OTHER)
    assert set(OTHER) | {"foreach"} >= set(SOAP([nn.Parameter(torch.ones(1))], lr=1.0).defaults)


@pytest.mark.parametrize("option", MAY)
def test_what_may_change_counts_after_loading(option: str) -> None:
    model, optimizer = trained()
    saved = optimizer.state_dict()
    results = []
    for change in ({}, {option: OTHER[option], **SHOWN_BY.get(option, {})}):
        torch.manual_seed(1)
        other, resumed = trained(steps=0, **{option: OTHER[option]})
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(saved)
        assert resumed.param_groups[0][option] == optimizer.param_groups[0][option]  # the saved one, not ours
        resumed.param_groups[0].update(change)
        torch.manual_seed(2)
        go_on(other, resumed, 12)
        assert all(torch.isfinite(weight).all() for weight in other.parameters())
        results.append(torch.cat([weight.detach().flatten() for weight in other.parameters()]))
    # These change nothing that can be seen in a dozen such steps on a CPU.
    if option not in ("nonfinite", "fp32_matmul_prec", "qr_fp32_matmul_prec", "adaptive_update_tolerance"):
        assert not torch.equal(*results)


@pytest.mark.parametrize("option", MAY_NOT)
def test_what_may_not_change_is_refused_before_the_step(option: str) -> None:
    model, optimizer = trained()
    before = [weight.clone() for weight in model.parameters()]
    optimizer.param_groups[0][option] = OTHER[option]
    with pytest.raises(RuntimeError, match="cannot change after the first step"):
        go_on(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_warm_up_raised_above_the_steps_done_stops_refreshes() -> None:
    model, optimizer = trained()
    weight = model[2].weight  # type: ignore[index]
    last = optimizer.state[weight]["refresh_step"].clone()
    optimizer.param_groups[0]["adam_warmup_steps"] = 20
    go_on(model, optimizer, 12)
    assert torch.equal(optimizer.state[weight]["refresh_step"], last)
    go_on(model, optimizer, 6)
    assert optimizer.state[weight]["refresh_step"] > 20


def test_the_state_of_adamw_is_refused_or_loaded_as_the_page_says() -> None:
    model, _ = trained(steps=0)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(torch.randn(8, 2, 4, 4)).square().mean().backward()
        adamw.step()
    with pytest.raises(ValueError, match="missing 'refresh_step'. The state dict is not SOAP's .* weights alone"):
        trained(steps=0)[1].load_state_dict(adamw.state_dict())
    other, soap = trained(steps=0, max_precond_dim=0)
    other.load_state_dict(model.state_dict())
    soap.load_state_dict(adamw.state_dict())
    for weights, optimizer in ((model, adamw), (other, soap)):
        torch.manual_seed(5)
        optimizer.zero_grad()
        weights(torch.randn(8, 2, 4, 4)).square().mean().backward()
        optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_the_tests_that_the_page_names_exist() -> None:
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    found = {node.name for text in tests for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 10
    assert named <= found
