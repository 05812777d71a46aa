"""`soap inspect` as its user meets it: which files it reads, what it prints and leaves, mistakes in one line."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from emerging_optimizers.lab.cli import main
from emerging_optimizers.lab.race.race import Options, Race
from emerging_optimizers.soap import SOAP

from .conftest import complaint

HOSTILE = "<script>alert(1)</script>\x1b[31m"


def trained(steps: int = 30, dead: bool = False) -> tuple[nn.Module, SOAP]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = SOAP(model.named_parameters(), lr=1e-2, precondition_frequency=10)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 6)).square().mean().backward()
        if dead:
            model[0].weight.grad.zero_()
        optimizer.step()
    return model, optimizer


def inspect(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["inspect", *words]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    return out.out


def states(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    found = json.loads(inspect(capsys, *words, "--json"))
    assert found["format"] == "soap-inspect/1"
    return found["states"]


def test_a_healthy_checkpoint_is_a_table_and_nothing_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = trained()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "both.pt")
    out = inspect(capsys, "both.pt")
    assert out.startswith("Nothing wrong with 4 tensors (2 preconditioned; 30 steps).")
    assert "0.weight" in out
    assert "6/" not in out.splitlines()[0]
    assert "to its weight is not known" not in out
    assert "\x1b" not in out
    assert all(len(line) <= 120 for line in out.splitlines())


def test_updates_of_zero_after_a_schedule_are_explained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, optimizer = trained()
    for rate, explained in ((1e-2, False), (0.0, True)):
        optimizer.param_groups[0]["lr"] = rate
        torch.save(optimizer.state_dict(), "state.pt")
        out = inspect(capsys, "state.pt")
        assert ("The saved learning rate is 0, as at the end of a schedule; so the updates" in out) is explained
    matrices = [p for p in optimizer.param_groups[0]["params"] if p.dim() == 2]
    vectors = [p for p in optimizer.param_groups[0]["params"] if p.dim() == 1]
    parts = SOAP([{"params": matrices, "lr": 0.0}, {"params": vectors, "lr": 1e-2}], lr=1e-2)
    for p in (*matrices, *vectors):
        p.grad = torch.ones_like(p)
    parts.step()
    torch.save(parts.state_dict(), "parts.pt")
    assert "The saved learning rate of parameter 0, parameter 1 is 0" in inspect(capsys, "parts.pt")


@pytest.mark.parametrize("damage", ["dead", "corrupt"])
def test_what_is_wrong_comes_first(damage: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, optimizer = trained(dead=damage == "dead")
    if damage == "corrupt":
        optimizer.state[optimizer.param_groups[0]["params"][0]]["Q_1"][2, 2] += 0.3
    torch.save(optimizer.state_dict(), "state.pt")
    out = inspect(capsys, "state.pt")
    kind = {"dead": "dead gradient", "corrupt": "basis not orthogonal"}[damage]
    assert out.startswith("Something is wrong with 1 of 4 tensors (2 preconditioned; 30 steps).")
    assert f"0.weight: {kind}: " in out
    rows = [line.split()[0] for line in out.splitlines() if re.match(r" [02]\.(weight|bias) ", line)]
    assert rows[0] == "0.weight"
    assert len(rows) == 4
    assert "to its weight is not known" in out


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model, state: state,
        lambda model, state: {"model": model, "optimizer": state, "step": 3},
        lambda model, state: {"state_dict": model, "optimizer_states": [state]},
        lambda model, state: {"optim": state},
        lambda model, state: {"model": model, "optimizer": {"0": state}},
    ],
)
@pytest.mark.parametrize("as_zip", [True, False])  # torch's format, and its old one
def test_a_state_is_found_where_checkpoints_usually_keep_it(
    wrap: Any, as_zip: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = trained()
    checkpoint = wrap(model.state_dict(), optimizer.state_dict())
    torch.save(checkpoint, "checkpoint.pt", _use_new_zipfile_serialization=as_zip)
    (state,) = states(capsys, "checkpoint.pt")
    assert [tensor["name"] for tensor in state["tensors"]] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert state["findings"] == []


def test_the_checkpoint_of_a_stopped_race_has_a_state_per_soap_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"soap": (0.01, 0.02), "adamw": (0.01,)}
    race = Race(Options("tiny_tasks:Tiny", None, rates, (0,), 30, 10, 1))
    for _, _ in zip(range(60), race.play(), strict=False):
        pass
    torch.save(race.state(), "checkpoint.pt")
    found = states(capsys, "checkpoint.pt")
    assert [state["label"] for state in found] == ["soap, rate 0.01, seed 0", "soap, rate 0.02, seed 0"]
    assert all(tensor["update_ratio"] for state in found for tensor in state["tensors"])
    out = inspect(capsys, "checkpoint.pt")
    assert "soap, rate 0.02, seed 0:" in out


def test_out_leaves_a_page_that_loads_nothing_and_holds_hostile_names_as_words(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, optimizer = trained(dead=True)
    optimizer.param_groups[0]["param_names"] = [HOSTILE, "b", "c", "d"]
    torch.save(optimizer.state_dict(), "state.pt")
    before = (folder / "state.pt").read_bytes()
    out = inspect(capsys, "state.pt", "--out", "page")
    assert (folder / "state.pt").read_bytes() == before
    assert "\x1b" not in out
    assert sorted(path.name for path in (folder / "page").iterdir()) == ["health.html", "health.json"]
    page = (folder / "page" / "health.html").read_text()
    assert page.count("<svg") == 1  # the dead matrix has no spectrum
    assert "dead gradient" in page
    assert "<script" not in page
    assert "\x1b" not in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    assert str(folder) not in page
    assert json.loads((folder / "page" / "health.json").read_text())["states"][0]["findings"]
    inspect(capsys, "state.pt", "--out", "page")  # a folder of ours is overwritten


def test_an_optimizer_without_a_step_is_said_to_be_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(SOAP(nn.Linear(2, 2).parameters(), lr=1.0).state_dict(), "fresh.pt")
    out = inspect(capsys, "fresh.pt", "--out", "page")
    assert "has not taken a step" in out
    assert "Without a state yet (no gradient has come): parameter 0, parameter 1." in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Missing argument 'CHECKPOINT'. See soap inspect --help."),
        (["missing.pt"], "missing.pt: No such file or directory"),
        (["text.pt"], "text.pt: not a checkpoint that torch.load(weights_only=True) reads"),
        (["pickle.pt"], "pickle.pt: not a checkpoint that torch.load(weights_only=True) reads"),
        (["newer.pickle"], "newer.pickle: not a checkpoint that torch.load(weights_only=True) reads"),
        (["foreign"], "foreign: Is a directory; name a file in it"),
        (["whole.pt"], "it has a torch.nn.modules.container.Sequential: save optimizer.state_dict(), not the object"),
        (["empty.pt"], "empty.pt: not a checkpoint"),
        (["half.pt"], "half.pt: not a checkpoint"),
        (["good.pt", "--out", "good.pt/in"], "--out good.pt/in: cannot be made (Not a directory)"),
        (["damaged.pt"], "damaged.pt: "),
        (["model.pt"], "model.pt: no optimizer state under optimizer, optim,"),
        (["tensor.pt"], "it has: no dict"),
        (["adamw.pt"], "adamw.pt: the optimizer state in it is not SOAP's"),
        (["shape.pt"], "shape.pt: the state 'Q_0' of 0.weight must have shape (8, 8), got (2, 2)"),
        (["good.pt", "--out", "foreign"], "--out foreign: the folder is not empty and not an inspection's"),
        (["good.pt", "--out", "good.pt"], "--out good.pt: cannot be made"),
        (["good.pt", "--jsn"], "--jsn"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = trained(steps=2)
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("precious")
    (folder / "text.pt").write_text("no checkpoint")
    torch.save({"optimizer": optimizer.state_dict(), "extra": Path("x")}, "pickle.pt")
    torch.save(optimizer.state_dict(), "good.pt")
    (folder / "newer.pickle").write_bytes(pickle.dumps({1}, protocol=4))
    (folder / "empty.pt").touch()
    content = bytearray((folder / "good.pt").read_bytes())
    (folder / "half.pt").write_bytes(content[: len(content) // 2])
    content[content.index(b"param_groups")] ^= 1  # in the record of the pickle, whose checksum it breaks
    (folder / "damaged.pt").write_bytes(content)
    torch.save(model.state_dict(), "model.pt")
    torch.save(model, "whole.pt")
    torch.save(torch.ones(2), "tensor.pt")
    torch.save({"optimizer": torch.optim.AdamW(model.parameters()).state_dict()}, "adamw.pt")
    damaged = optimizer.state_dict()
    damaged["state"][0] = {**damaged["state"][0], "Q_0": torch.eye(2)}
    torch.save(damaged, "shape.pt")

    with warnings.catch_warnings(record=True) as warned:  # would be more lines on stderr
        warnings.simplefilter("always")
        assert said in complaint(capsys, "inspect", *words)
    assert not warned
    assert [path.name for path in (folder / "foreign").iterdir()] == ["thesis.tex"]
