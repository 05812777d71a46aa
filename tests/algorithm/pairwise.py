"""A deterministic all-pairs covering design: few rows in which every two options meet in every combination."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Pair = frozenset[tuple[str, int]]  # two (factor, index of its level)


def all_pairs(levels: Mapping[str, Sequence[Any]]) -> set[Pair]:
    """Every pair of levels of two different factors."""
    return {
        frozenset([(a, i), (b, j)])
        for a, b in itertools.combinations(levels, 2)
        for i in range(len(levels[a]))
        for j in range(len(levels[b]))
    }


def covered_pairs(row: Mapping[str, int], live: Callable[[Mapping[str, int]], Sequence[str]]) -> set[Pair]:
    """The pairs that a row of level indices really exercises: of the factors that matter in it."""
    return {frozenset(pair) for pair in itertools.combinations([(name, row[name]) for name in live(row)], 2)}


def pairwise_design(
    levels: Mapping[str, Sequence[Any]],
    live: Callable[[Mapping[str, int]], Sequence[str]],
    wanted: set[Pair],
    candidates: int = 60,
    seed: int = 0,
) -> list[dict[str, int]]:
    """Greedy: start a row with an uncovered pair, fill it level by level, keep the best of a few candidates."""
    rng = random.Random(seed)
    missing = sorted(wanted, key=lambda pair: sorted(pair))
    rows: list[dict[str, int]] = []
    while missing:
        uncovered = set(missing)
        best: dict[str, int] = {}
        best_gain = 0
        while best_gain == 0:  # a candidate covers nothing when the rest of its row masks its first pair
            for _ in range(candidates):
                row = dict(rng.choice(missing))
                for name in rng.sample(list(levels), len(levels)):
                    if name not in row:
                        choices = rng.sample(range(len(levels[name])), len(levels[name]))
                        row[name] = max(
                            choices,
                            key=lambda i: sum(frozenset([(name, i), other]) in uncovered for other in row.items()),  # noqa: B023
                        )
                gain = len(covered_pairs(row, live) & uncovered)
                if gain > best_gain:
                    best, best_gain = row, gain
        rows.append({name: best[name] for name in levels})
        done = covered_pairs(best, live)
        missing = [pair for pair in missing if pair not in done]
    return rows
