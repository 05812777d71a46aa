"""The race in words: who wins, by how much, at what cost. Every sentence follows from the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from emerging_optimizers.lab.results import LABELS, Line, score


def verdict(lines: Sequence[Line], metric: str, finished: bool) -> str:
    """Put a race's result into a few sentences.

    Args:
        lines: from `summarise`, best first.
        metric: what the scores are, with the unit.
        finished: False if the race was stopped early.
    """
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
    further = "higher" if line.edge == "highest" else "lower"
    return (
        f"{LABELS[line.optimizer]}'s best learning rate, {line.lr:g}, is the {line.edge} of the {line.rates} tried: "
        f"a {further} one may be better (--lr)."
    )


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
