"""The tables of the pages, from the code and from ``benchmarks/results``: ``python tools/tables.py`` writes them.

A page has ``<!-- table: NAME -->`` and ``<!-- end of table -->`` where the table of that name belongs. With ``--check``
nothing is written, and the exit code is 1 where a page is out of date.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
REGION = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
LABELS = {
    "adamw": "AdamW",
    "adamw-foreach": "AdamW, foreach",
    "adamw-fused": "AdamW, fused",
    "muon": "Muon",
    "soap": "SOAP",
    "soap-kronecker": 'SOAP "kronecker"',
    "soap-staggered": "SOAP, staggered",
    "kl-soap": "KL-SOAP",
}
SETS = {"gpt-d128x8": "GPT d=128, 8 layers", "gpt-d512x2": "GPT d=512, 2 layers", "resnet50": "ResNet-50"}
PEERS = ("pytorch-optimizer", "heavyball")
LAST_PUBLISHED = "correct_shampoo_beta_bias"  # the option with which the published signature ends


def results(name: str) -> Any:
    """Read a result file."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def score(value: float) -> str:
    """Format a score with three decimals, or three digits where it is below 1."""
    return f"{value:.3f}" if abs(value) >= 1 else f"{value:.3g}"


def label(name: str) -> str:
    """Name an optimizer."""
    return LABELS.get(name, name)


def place(name: str) -> int:
    """Where an optimizer comes in a table: in the order of `LABELS`, or behind all of them."""
    return list(LABELS).index(name) if name in LABELS else len(LABELS)


def in_order(names: Iterable[str]) -> list[str]:
    """Put optimizers into the order of a table, each once."""
    return sorted(dict.fromkeys(names), key=place)


def milliseconds(value: float) -> str:
    """Format a time with three digits, and thousands with a comma."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def source(result: Mapping[str, Any]) -> str:
    """Say where and when a result was measured."""
    machine = result["machine"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, threads: {machine['threads']}, "
        f"torch {result['versions']['torch']}, {result['date'][:10]}."
    )


def contract() -> str:
    """What is tested of torch's contract, for AdamW and SOAP."""
    from tests.contract import table

    return table.markdown()


def options(ours: bool) -> str:
    """Name, default, values and meaning of the options, from signature, table of rules and docstring of SOAP."""
    from emerging_optimizers.soap import SOAP
    from emerging_optimizers.soap.options import OPTIONS, Rule

    section = inspect.cleandoc(SOAP.__doc__ or "").split("\nArgs:\n", 1)[1].split("\n\n", 1)[0]
    meanings = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE))
    defaults = {name: parameter.default for name, parameter in inspect.signature(SOAP).parameters.items()}
    names = list(defaults)
    published = names.index(LAST_PUBLISHED) + 1
    rows = []
    for name in names[published:] if ours else names[1:published]:  # the first is `params`
        default = defaults[name]
        shown = f'"{default}"' if isinstance(default, str) else str(default)
        default_cell = "" if default is inspect.Parameter.empty else f"`{shown}`"
        rule = OPTIONS.get(name, ())
        values = rule.wanted if isinstance(rule, Rule) else ", ".join(f'"{value}"' for value in rule)
        rows.append((f"`{name}`", default_cell, values, from_docstring(meanings[name])))
    return markdown(("Option", "Default", "Values", "Meaning"), rows)


def from_docstring(text: str) -> str:
    """Turn the reStructuredText of a docstring into the Markdown of a cell."""
    text = re.sub(r":math:`([^`]*)`", r"$\1$", " ".join(text.split()))
    return re.sub(r":\w+:`~?([^`]*)`|``([^`]*)``", lambda code: f"`{code[1] or code[2]}`", text).replace("|", "\\|")


def all_races() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, metric and summaries of each race, a summary per optimizer."""
    for path in sorted((ROOT / "benchmarks/results").glob("race-*.json")):
        race = results(path.stem)
        yield race["task"]["name"], race["task"]["metric"], {line["optimizer"]: line for line in race["summary"]}


def races() -> str:
    """The lowest validation score of each optimizer in each race, and how soon it was at AdamW's best."""
    optimizers = in_order(name for _, _, lines in all_races() for name in lines)
    rows = []
    for task, metric, lines in all_races():
        leads = list(map(min, *(line["best_by_seed"] for line in lines.values())))
        cells = dict.fromkeys(optimizers, "not raced")
        for name, line in lines.items():
            bold = "**" if line["best_by_seed"] == leads else ""
            cells[name] = f"{bold}{score(line['best'])}{bold}"
            if name != "adamw" and line["step_fraction"] is not None:
                cells[name] += f" ({line['step_fraction']:.0%}, {line['second_fraction']:.0%})"
        rows.append((f"`{task}`: {metric}", *cells.values()))
    return markdown(("Task", *map(label, optimizers)), rows)


def race_costs() -> str:
    """What a step took in the races, and the state."""
    rows = []
    for task, _, lines in all_races():
        for name in in_order(lines):
            times = [milliseconds(1000 * lines[name][key]) for key in ("median_step", "worst_step")]
            rows.append((f"`{task}`", label(name), *times, f"{lines[name]['bytes_per_parameter']:.1f}"))
    return markdown(("Task", "Optimizer", "Median step, ms", "Worst step, ms", "State, bytes per parameter"), rows)


def learning_rates() -> str:
    """The median score at every learning rate of the sweeps."""
    scores: dict[tuple[str, str], dict[float, list[float]]] = {}
    for run in results("learning_rates"):
        best = float("inf") if run["diverged"] else run["best"]
        scores.setdefault((run["task"], run["optimizer"]), {}).setdefault(run["lr"], []).append(best)
    rows = []
    for task, optimizer in sorted(scores, key=lambda pair: (pair[0], place(pair[1]))):
        medians = {lr: statistics.median(found) for lr, found in sorted(scores[task, optimizer].items())}
        best = min(medians, key=lambda lr: medians[lr])
        cells = [f"**{lr:g}: {score(m)}**" if lr == best else f"{lr:g}: {score(m)}" for lr, m in medians.items()]
        seeds = str(max(map(len, scores[task, optimizer].values())))
        rows.append((f"`{task}`", label(optimizer), seeds, ", ".join(cells)))
    return markdown(("Task", "Optimizer", "Seeds", "Rate: score"), rows)


def refresh_frequency() -> str:
    """The median final score against the refresh frequency, at the better of the rates that were tried."""
    finals: dict[tuple[str, str], dict[int, dict[float, list[float]]]] = {}
    for run in results("refresh_frequency")["runs"]:
        of_frequency = finals.setdefault((run["task"], run["optimizer"]), {}).setdefault(run["frequency"], {})
        of_frequency.setdefault(run["lr"], []).append(float("inf") if run["diverged"] else run["final"])
    rows = []
    for (task, optimizer), frequencies in finals.items():
        best = [min(map(statistics.median, rates.values())) for _, rates in sorted(frequencies.items())]
        rows.append((f"`{task}`", label(optimizer), *map(score, best)))
    header = sorted({frequency for frequencies in finals.values() for frequency in frequencies})
    return markdown(("Task", "Optimizer", *map(str, header)), rows)


def step_time(name: str) -> str:
    """Mean milliseconds of a step of each optimizer, and what follows from them, a column per set and frequency."""
    result = results(name)
    cases = result["results"]
    rows = [["Floor", *(milliseconds(case["floor_ms"]) for case in cases)]]
    for optimizer in in_order(optimizer for case in cases for optimizer in case["optimizers"]):
        found = [case["optimizers"].get(optimizer) for case in cases]
        version = next((f" {one['version']}" for one in found if one and one["version"]), "")
        rows.append([label(optimizer) + version, *(milliseconds(one["mean_ms"]) if one else "" for one in found)])
    # Where a period is several steps, the median step is one that refreshes nothing.
    plain = {case["set"]: case["optimizers"]["soap"]["median_ms"] for case in cases if case["frequency"] > 1}
    soap = [case["optimizers"]["soap"] for case in cases]
    staggered = [case["optimizers"].get("soap-staggered") for case in cases]
    mean = [(case, one["mean_ms"]) for case, one in zip(cases, soap, strict=True)]
    rows += [
        ["SOAP over the floor", *(f"{ms / case['floor_ms']:.2f}" for case, ms in mean)],
        ["SOAP over the faster peer", *(f"{ms / fastest_peer(case):.2f}" for case, ms in mean)],
        ["Refreshes, share of SOAP's time", *(f"{1 - plain[case['set']] / ms:.0%}" for case, ms in mean)],
        ["SOAP, worst step over median", *(f"{one['worst_over_median']:.2f}" for one in soap)],
        ["the same, staggered", *(f"{one['worst_over_median']:.2f}" if one else "" for one in staggered)],
    ]
    header = (f"{SETS.get(case['set'], case['set'])}, f={case['frequency']}" for case in cases)
    return markdown(("ms per step", *header), rows) + f"\n\n{source(result)}"


def fastest_peer(case: Mapping[str, Any]) -> float:
    """The mean milliseconds of the fastest SOAP on PyPI."""
    return min(float(case["optimizers"][peer]["mean_ms"]) for peer in PEERS)


def state_size() -> str:
    """Bytes of state, memory of a step and losses, by how the state is kept."""
    result = results("state_size")
    modes = list(result["state_bytes_per_parameter"]["gpt-d128x8"])
    rows = [
        (f"{SETS[name]}: state, bytes per parameter", *(f"{sizes[mode]:.1f}" for mode in modes))
        for name, sizes in result["state_bytes_per_parameter"].items()
        if name in SETS
    ]
    rows += [
        (f"{SETS[name]}: most in a step, MiB", *(f"{sizes[mode]['refresh_step_mib']:.0f}" for mode in modes))
        for name, sizes in result["memory_of_a_step"].items()
    ]
    losses = [[seed["validation"] for seed in result["charlm"][mode].values()] for mode in modes]
    rows.append(("`charlm`: final validation loss, by seed", *(", ".join(map(score, by_seed)) for by_seed in losses)))
    return markdown(("", *modes), rows) + f"\n\n{source(result)}"


def overhead() -> str:
    """Microseconds of a step of parameters so small that arithmetic is nothing."""
    result = results("overhead")
    names = in_order(name for case in result["results"] for name in case["optimizers"])
    rows = [
        (
            f"{case['parameters']} parameters, {case['shapes']} shape{'s' * (case['shapes'] > 1)}",
            *(f"{case['optimizers'][name]['us_per_step']:,.0f}" for name in names),
        )
        for case in result["results"]
    ]
    return markdown(("µs per step", *map(label, names)), rows) + f"\n\n{source(result)}"


def concept() -> str:
    """What stands behind the pictures of the concept."""
    result = results("concept")
    valley, basis, frequency = result["valley"], result["basis"], result["frequency"]
    rows = [
        (f"Valley, {place}: loss after {valley['steps']} steps, {label(name)} at its best rate",
         score(valley[f"{name}, {place}"]["loss"]))
        for place in ("straight", "turned")
        for name in ("adamw", "soap")
    ]  # fmt: skip
    rows += [
        ("Factor: share of its norm off the diagonal", f"{basis['off_diagonal']:.0%}"),
        ("the same in its eigenbasis, after a refresh", f"{basis['off_diagonal_in_basis']:.0%}"),
        ("Entries with nine tenths of the squared gradient", f"{basis['squares']['nine_tenths_in']:,}"),
        ("the same in the eigenbases", f"{basis['squares_in_basis']['nine_tenths_in']:,}"),
    ]
    rows += [
        (f"`digits`, best score: {label('soap')}, f={name.split(', ')[1]}" if ", " in name
         else f"`digits`, best score: {label(name)}", score(found["median_best"]))
        for name, found in frequency.items()
        if isinstance(found, dict)
    ]  # fmt: skip
    return markdown(("Quantity", "Measured"), rows) + f"\n\n{source(result)}"


def second_moment_floor() -> str:
    """The longest update with and without the floor under the second moment."""
    rows = [
        (str(case["shape"]), case["dtype"].removeprefix("torch."), f"{case['with']:.2f}", f"{case['without']:,.0f}")
        for case in results("second_moment_floor")["worst_rms"]
    ]
    return markdown(("Shape", "dtype", "With the floor", "Without"), rows)


def shares() -> str:
    """FLOPs of the optimizer over those of forward and backward, by the planner."""
    from emerging_optimizers.plan import load_model, plan

    models = ("gpt2", "llama-3-8b")
    tokens = (32_768, 131_072, 524_288, 2_097_152)
    rows = []
    for frequency in (1, 10):
        for count in tokens:
            plans = [plan(load_model(name), tokens_per_step=count, precondition_frequency=frequency) for name in models]
            rows.append((f"{frequency}", f"{count:,}", *(f"{100 * (one.overhead() or 0):.2g}%" for one in plans)))
    return markdown(("Frequency", "Tokens per step", *models), rows)


def planned() -> str:
    """What ``soap plan`` prints."""
    from emerging_optimizers.lab.cli import main

    words = ["plan", "gpt2", "--tokens", "524288", "--memory", "2.5GB"]
    printed = io.StringIO()
    with mock.patch.dict("os.environ", COLUMNS="100"), contextlib.redirect_stdout(printed):
        main(words)
    lines = "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
    return f"```text\n$ soap {' '.join(words)}\n{lines}\n```"


def trainings() -> str:
    """The same training with each peer."""
    rows = []
    for peer, training in results("peers_behaviour")["trainings"].items():
        for whose, one in training.items():
            if whose != "settings":
                rows.append((peer if whose == "theirs" else "", whose, *(f"{loss:.3g}" for loss in one["losses"])))
    return markdown(("Peer", "Training", "Seed 0", "Seed 1", "Seed 2"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "contract": contract,
    "published-options": lambda: options(ours=False),
    "our-options": lambda: options(ours=True),
    "races": races,
    "race-costs": race_costs,
    "learning-rates": learning_rates,
    "refresh-frequency": refresh_frequency,
    "step-time": lambda: step_time("step_time"),
    "state-size": state_size,
    "overhead": overhead,
    "concept": concept,
    "second-moment-floor": second_moment_floor,
    "shares": shares,
    "plan": planned,
    "trainings": trainings,
}


def fill(text: str) -> str:
    """Put into a page the tables that it names."""
    return REGION.sub(lambda region: f"{region[1]}{TABLES[region[2]]()}\n{region[3]}", text)


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Write the tables, or with ``--check`` name the pages that are out of date; return the exit code."""
    stale = []
    for page in sorted([*root.glob("*.md"), *(root / "docs").rglob("*.md")]):
        text = page.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            stale.append(page)
            if "--check" in arguments:
                print(f"{page.relative_to(root)} is out of date: python tools/tables.py")
            else:
                page.write_text(filled, encoding="utf-8")
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # for the contract's tests
    sys.exit(main(sys.argv[1:]))
