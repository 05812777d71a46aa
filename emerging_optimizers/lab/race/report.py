"""The folder that a race leaves: ``results.json``, ``loss.png`` and a self-contained ``report.html``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from emerging_optimizers.lab.common import machine, versions, write_atomically, write_text
from emerging_optimizers.lab.page import escape, render_page, render_table
from emerging_optimizers.lab.race import plots
from emerging_optimizers.lab.race.checkpoint import RESULTS
from emerging_optimizers.lab.race.optimizers import is_tuned, tuned_rate
from emerging_optimizers.lab.race.race import Race, Record
from emerging_optimizers.lab.race.verdict import COLUMNS, LABELS, Line, cells, comparable, score, summarise, verdict
from emerging_optimizers.routing import route_parameters

FORMAT = "soap-race/1"
UNSCORED = "No result yet: the race was stopped before every run had its first score."


def write(folder: Path, race: Race) -> tuple[list[Line], str]:
    """Write all three files; return the summary, best first, and the verdict in words."""
    results = collect(race)
    records = comparable([run.record for run in race.runs])
    lines = summarise(records)
    metric = race.settings.metric
    page = render(results, lines, records)
    write_atomically(folder / "loss.png", lambda f: plots.write_png(f, lines, records, _title(results), metric))
    write_text(folder / "report.html", page)
    write_results(folder, results)
    return lines, results["verdict"]


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write ``results.json``, which also marks the folder as a race's."""
    write_text(folder / RESULTS, json.dumps(results, indent=1, allow_nan=False))


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
    body = f"""<p class="verdict">{escape(results["verdict"])}</p>
<p class="note">Same start weights and same batches for every optimizer; seed {escape(seeds)};
{results["task"]["steps"]} steps per run; scores: {escape(metric)}, lower is better.</p>{remark}
{render_table(COLUMNS, map(cells, lines), "stack")}
<p class="note">Brackets: as a fraction of what AdamW took to its own best. Training time is forward, backward and
optimizer, without validation. With several seeds, medians.</p>
<h2>Curves</h2>
<div class="curves">{curves}</div>
<h2>How it was measured</h2>
{_pairs("Options", results["options"])}
{_pairs("Machine", results["machine"])}
{_pairs("Versions", results["versions"] | {"date": results["date"]})}
<details><summary>Which parameter SOAP trains, and which AdamW</summary>
{render_table(("parameter", "optimizer", "why", "shape", "numbers"), routes)}
</details>
<details><summary>All {len(runs)} runs</summary>
{render_table(("optimizer", "peak rate", "seed", "final", "best"), runs)}
</details>"""
    return render_page(_title(results), body)


def _title(results: dict[str, Any]) -> str:
    return f"soap race: {results['task']['name']}" + ("" if results["finished"] else " (stopped early)")


def _pairs(kind: str, values: dict[str, Any]) -> str:
    def words(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {words(inner)}" for key, inner in value.items())
        return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    pairs = ", ".join(
        f"{key.replace('_gib', ' GiB').replace('_', ' ')}: {words(v)}" for key, v in values.items() if v is not None
    )
    return f'<p class="note"><b>{kind}.</b> {escape(pairs)}.</p>'
