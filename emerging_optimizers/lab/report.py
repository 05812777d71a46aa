"""The folder that a race leaves: ``results.json``, ``loss.png`` and a self-contained ``report.html``.

The page loads nothing and runs no script. Every string in it passes through `escape`, whoever it comes from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape as escape_html
from pathlib import Path
from typing import Any

from emerging_optimizers.lab import plots
from emerging_optimizers.lab.checkpoint import RESULTS, write_atomically
from emerging_optimizers.lab.folders import claim_folder
from emerging_optimizers.lab.machine import machine, versions
from emerging_optimizers.lab.optimizers import is_tuned, tuned_rate
from emerging_optimizers.lab.printable import printable
from emerging_optimizers.lab.race import Race, Record
from emerging_optimizers.lab.results import COLUMNS, LABELS, Line, cells, comparable, score, summarise
from emerging_optimizers.lab.verdict import verdict
from emerging_optimizers.routing import route_parameters

FORMAT = "soap-race/1"
UNSCORED = "No result yet: the race was stopped before every run had its first score."


def claim(folder: Path) -> None:
    """Make the output folder, or take over one that an earlier race made; LabError as of :func:`claim_folder`."""
    claim_folder(folder, RESULTS, FORMAT, "a race's")


def write(folder: Path, race: Race) -> tuple[list[Line], str]:
    """Write all three files; return the summary, best first, and the verdict in words."""
    results = collect(race)
    records = comparable([run.record for run in race.runs])
    lines = summarise(records)
    metric = race.settings.metric
    page = render(results, lines, records)
    write_atomically(folder / "loss.png", lambda f: plots.write_png(f, lines, records, _title(results), metric))
    write_atomically(folder / "report.html", lambda f: f.write(page.encode()))
    write_results(folder, results)
    return lines, results["verdict"]


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write ``results.json``, which also marks the folder as a race's."""
    text = json.dumps(results, indent=1, allow_nan=False)
    write_atomically(folder / RESULTS, lambda f: f.write(text.encode()))


def note(race: Race) -> str | None:
    """Say that tuned learning rates are used at another number of steps, where they are."""
    task, usual = race.options.task, race.settings.steps
    rates = race.options.learning_rates.items()
    if race.steps == usual or not is_tuned(task) or not any(tuned_rate(task, name) in given for name, given in rates):
        return None
    return f"The learning rates are tuned for {usual} steps; at {race.steps} the order may differ."


def collect(race: Race) -> dict[str, Any]:
    """Collect everything that ``results.json`` holds: plain values, finite numbers only."""
    records = comparable([run.record for run in race.runs])
    lines = summarise(records)
    scored = all(record.diverged or len(record.validation) > 1 for record in records)
    routes = route_parameters(race.runs[0].model).routes
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished": race.finished,
        "verdict": verdict(lines, race.settings.metric, race.finished) if scored else UNSCORED,
        "note": note(race),
        "task": race.settings._asdict() | {"steps": race.steps},
        "options": race.options.public(),
        "versions": versions(),
        "machine": machine(),
        "routing": [route._asdict() for route in routes],
        "summary": [asdict(line) for line in lines],
        "runs": [asdict(run.record) for run in race.runs],
    }


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 1.6rem 0 .4rem; }
.verdict { font-size: 1.15rem; } .note { color: #555; font-size: .9rem; }
.curves { display: flex; flex-wrap: wrap; gap: 1rem; } .curves figure { flex: 1 1 20rem; margin: 0; min-width: 0; }
svg { width: 100%; height: auto; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
details { margin: .8rem 0; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 40rem) {
  .stack, .stack tbody { display: block; } .stack thead { display: none; }
  .stack tr { display: block; padding: .5rem 0; border-bottom: 1px solid #999; }
  .stack td { display: flex; justify-content: space-between; border: 0; padding: .1rem 0; white-space: normal; }
  .stack td::before { content: attr(data-label); color: #555; padding-right: 1rem; }
  .stack td:first-child { font-weight: 600; } .stack td:first-child::before { content: none; }
}
"""


def escape(text: str) -> str:
    """Make text from anywhere fit to stand in the page, between tags or in an attribute."""
    return escape_html(printable(text))


def render(results: dict[str, Any], lines: Sequence[Line], records: Sequence[Record]) -> str:
    """Render the page: the answer first, then table, curves, and what is needed to judge and repeat it."""
    metric = results["task"]["metric"]
    curves = "".join(
        f'<figure role="img" aria-label="{escape(metric)} against {axis}">'
        f"{plots.svg(lines, records, axis, metric)}</figure>"
        for axis in plots.AXES
    )
    runs = [
        (
            LABELS[r.optimizer],
            f"{r.lr:g}",
            str(r.seed),
            score(r.validation[-1]) if not r.diverged else "diverged",
            score(min(r.validation)) if not r.diverged else r.diverged,
        )
        for r in records
    ]
    routes = [
        (r["name"], r["optimizer"], r["reason"], " x ".join(map(str, r["shape"])), f"{r['numel']:,}")
        for r in results["routing"]
    ]
    seeds = ", ".join(map(str, results["options"]["seeds"]))
    remark = f'\n<p class="note">{escape(results["note"])}</p>' if results["note"] else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(_title(results))}</title><style>{STYLE}</style></head><body>
<h1>{escape(_title(results))}</h1>
<p class="verdict">{escape(results["verdict"])}</p>
<p class="note">Same start weights and same batches for every optimizer; seed {escape(seeds)};
{results["task"]["steps"]} steps per run; scores: {escape(metric)}, lower is better.</p>{remark}
{table(COLUMNS, map(cells, lines), "stack")}
<p class="note">Brackets: as a fraction of what AdamW took to its own best. Training time is forward, backward and
optimizer, without validation. With several seeds, medians.</p>
<h2>Curves</h2>
<div class="curves">{curves}</div>
<h2>How it was measured</h2>
{_pairs("Options", results["options"])}
{_pairs("Machine", results["machine"])}
{_pairs("Versions", results["versions"] | {"date": results["date"]})}
<details><summary>Which parameter SOAP trains, and which AdamW</summary>
{table(("parameter", "optimizer", "why", "shape", "numbers"), routes, "")}
</details>
<details><summary>All {len(runs)} runs</summary>
{table(("optimizer", "peak rate", "seed", "final", "best"), runs, "")}
</details>
</body></html>
"""


def _title(results: dict[str, Any]) -> str:
    return f"soap race: {results['task']['name']}" + ("" if results["finished"] else " (stopped early)")


def table(headings: Iterable[str], rows: Iterable[Sequence[str]], kind: str) -> str:
    """Make a table, escaped. The kind "stack" turns into a list of cards where the page is narrow."""
    names = [escape(heading) for heading in headings]
    body = "".join(
        "<tr>"
        + "".join(f'<td data-label="{n}">{escape(str(v))}</td>' for n, v in zip(names, row, strict=True))
        + "</tr>"
        for row in rows
    )
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _pairs(kind: str, values: dict[str, Any]) -> str:
    def words(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {words(inner)}" for key, inner in value.items())
        return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    pairs = ", ".join(
        f"{key.replace('_gib', ' GiB').replace('_', ' ')}: {words(v)}" for key, v in values.items() if v is not None
    )
    return f'<p class="note"><b>{kind}.</b> {escape(pairs)}.</p>'
