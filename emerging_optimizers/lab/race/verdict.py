"""What a race has shown: records of runs in, one line per optimizer out, and the whole in words.

"AdamW's best" of a seed is the lowest score that AdamW, at its best learning rate, had in that seed. An optimizer
reaches it at its first evaluation with that score or a lower one. Over seeds, medians are taken; a run that diverged,
or that never reached AdamW's best, counts as infinitely bad in them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from emerging_optimizers.lab.race.race import Record

LABELS = {
    "soap": "SOAP",
    "soap-kronecker": "SOAP (Kronecker)",
    "kl-soap": "KL-SOAP",
    "adamw": "AdamW",
    "muon": "Muon",
}


@dataclass(frozen=True)
class Line:
    """One optimizer's result at its best learning rate. None stands for: diverged, or never."""

    optimizer: str
    lr: float  # with the lowest median of best scores
    rates: int  # so many were tried
    edge: str | None  # "highest" or "lowest" where `lr` is that of several rates: one beyond it may be better
    seeds: int
    diverged: int
    final: float | None
    best: float | None
    best_by_seed: tuple[float | None, ...]
    steps: float | None  # until AdamW's best
    seconds: float | None
    step_fraction: float | None  # of the steps that AdamW took to its best: the median of the seeds' fractions
    second_fraction: float | None
    optimizer_share: float | None
    median_step: float | None  # the first step of a run is left out in these two, as it allocates
    worst_step: float | None
    bytes_per_parameter: float


def seconds_at_evaluations(record: Record) -> list[float]:
    """Compute the training seconds spent at each evaluation."""
    elapsed = [0.0, *accumulate(record.step_seconds)]
    return [elapsed[step] for step in record.eval_steps]


def comparable(records: Sequence[Record]) -> list[Record]:
    """Cut the scores of a stopped race down to the evaluations that all its runs have come to.

    Otherwise the runs that happened to have their turn would look better. A finished race stays as it is.
    """
    shared = min((r.eval_steps[-1] for r in records if not r.diverged), default=0)
    cut = [sum(step <= shared for step in r.eval_steps) if not r.diverged else None for r in records]
    return [
        replace(r, eval_steps=r.eval_steps[:n], validation=r.validation[:n]) for r, n in zip(records, cut, strict=True)
    ]


def best_runs(records: Sequence[Record], optimizer: str) -> list[Record]:
    """Select an optimizer's runs at its best learning rate, in the order of the records."""
    rates = dict.fromkeys(r.lr for r in records if r.optimizer == optimizer)
    groups = [[r for r in records if (r.optimizer, r.lr) == (optimizer, lr)] for lr in rates]
    return min(groups, key=lambda group: statistics.median(map(_best, group)), default=[])


def summarise(records: Sequence[Record]) -> list[Line]:
    """Summarise a race: one line per optimizer, the best score first, diverged ones last."""
    adamw = {r.seed: r for r in best_runs(records, "adamw")}
    names = dict.fromkeys(r.optimizer for r in records)
    lines = [_line(records, name, adamw) for name in names]
    return sorted(lines, key=lambda line: math.inf if line.best is None else line.best)


def _line(records: Sequence[Record], optimizer: str, adamw: dict[int, Record]) -> Line:
    runs = best_runs(records, optimizer)
    rates = {r.lr for r in records if r.optimizer == optimizer}
    goals = [_reach(r, adamw.get(r.seed)) for r in runs]  # (steps, seconds)
    own = [_reach(adamw[r.seed], adamw[r.seed]) if r.seed in adamw else (math.inf, math.inf) for r in runs]
    later = [(a, b) for r in runs for a, b in zip(r.step_seconds[1:], r.optimizer_seconds[1:], strict=True)]
    steps = [step for step, _ in later]
    return Line(
        optimizer=optimizer,
        lr=runs[0].lr,
        rates=len(rates),
        edge=None if len(rates) == 1 else {max(rates): "highest", min(rates): "lowest"}.get(runs[0].lr),
        seeds=len(runs),
        diverged=sum(r.diverged is not None for r in runs),
        final=_median(math.inf if r.diverged else r.validation[-1] for r in runs),
        best=_median(map(_best, runs)),
        best_by_seed=tuple(None if r.diverged else _best(r) for r in runs),
        steps=_median(goal[0] for goal in goals),
        seconds=_median(goal[1] for goal in goals),
        step_fraction=_median(_ratio(goal[0], base[0]) for goal, base in zip(goals, own, strict=True)),
        second_fraction=_median(_ratio(goal[1], base[1]) for goal, base in zip(goals, own, strict=True)),
        optimizer_share=sum(part for _, part in later) / sum(steps) if sum(steps) else None,
        median_step=_median(steps) if steps else None,
        worst_step=max(steps, default=None),
        bytes_per_parameter=max(r.state_bytes / r.parameters for r in runs),
    )


def _best(record: Record) -> float:
    return math.inf if record.diverged else min(record.validation)


def _reach(record: Record, adamw: Record | None) -> tuple[float, float]:
    """Find the steps and seconds until AdamW's best of the same seed; infinite if never."""
    if adamw is None or adamw.diverged or record.diverged:
        return math.inf, math.inf
    evaluations = zip(record.eval_steps, seconds_at_evaluations(record), record.validation, strict=True)
    return next(((n, s) for n, s, score in evaluations if score <= min(adamw.validation)), (math.inf, math.inf))


def _ratio(part: float, whole: float) -> float:
    # A whole of 0: AdamW never got below its start. Infinity: it diverged. No fraction of them has a meaning.
    return part / whole if 0 < whole < math.inf else math.inf


def _median(values: Iterable[float]) -> float | None:
    value = statistics.median(values)
    return value if math.isfinite(value) else None


#: Of a table, with what stands in them.
COLUMNS: dict[str, Callable[[Line], str]] = {
    "optimizer": lambda line: LABELS[line.optimizer] + _lost(line),
    "peak rate": lambda line: f"{line.lr:g}" + (f" (best of {line.rates})" if line.rates > 1 else ""),
    "final": lambda line: "diverged" if line.final is None else score(line.final),
    "best": lambda line: "diverged" if line.best is None else score(line.best),
    "steps to AdamW's best": lambda line: _number(line.steps, ".0f") + _brackets(line.step_fraction),
    "seconds to AdamW's best": lambda line: _number(line.seconds, ".1f") + _brackets(line.second_fraction),
    "optimizer share": lambda line: _number(line.optimizer_share, ".0%"),
    "median step": lambda line: _number(line.median_step, ".1f", " ms", 1e3),
    "worst step": lambda line: _number(line.worst_step, ".1f", " ms", 1e3),
    "state, B/param": lambda line: f"{line.bytes_per_parameter:.1f}",
}


def cells(line: Line) -> tuple[str, ...]:
    """Format a line for a table with the headings `COLUMNS`."""
    return tuple(cell(line) for cell in COLUMNS.values())


def _lost(line: Line) -> str:
    return f" ({line.diverged} of {line.seeds} diverged)" if line.diverged and line.best is not None else ""


def _number(value: float | None, form: str, unit: str = "", scale: float = 1) -> str:
    return "-" if value is None else f"{scale * value:{form}}{unit}"


def _brackets(fraction: float | None) -> str:
    return "" if fraction is None else f" ({fraction:.0%})"


def score(value: float) -> str:
    """Format a score with three decimals, or three digits where it is below 1."""
    return f"{value:.3f}" if abs(value) >= 1 else f"{value:.3g}"


# --- in words: every sentence follows from the numbers -----------------------------------------------------------


def verdict(lines: Sequence[Line], metric: str, finished: bool) -> str:
    """Put a race's result, from `summarise`, into a few sentences; ``metric`` is what the scores are, with the unit."""
    sound = [line for line in lines if line.best is not None]
    if not sound:
        return "Every optimizer diverged: give lower learning rates with --lr."
    sentences = [] if finished else ["Stopped early; so far:"]
    sentences.append(_who(sound, metric))
    winner = sound[0]
    adamw = next((line for line in sound if line.optimizer == "adamw"), None)
    if adamw and winner is not adamw and winner.step_fraction is not None and winner.second_fraction is not None:
        sentences.append(
            f"It reaches AdamW's best after {winner.step_fraction:.0%} of the steps and {winner.second_fraction:.0%} "
            "of the training seconds that AdamW took."
        )
    if len(sound) > 1:
        sentences.append(_cost(winner, adamw if adamw and winner is not adamw else sound[1]))
    if adamw:
        sentences += _clock(sound, winner)
    if lost := [LABELS[line.optimizer] for line in lines if line.best is None]:
        sentences.append(f"Diverged, at the learning rates given: {_list(lost)}.")
    sentences += [_beyond(line) for line in sound if line.edge]
    if winner.seeds == 1 and len(sound) > 1:
        sentences.append("This is one seed; --seeds 0,1,2 shows how much chance there is in it.")
    return " ".join(sentences)


def _who(sound: Sequence[Line], metric: str) -> str:
    winner = sound[0]
    others = [f"{score(line.best)} for {LABELS[line.optimizer]}" for line in sound[1:] if line.best is not None]
    best = "" if winner.best is None else score(winner.best)
    if not others:
        return f"{LABELS[winner.optimizer]} reaches {best} ({metric}), with no rival to compare."
    over = f", medians of {winner.seeds} seeds" if winner.seeds > 1 else ""
    numbers = f"best {metric}: {best} against {_list(others)}{over}."
    level = [LABELS[line.optimizer] for line in sound[1:] if not _ahead(winner, line)]
    if level:
        where = " (neither is ahead on every seed)" if winner.seeds > 1 else ""
        return f"{_list([LABELS[winner.optimizer], *level])} are level{where}; {numbers}"
    return f"{LABELS[winner.optimizer]} wins; {numbers}"


def _ahead(winner: Line, rival: Line) -> bool:
    """Tell whether one beats the other on every seed, by an amount that shows. Seeds pair: same start, same batches."""
    pairs = zip(winner.best_by_seed, rival.best_by_seed, strict=True)
    return all(a is not None and (b is None or (a < b and score(a) != score(b))) for a, b in pairs)


def _cost(winner: Line, rival: Line) -> str:
    own, other = winner.bytes_per_parameter, rival.bytes_per_parameter
    memory = f"keeps {own:.0f} bytes of state per parameter against {other:.0f}"
    if not winner.median_step or not rival.median_step:
        return f"It {memory} for {LABELS[rival.optimizer]}."
    ratio = winner.median_step / rival.median_step
    return f"Its median step takes {ratio:.2f} times as long as {LABELS[rival.optimizer]}'s, and it {memory}."


def _clock(sound: Sequence[Line], winner: Line) -> list[str]:
    """Say who reaches AdamW's best first by the clock, where that is not the winner anyway."""
    earlier = [(line.second_fraction, line) for line in sound if line.second_fraction and line.second_fraction < 1]
    if not earlier:
        return [] if winner.optimizer == "adamw" else ["By the clock, nobody is at AdamW's best before AdamW itself."]
    fraction, first = min(earlier, key=lambda pair: pair[0])
    if first is winner:
        return []
    return [f"By the clock, {LABELS[first.optimizer]} is first at AdamW's best, after {fraction:.0%} of its seconds."]


def _beyond(line: Line) -> str:
    name, further = LABELS[line.optimizer], "higher" if line.edge == "highest" else "lower"
    tried = f"{line.lr:g}, is the {line.edge} of the {line.rates} tried"
    return f"{name}'s best learning rate, {tried}: a {further} one may be better (--lr)."


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
