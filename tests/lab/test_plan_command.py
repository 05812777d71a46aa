"""`soap plan` as its user meets it: tables, JSON, a picture, budgets, and mistakes answered in one line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from emerging_optimizers import plan as planner
from emerging_optimizers.lab import plan as planning
from emerging_optimizers.lab.cli import main
from emerging_optimizers.lab.plan import flops, size

from .conftest import complaint


def test_a_plan_is_a_table_of_layers_and_one_of_optimizers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-3-8b", "--tokens", "1048576"]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    assert "8,030,261,248 parameters" in out.out
    assert "model.layers.*.self_attn.q_proj.weight" in out.out
    assert "AdamW: embedding" in out.out
    assert "SOAP: axes 0, 1 of 4096x4096" in out.out
    assert "axis 0 longer" in out.out
    soap = next(line.split() for line in out.out.splitlines() if line.startswith(" SOAP "))
    assert soap[1:4] == ["103", "GB", "12.9"]
    assert soap[-1].endswith("%")
    assert "6 per parameter and token" in out.out


def test_json_has_every_row_and_the_plan_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "vit-b", "--json", "--pack-factors", "--bfloat16-state", "--ranks", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    import torch

    options = {"precondition_frequency": 10, "pack_factors": True, "state_dtype": torch.bfloat16}
    planned = planner.plan(planner.load_model("vit-b"), ranks=2, **options)
    assert found["totals"]["soap"]["state_bytes"] == planned.totals["soap"].state_bytes
    assert len(found["rows"]) == len(planned.rows)
    assert found["options"]["state_dtype"] == "bfloat16"
    assert [share["state_bytes"] for share in found["shares"]] == [share.state_bytes for share in planned.shares]


def test_a_model_of_ones_own_is_planned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own_model.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(3, 4)\n")
    assert main(["plan", "own_model:make", "--all", "--dtype", "float64", "--max-precond-dim", "3"]) == 0
    out = capsys.readouterr().out
    assert "16 parameters" in out
    assert "SOAP: axis 1 of 4x3, axis 0 longer than max_precond_dim=3" in out


def test_a_budget_is_answered_with_options_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt2", "--memory", "3GB"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "The budget is met, with the least risk to the loss" in out
    assert "pack_factors=True: rounding alone" in out
    assert "Or by 2 ranks" in out
    assert main(["plan", "gpt2", "--memory", "100GB", "--overhead", "50%", "--tokens", "1000000"]) == 0
    assert "The budget is met as it is: state on the fullest rank 3.6 GB of 100 GB" in capsys.readouterr().out
    assert main(["plan", "gpt2", "--memory", "100MB"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "No options meet the budget. The nearest: state on the fullest rank" in out
    assert "too much" in out
    assert main(["plan", "gpt2", "--memory", "100MB", "--json"]) == 1
    budget = json.loads(capsys.readouterr().out)["budget"]
    assert budget["met"] is False
    assert budget["uses"]["memory"]["used"] > budget["uses"]["memory"]["limit"] == 100_000_000


def test_a_picture_is_drawn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in ("gpt2", "resnet50"):
        assert main(["plan", model, "--picture", "bars.png"]) == 0
        assert (folder / "bars.png").read_bytes().startswith(b"\x89PNG")
        assert "Picture: bars.png" in capsys.readouterr().out


def test_calibrated_milliseconds_are_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "CALIBRATION_SECONDS", 0.1)
    assert main(["plan", "gpt2", "--calibrate"]) == 0
    assert "ms on average" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpt3"], "no model 'gpt3': did you mean 'gpt2'? presets are gpt2, gpt2-xl, llama-3-8b, llama-3-70b"),
        (["missing.safetensors"], "missing.safetensors: no such file; give a preset"),
        (["nowhere/model"], "nowhere/model: no such file; give a preset"),
        (["empty"], "empty: a folder without config.json"),
        (["pickle.pt"], "pickle.pt: not a checkpoint that torch.load reads with weights_only"),
        (["gpt2", "--memory", "24"], "--memory 24: expected a size with its unit, for example 24GB"),
        (["gpt2", "--memory", ""], "expected a size with its unit, for example 24GB"),
        (["gpt2", "--memory=-1GB"], "--memory -1GB: expected a size with its unit"),
        (["gpt2", "--tokens", "1e6"], "--tokens 1e6: expected a whole number of at least 1"),
        (["gpt2", "--overhead", "five", "--tokens", "1"], "--overhead five: expected a percentage, for example 5%"),
        (["gpt2", "--frequency", "0"], "--frequency 0: expected a whole number of at least 1"),
        (["gpt2", "--max-precond-dim", "-1"], "--max-precond-dim -1: expected a whole number of at least 0"),
        (["gpt2", "--ranks", "ten"], "--ranks ten: expected a whole number from 1 to 10,000"),
        (["gpt2", "llama-3-8b"], "Got unexpected extra argument(s) (llama-3-8b). See soap plan --help."),
        (["bad.json"], "model_type must be one of gpt2, llama, mistral, qwen2, got 'bert'"),
        (["tiny_tasks:Nothing"], "cannot be imported"),
        (["tiny_tasks.py:make"], "model 'tiny_tasks.py:make': write tiny_tasks:make"),
        (["./models/vit:make"], "write models.vit:make"),
        (["/models/vit.py:make"], "start in /models and write vit:make"),
        (["tiny_tasks:Tiny"], "positional argument: 'seed'); the function must take no arguments: wrap it"),
        ([], "Missing argument 'MODEL'. See soap plan --help."),
        (["gpt2", "--memory", "0GB"], "expected a size with its unit"),
        (["gpt2", "--memory", 400 * "9" + "GB"], "expected a size with its unit"),
        (["gpt2", "--overhead", 400 * "9" + "%", "--tokens", "1"], "expected a percentage"),
        (["gpt2", "--tokens", 400 * "9"], "--tokens"),
        (["gpt2", "--ranks", "1000000000"], "--ranks"),
        ([""], "no model ''"),
        (["nets"], "model 'nets': write nets:function, by the name of what makes the model there"),
        (["nets.py"], "model 'nets.py': write nets:function, by the name"),
        (["./pkg/nets.py"], "write pkg.nets:function, by the name"),
        ([300 * "x"], "File name too long; name a readable file"),
        (["gpt2", "--overhead", "5%"], "give its batch with --tokens"),
        (["gpt2", "--overhead", "0.05", "--tokens", "10"], "expected a percentage, for example 5%"),
        (["gpt2", "--overhead", "0%", "--tokens", "10"], "expected a percentage"),
        (["gpt2", "--with-weights"], "--with-weights belongs to --memory"),
        (["gpt2", "--dtype", "int8"], "--dtype int8: choose float32"),
        (["gpt2", "--ranks", "0"], "--ranks"),
        (["gpt2", "--ranks", "2", "--calibrate"], "--calibrate predicts one process"),
        (["gpt2", "--picture", "bars.jpg"], "--picture bars.jpg: expected a name that ends in .png"),
        (["gpt2", "--picture", "nowhere/bars.png"], "--picture nowhere/bars.png: there is no folder nowhere"),
        (["gpt2", "--frequncy", "3"], "--frequncy"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    (folder / "bad.json").write_text('{"model_type": "bert"}')
    (folder / "empty").mkdir()
    (folder / "nets.py").write_text("raise SystemExit('imported')")
    (folder / "pickle.pt").write_bytes(pickle.dumps({1}, protocol=4))
    assert said in complaint(capsys, "plan", *words)


def test_a_module_that_is_not_found_says_where_was_looked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "needs_other.py").write_text("import nowhere_else")
    where = f"(looked in {folder} and on Python's path; start in its folder)"
    assert where in complaint(capsys, "plan", "nowhere.model:make")
    assert "looked in" not in complaint(capsys, "plan", "needs_other:make")


def test_amounts_are_rounded_to_three_digits() -> None:
    assert [size(n) for n in (999, 1000, 12_345, 999_499_999, 1.5e12, 3e15)] == [
        "999 B", "1 kB", "12.3 kB", "999 MB", "1.5 TB", "3,000 TB"]  # fmt: skip
    assert [flops(n) for n in (0, 1e3, 5.05e16, 2e18)] == ["0", "1 k", "50.5 P", "2 E"]
