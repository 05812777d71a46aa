"""The engine: one start, the same batches, divergence noticed, and resumed bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from emerging_optimizers.lab.common import LabError
from emerging_optimizers.lab.race import checkpoint
from emerging_optimizers.lab.race.optimizers import DEFAULT_OPTIMIZERS, OPTIMIZERS, make_contender, tuned_rate
from emerging_optimizers.lab.race.race import Options, Race, learning_rate_factor
from emerging_optimizers.lab.tasks import BUILT_IN, make_task

from .conftest import same_weights


def options(task: str = "tiny_tasks:Tiny", rates: dict[str, tuple[float, ...]] | None = None,
            seeds: tuple[int, ...] = (0,), steps: int | None = None) -> Options:  # fmt: skip
    return Options(task, None, rates or dict.fromkeys(OPTIMIZERS, (1e-2,)), seeds, steps, frequency=4, threads=1)


def play(race: Race, steps: int | None = None) -> Race:
    for _ in itertools.islice(race.play(), steps):
        pass
    return race


def test_runs_of_a_seed_start_alike_and_seeds_differ(folder: Path) -> None:
    race = Race(options(seeds=(0, 1)))
    first = [run for run in race.runs if run.record.seed == 0]
    other = [run for run in race.runs if run.record.seed == 1]
    assert all(same_weights(first[0].model, run.model) for run in first)
    assert len({id(run.model) for run in race.runs}) == 2 * len(OPTIMIZERS)
    assert not same_weights(first[0].model, other[0].model)
    assert len({run.record.validation[0] for run in first}) == 1


def test_runs_see_the_same_batches_and_the_same_dropout(folder: Path) -> None:
    race = play(Race(options()))
    assert race.finished
    assert len({run.record.train_loss[0] for run in race.runs}) == 1
    assert len({run.record.train_loss[1] for run in race.runs}) > 1
    for run in race.runs:
        assert run.record.eval_steps == [0, 5, 10, 15, 20, 25, 30]
        assert len(run.record.step_seconds) == len(run.record.optimizer_seconds) == run.step == 30
        assert run.record.validation[-1] < run.record.validation[0]
        assert run.record.state_bytes > 0
        assert all(part < whole for part, whole in zip(run.record.optimizer_seconds, run.record.step_seconds,
                                                       strict=True))  # fmt: skip


def test_runs_take_turns(folder: Path) -> None:
    race = Race(options(rates={"soap": (1e-2,), "adamw": (1e-2,)}, steps=12))
    turns = [(run.record.optimizer, run.step) for run in race.play()]
    goals = [(0, 5), (5, 10), (10, 12)]
    assert turns == [(name, step + 1) for a, b in goals for name in ("soap", "adamw") for step in range(a, b)]


@pytest.mark.parametrize("stop_after", [1, 23, 25, 77])
def test_a_resumed_race_equals_an_uninterrupted_one_bit_for_bit(folder: Path, stop_after: int) -> None:
    whole = play(Race(options()))
    checkpoint.save(folder, play(Race(options()), stop_after).state())
    resumed = play(Race.restore(checkpoint.load(folder)))
    for a, b in zip(whole.runs, resumed.runs, strict=True):
        assert same_weights(a.model, b.model)
        assert a.record.train_loss == b.record.train_loss
        assert a.record.validation == b.record.validation
        assert a.record.eval_steps == b.record.eval_steps


def test_resuming_a_task_that_has_changed_is_refused(folder: Path) -> None:
    state = play(Race(options()), 5).state()
    state["starts"] = {0: (1.0, 2.0)}
    with pytest.raises(LabError, match="has changed since the race began"):
        Race.restore(state)


def test_a_run_whose_loss_is_not_finite_is_stopped_and_one_that_ends_worse_than_it_began_is_told(folder: Path) -> None:
    race = play(Race(options("tiny_tasks:Explodes", rates={"adamw": (1e-2,)})))
    (run,) = race.runs
    assert race.finished
    assert run.record.diverged is not None
    assert run.record.diverged.startswith("training loss nan at step")
    assert run.step < 30
    assert len(run.record.step_seconds) == run.step
    (run,) = play(Race(options("tiny_tasks:Worsens", rates={"adamw": (1e-2,)}))).runs
    assert "worse than its start" in str(run.record.diverged)


def test_the_schedule_warms_up_and_decays_to_zero() -> None:
    factors = [learning_rate_factor(step, 500) for step in range(500)]
    assert factors[0] < 0.1
    assert max(factors) == factors[10] > 0.97
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.01


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_parameter_is_trained_exactly_once(optimizer: str) -> None:
    for task in BUILT_IN:
        model = make_task(task, 0, {}).model()
        contender = make_contender(optimizer, model, 1e-2, task, 10)
        trained = [p for o in contender.optimizers for group in o.param_groups for p in group["params"]]
        assert len(trained) == len({id(p) for p in trained}) == len(list(model.parameters()))


def test_muon_trains_the_matrices_and_adamw_the_rest_at_its_tuned_rate() -> None:
    contender = make_contender("muon", make_task("charlm", 0, {}).model(), 0.5, "charlm", 10)
    muon, adamw = contender.optimizers
    assert {p.ndim for group in muon.param_groups for p in group["params"]} == {2}
    assert adamw.param_groups[0]["lr"] == tuned_rate("charlm", "adamw")
    contender.schedule(0.1)
    contender.schedule(0.5)  # a factor of the peak, not of the rate before
    assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (0.25, tuned_rate("charlm", "adamw") / 2)


def test_a_torch_without_muon_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(LabError, match="has no Muon: leave it out with --optimizers"):
        make_contender("muon", torch.nn.Linear(4, 4), 1e-2, "charlm", 10)


def test_every_default_optimizer_has_a_rate_for_every_task() -> None:
    assert set(DEFAULT_OPTIMIZERS) < set(OPTIMIZERS)
    assert all(tuned_rate(task, optimizer) > 0 for task in [*BUILT_IN, "anything"] for optimizer in OPTIMIZERS)


def test_a_file_that_fails_while_it_is_written_leaves_the_old_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"step": 1})

    def fail(file: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(tmp_path / checkpoint.CHECKPOINT, fail)
    assert checkpoint.load(tmp_path) == {"step": 1}


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("exploded"),))  # type: ignore[return-value]


def test_loading_a_checkpoint_runs_nothing_in_it(folder: Path) -> None:
    torch.save({"bomb": Bomb()}, folder / checkpoint.CHECKPOINT)
    with pytest.raises(LabError, match="not a readable checkpoint"):
        checkpoint.load(folder)
    assert not (folder / "exploded").exists()
    (folder / checkpoint.CHECKPOINT).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(LabError, match="not a readable checkpoint"):
        checkpoint.load(folder)
