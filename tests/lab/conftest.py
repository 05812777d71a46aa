"""Shared by the lab's tests: small user tasks, hand-made records, and folders of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers.lab.cli import main
from emerging_optimizers.lab.race.race import Record

TINY = '''
import torch
from torch import nn


class Tiny:
    """Regression with dropout: a step takes well under a millisecond."""

    name, metric, steps, eval_every = "tiny", "mean squared error", 30, 5

    def __init__(self, seed):
        self.seed = seed

    def model(self):
        return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))

    def batch(self, step):
        return torch.randn(32, 6, generator=torch.Generator().manual_seed(1000 * self.seed + step + 1))

    def loss(self, model, batch):
        return (model(batch) - batch.sin().sum(1, keepdim=True)).square().mean()

    @torch.no_grad()
    def validate(self, model):
        return self.loss(model, self.batch(-1)).item()


class Explodes(Tiny):
    name = "explodes"

    def loss(self, model, batch):
        return super().loss(model, batch) * (float("nan") if model.training and batch[0, 0] > 1 else 1.0)


class Worsens(Tiny):
    def validate(self, model):
        return 1 / super().validate(model)


class Slow(Tiny):
    def batch(self, step):
        import time

        time.sleep(0.005)
        return super().batch(step)


class Half:
    def model(self): ...
    def batch(self, step): ...


class NoSeed(Tiny):
    def __init__(self): ...
'''


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, holding a module `tiny_tasks` with tasks of a user."""
    (tmp_path / "tiny_tasks.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "tiny_tasks", raising=False)
    return tmp_path


@pytest.fixture
def record() -> Callable[..., Record]:
    """Make a record of a run with an evaluation every 10 steps, 1 s per step of which 0.25 s for the optimizer."""

    def make(optimizer: str, validation: list[float], *, lr: float = 0.1, seed: int = 0, step_seconds: float = 1.0,
             diverged: str | None = None) -> Record:  # fmt: skip
        steps = 10 * (len(validation) - 1)
        return Record(
            optimizer=optimizer,
            lr=lr,
            seed=seed,
            parameters=100,
            eval_steps=list(range(0, steps + 1, 10)),
            validation=validation,
            train_loss=[1.0] * steps,
            step_seconds=[step_seconds] * steps,
            optimizer_seconds=[step_seconds / 4] * steps,
            state_bytes=800,
            diverged=diverged,
        )

    return make


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command says to a mistake: exit code 2 and one printable line, on stderr."""
    assert main([*words]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("soap: ")
    assert err.count("\n") == 1
    assert (out + err).replace("\n", "").isprintable()
    assert not out or words[0] == "race"  # which may have begun to talk
    return err


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    pairs: list[tuple[Tensor, Tensor]] = list(zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    return all(torch.equal(x, y) for x, y in pairs)
