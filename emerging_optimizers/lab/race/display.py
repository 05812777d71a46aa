"""What a race shows while it runs and at its end: a live table on a terminal, plain lines in a pipe."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from emerging_optimizers.lab.common import printable, tell
from emerging_optimizers.lab.race.race import Race, Run
from emerging_optimizers.lab.race.verdict import COLUMNS, LABELS, Line, cells, score
from emerging_optimizers.routing import route_parameters

REDRAW_SECONDS = 0.25

Update = Callable[[Run], None]  # is told of each run that has moved


@contextmanager
def live(race: Race, console: Console) -> Iterator[Update]:
    """Redraw a table in place, with a progress bar per optimizer and learning rate."""
    drawn = 0.0
    # No refresh thread: it would take the interpreter from the step that is being timed.
    with Live(_progress(race), console=console, auto_refresh=False) as shown:

        def update(_: Run) -> None:
            nonlocal drawn
            if (now := monotonic()) - drawn > REDRAW_SECONDS:
                drawn = now
                shown.update(_progress(race), refresh=True)

        try:
            yield update
        finally:
            shown.update(_progress(race), refresh=True)


def _progress(race: Race) -> Table:
    table = Table(
        box=box.SIMPLE,
        pad_edge=False,
        collapse_padding=True,
        # As a Text, because a string is read for markup: [m/s] would be a style, and [/s] an error.
        caption=Text(f"scores: {race.settings.metric}; Ctrl-C stops and saves", style="table.caption"),
    )
    table.add_column("optimizer", no_wrap=True)
    table.add_column("progress", min_width=10)
    for heading in ("rate", "step", "train loss", "score", "ms per step", "opt. share"):
        table.add_column(heading, justify="right")
    for runs in _rows(race):
        record = runs[0].record
        done, total = sum(run.step for run in runs), race.steps * len(runs)
        seconds = sum(sum(run.record.step_seconds) for run in runs)
        own = sum(sum(run.record.optimizer_seconds) for run in runs)
        sound = [run.record for run in runs if not run.record.diverged]
        losses = [r.train_loss[-1] for r in sound if r.train_loss]
        table.add_row(
            LABELS[record.optimizer] + ("" if len(sound) == len(runs) else f" ({len(runs) - len(sound)} diverged)"),
            ProgressBar(total=total, completed=done, width=20),
            f"{record.lr:g}",
            f"{done // len(runs)}/{race.steps}",
            score(statistics.median(losses)) if losses else "-",
            score(statistics.median(r.validation[-1] for r in sound)) if sound else "-",
            f"{1e3 * seconds / done:.0f}" if done else "-",
            f"{own / seconds:.0%}" if seconds else "-",
        )
    return table


@contextmanager
def plain(race: Race, console: Console) -> Iterator[Update]:
    """Print a line when all runs have come through another tenth of their steps, for logs and pipes."""
    told = max(10 * run.step // race.steps for run in race.runs)
    begin = monotonic()

    def update(run: Run) -> None:
        nonlocal told
        step = run.step
        level = all(other.step == step or other.record.diverged for other in race.runs)
        if not level or 10 * step // race.steps <= told:
            return
        told = 10 * step // race.steps
        scores = []
        for runs in _rows(race):
            record = runs[0].record
            sound = [r.record.validation[-1] for r in runs if not r.record.diverged]
            rate = f" {record.lr:g}" if len(race.options.learning_rates[record.optimizer]) > 1 else ""
            scores.append(f"{record.optimizer}{rate} {score(statistics.median(sound)) if sound else 'diverged'}")
        tell(console, f"step {step}/{race.steps}  {'  '.join(scores)}  [{monotonic() - begin:.0f} s]")

    yield update


def _rows(race: Race) -> list[list[Run]]:
    """Group the runs by optimizer and learning rate, over seeds."""
    keys = dict.fromkeys((run.record.optimizer, run.record.lr) for run in race.runs)
    return [[run for run in race.runs if (run.record.optimizer, run.record.lr) == key] for key in keys]


def print_routing(race: Race, console: Console) -> None:
    """Say once which parameters go to SOAP and which to AdamW, and why: one line per reason."""
    groups: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for route in route_parameters(race.runs[0].model).routes:
        groups.setdefault((route.optimizer, route.reason), []).append((route.name, route.numel))
    total = sum(numel for group in groups.values() for _, numel in group)
    tell(console, f"{total:,} parameters; what SOAP trains and what AdamW does instead:", soft_wrap=False)
    table = Table(box=None)
    for heading in ("", "tensors", "share", "why", "names"):
        table.add_column(heading, justify="right" if heading in ("tensors", "share") else "left")
    for (optimizer, reason), group in groups.items():
        # blocks.0.up.weight and blocks.1.up.weight read as blocks.*.up.weight.
        names = dict.fromkeys(re.sub(r"\b\d+\b", "*", printable(name)) for name, _ in group)
        share = sum(numel for _, numel in group) / total
        table.add_row(optimizer, str(len(group)), f"{share:.1%}", reason, ", ".join(names))
    tell(console, table)


def print_summary(lines: list[Line], console: Console) -> None:
    """Print the final table, one column per optimizer: so it fits 80 columns."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    names, *rows = zip(COLUMNS, *map(cells, lines), strict=True)
    for i, name in enumerate(names):
        table.add_column(name if i else "", justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        table.add_row(*row)
    tell(console, table)
