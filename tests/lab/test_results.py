"""Results, verdict and report from records made by hand, where every number can be checked in the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from emerging_optimizers.lab.race.race import Record
from emerging_optimizers.lab.race.report import render
from emerging_optimizers.lab.race.verdict import cells, comparable, seconds_at_evaluations, summarise, verdict

Make = Callable[..., Record]


def test_reaching_adamws_best_is_counted_in_steps_and_seconds(record: Make) -> None:
    adamw = record("adamw", [5.0, 3.0, 2.0, 1.0, 1.2])
    soap = record("soap", [5.0, 2.0, 1.0, 0.9, 0.8], step_seconds=2.0)
    first, second = summarise([adamw, soap])
    assert (first.optimizer, second.optimizer) == ("soap", "adamw")
    assert (first.steps, first.seconds) == (20, 40.0)
    assert (first.step_fraction, first.second_fraction) == (pytest.approx(2 / 3), pytest.approx(4 / 3))
    assert (second.steps, second.seconds, second.step_fraction) == (30, 30.0, 1.0)
    assert (second.final, second.best) == (1.2, 1.0)
    assert (first.optimizer_share, first.median_step, first.worst_step) == (0.25, 2.0, 2.0)
    assert first.bytes_per_parameter == 8.0


def test_the_first_step_is_left_out_of_the_timing(record: Make) -> None:
    slow_start = record("soap", [5.0, 1.0])
    slow_start.step_seconds[0], slow_start.optimizer_seconds[0] = 100.0, 99.0
    slow_start.step_seconds[4] = 3.0
    (line,) = summarise([slow_start])
    assert (line.median_step, line.worst_step) == (1.0, 3.0)
    assert line.optimizer_share == pytest.approx(9 * 0.25 / 11.0)
    assert seconds_at_evaluations(slow_start) == [0.0, 111.0]


def test_the_best_learning_rate_is_reported_as_such(record: Make) -> None:
    runs = [record("soap", [5.0, best], lr=lr) for lr, best in ((0.1, 2.0), (0.2, 1.0), (0.3, 3.0))]
    (line,) = summarise(runs)
    assert (line.lr, line.rates, line.best) == (0.2, 3, 1.0)
    assert cells(line)[1] == "0.2 (best of 3)"
    (line,) = summarise([record("soap", [5.0, 0.1], lr=1.0, diverged="nan"), record("soap", [5.0, 2.0], lr=0.1)])
    assert line.lr == 0.1


def test_seeds_are_paired_and_their_median_taken(record: Make) -> None:
    adamw = [record("adamw", [5.0, 2.0, best], seed=seed) for seed, best in enumerate((1.0, 1.5, 1.2))]
    soap = [record("soap", [5.0, 1.4, 0.9], seed=seed) for seed in range(3)]
    line = summarise([*adamw, *soap])[0]
    assert (line.optimizer, line.seeds) == ("soap", 3)
    assert line.step_fraction == 1.0  # 20/20, 10/20, 20/20
    assert summarise([*adamw, *soap])[1].best == 1.2


def test_never_reaching_adamws_best_is_a_dash(record: Make) -> None:
    line = summarise([record("adamw", [5.0, 1.0]), record("muon", [5.0, 2.0])])[1]
    assert line.steps is None
    assert cells(line)[4:6] == ("-", "-")
    lines = summarise([record("soap", [5.0, 1.0]), record("muon", [5.0, 2.0])])  # nor is there any
    assert all(line.steps is None for line in lines)
    assert "AdamW" not in verdict(lines, "loss", True)


def test_a_diverged_run_is_no_number(record: Make) -> None:
    lines = summarise([record("adamw", [5.0, 1.0]), record("muon", [5.0, 0.1], diverged="loss nan at step 12")])
    assert [line.optimizer for line in lines] == ["adamw", "muon"]
    assert cells(lines[1])[2:4] == ("diverged", "diverged")
    assert "Diverged, at the learning rates given: Muon." in verdict(lines, "loss", True)
    runs = [record("soap", [5.0, 1.0 + seed], seed=seed, diverged="nan" if seed == 0 else None) for seed in range(3)]
    (line,) = summarise(runs)
    assert (line.diverged, line.best) == (1, 3.0)  # the median of inf, 2 and 3
    assert cells(line)[0] == "SOAP (1 of 3 diverged)"


def test_a_stopped_race_compares_what_all_runs_have(record: Make) -> None:
    ahead, behind = record("soap", [5.0, 3.0, 1.0]), record("muon", [5.0, 2.0])
    assert [line.optimizer for line in summarise(comparable([ahead, behind]))] == ["muon", "soap"]
    assert comparable([ahead]) == [ahead]


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ({"soap": 1.0, "adamw": 2.0, "muon": 1.5}, "SOAP wins; best loss: 1.000 against 1.500 for Muon and 2.000"),
        ({"soap": 2.0, "adamw": 1.0, "muon": 1.5}, "AdamW wins; best loss: 1.000 against 1.500 for Muon and 2.000"),
        ({"soap": 1.5, "adamw": 2.0, "muon": 1.0}, "Muon wins; best loss: 1.000 against 1.500 for SOAP and 2.000"),
        ({"soap": 1.0, "adamw": 1.0}, "SOAP and AdamW are level; best loss"),
        ({"soap": 1.0}, "SOAP reaches 1.000 (loss), with no rival to compare."),
    ],
)
def test_the_verdict_names_the_winner_whoever_it_is(record: Make, scores: dict[str, float], says: str) -> None:
    words = verdict(summarise([record(name, [5.0, best]) for name, best in scores.items()]), "loss", True)
    assert words.startswith(says)


def test_the_verdict_gives_cost_and_clock(record: Make) -> None:
    soap = record("soap", [5.0, 2.0, 1.0], step_seconds=4.0)
    muon, adamw = record("muon", [5.0, 2.5, 1.5]), record("adamw", [5.0, 3.0, 2.0])
    words = verdict(summarise([adamw, soap, muon]), "loss", True)
    assert "It reaches AdamW's best after 50% of the steps and 200% of the training seconds" in words
    assert "Its median step takes 4.00 times as long as AdamW's" in words
    assert "nobody is at AdamW's best before AdamW itself" in words
    assert words.endswith("--seeds 0,1,2 shows how much chance there is in it.")
    quick = record("muon", [5.0, 2.0, 1.5])
    words = verdict(summarise([adamw, soap, quick]), "loss", True)
    assert "By the clock, Muon is first at AdamW's best, after 50% of its seconds." in words


def test_a_best_rate_at_the_edge_of_its_sweep_is_said(record: Make) -> None:
    def raced(best_of_rates: dict[float, float]) -> str:
        runs = [replace(record("soap", [5.0, best]), lr=rate) for rate, best in best_of_rates.items()]
        return verdict(summarise([*runs, record("adamw", [5.0, 3.0])]), "loss", True)

    rising = raced({0.001: 3.0, 0.01: 2.0, 0.1: 1.0})
    assert "SOAP's best learning rate, 0.1, is the highest of the 3 tried: a higher one may be better (--lr)." in rising
    falling = raced({0.01: 2.0, 0.1: 3.0})
    assert "SOAP's best learning rate, 0.01, is the lowest of the 2 tried: a lower one may be better (--lr)." in falling
    assert "may be better" not in raced({0.001: 3.0, 0.01: 1.0, 0.1: 2.0})
    assert "may be better" not in raced({0.01: 1.0})
    assert "AdamW's best learning rate" not in rising


def test_a_winner_must_be_ahead_on_every_seed(record: Make) -> None:
    soap = [record("soap", [5.0, best], seed=seed) for seed, best in enumerate((1.0, 1.1, 1.4))]
    muon = [record("muon", [5.0, best], seed=seed) for seed, best in enumerate((1.2, 1.2, 1.3))]
    assert verdict(summarise([*soap, *muon]), "loss", True).startswith("SOAP and Muon are level (neither is ahead")
    muon[2].validation[1] = 1.5
    assert verdict(summarise([*soap, *muon]), "loss", True).startswith("SOAP wins")


def test_the_report_escapes_every_string_from_outside(record: Make) -> None:
    evil = '<script>alert("$x$")</script>&'
    records = [record("soap", [5.0, 1.0], diverged=evil), record("adamw", [5.0, 2.0])]
    lines = summarise(records)
    results = {
        "finished": True,
        "verdict": evil,
        "note": evil,
        "task": {"name": evil, "metric": evil, "steps": 10},
        "options": {"task": evil, "text": evil, "seeds": (0,), "learning_rates": {evil: (0.1,)}},
        "machine": {"cpu": evil},
        "versions": {evil: evil},
        "date": evil,
        "routing": [{"name": evil, "shape": (2, 2), "numel": 4, "optimizer": evil, "reason": evil}],
    }
    page = render(results, lines, records)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 10
    assert "http://" not in page.replace("http://www.w3.org/", "")  # namespaces of the SVG are names, not addresses
    assert "https://" not in page
    assert "src=" not in page
