"""The tables and pictures of ``docs/scale.md``, from what ``scaling`` measured and predicted."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from benchmarks.common import plain, save, table
from benchmarks.scale.division import balance, work
from benchmarks.scale.predictions import PREDICTED, REFRESH_RATES, variants


def short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def measured(worlds: Sequence[dict[str, Any]]) -> Iterator[list[object]]:
    for world in worlds:
        for run in world["runs"]:
            placement = run["placement"] if world["processes"] > 1 else "alone"
            yield [
                world["processes"],
                placement + ", staggered" * run["staggered"],
                f"{short(max(run['cpu_ms']))} / {short(max(run['predicted_cpu_ms']))}",
                f"{short(run['wall_ms'])} / {short(run['predicted_wall_ms'])}",
                f"{max(run['state_bytes']) / 1e6:.2f}" + " (not as predicted!)" * (not run["state_bytes_exact"]),
                f"{max(run['factor_bytes']) / sum(run['factor_bytes']) * world['processes']:.3f}",
                f"{max(run['sent_bytes']) / 1e6:.3f}",
                f"{min(run['sent_over_formula']):.3f} to {max(run['sent_over_formula']):.3f}",
            ]


def cells(line: dict[str, Any], **units: float) -> list[str]:
    """The entries with these names in these units."""
    return [short(line[key] / unit) for key, unit in units.items()]


def tables(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each table of the docs."""
    if "worlds" in result:
        header = "Processes | Placement | CPU ms, measured / predicted | Wall ms, measured / predicted | State, MB | "
        yield "measured", table(header + "Factor share x N | Sent, MB | Sent / formula", measured(result["worlds"]))
    header = "Model, 8 processes | Refreshes | Ranks, max/mean | Steps, max/mean | In a step, max/mean | "
    keys = ("ranks", "steps", "within_steps", "critical_path", "worst_step")
    lines = [[line["model"], line["variant"], *(f"{line[key]:.2f}" for key in keys)] for line in result["balance"]]
    yield "balance", table(header + "Critical path | Longest step", lines)
    header = "Model | Placement | GPUs | Mean ms | Longest | staggered: mean | longest | Forward and backward ms | "
    units = dict.fromkeys(("mean_ms", "worst_ms", "staggered_mean_ms", "staggered_worst_ms", "training_ms"), 1.0)
    units |= dict.fromkeys(("state_bytes", "sent_bytes", "received_bytes"), 1e9)
    shown = [line for line in result["predictions"] if line["gpus"] in (8, 64, 512, 4096)]
    lines = [[line["model"], line["placement"], line["gpus"], *cells(line, **units)] for line in shown]
    yield "predicted", table(header + "State, GB | Sent, GB | Received, GB", lines)
    header = "Model, 64 GPUs, FSDP2 | Refreshes at {:g} TFLOP/s: mean ms | {:g} | {:g}"
    lines = [
        [name, *(short(line["mean_ms"]) for line in result["sensitivity"] if line["model"] == name)]
        for name in PREDICTED
    ]
    yield "sensitivity", table(header.format(*(rate / 1e12 for rate in REFRESH_RATES)), lines)
    header = "Model | Options | State in all, GB | TFLOP per step | 64 GPUs: mean ms | longest | state per GPU, GB"
    units = {"state_bytes": 1e9, "flops": 1e12, "mean_ms": 1, "worst_ms": 1, "state_bytes_64": 1e9}
    yield "sizes", table(header, [[line["model"], line["options"], *cells(line, **units)] for line in result["sizes"]])


def fill(page: Path, result: dict[str, Any]) -> None:
    """Prints the tables, and puts them between their markers in the page if there is one."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    for name, lines in tables(result):
        print(f"\n{name}\n{lines}")
        begin, end = f"<!-- {name}: written by benchmarks/scale/scaling.py -->", f"<!-- {name}: end -->"
        head, found, rest = text.partition(begin)
        if found:
            text = f"{head}{begin}\n\n{lines}\n\n{end}{rest.partition(end)[2]}"
    if text:
        page.write_text(text, encoding="utf-8")


COLOURS = {"GPT-3 1.3B": "#1f5fbf", "Llama-3 8B": "#dd8452", "Llama-3 70B": "#c44e52"}
STYLES = {"ddp": ":", "fsdp": "-", "hsdp": "--"}


def draw_scale(lines: Sequence[dict[str, Any]], picture: Path) -> None:
    """Time, state and bytes against the number of GPUs."""
    figure = Figure(figsize=(11, 4.2))
    three = figure.subplots(1, 3)
    panels = (
        ("mean_ms", 1, "optimizer step, ms (mean)"),
        ("state_bytes", 1e9, "state per GPU, GB (largest)"),
        ("sent_bytes", 1e9, "sent per GPU and step, GB (largest)"),
    )
    for axes, (key, unit, label) in zip(three, panels, strict=True):
        for model, placement in dict.fromkeys((line["model"], line["placement"]) for line in lines):
            shown = [line for line in lines if (line["model"], line["placement"]) == (model, placement)]
            kind, _, row = placement.partition(" ")
            gpus, colour = [line["gpus"] for line in shown], COLOURS[model]
            axes.plot(gpus, [line[key] / unit for line in shown], STYLES[kind], color=colour, linewidth=1.3,
                      label=f"{model}, {kind.upper()} {row}")  # fmt: skip
            if key == "mean_ms" and kind == "fsdp":
                axes.plot(gpus, [line["training_ms"] for line in shown], color=colour, linewidth=5, alpha=0.15)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator([8, 32, 128, 512, 2048]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("GPUs")
        axes.set_title(label, fontsize=10)
    plain(*three)
    three[0].text(0.98, 0.98, "pale: forward and backward pass", fontsize=8, color="#666666", ha="right", va="top",
                  transform=three[0].transAxes)  # fmt: skip
    figure.legend(*three[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    save(figure, picture)


def draw_balance(picture: Path) -> None:
    """GPT-2 124M on 8 processes: work of each process, and how long each step takes."""
    figure = Figure(figsize=(9, 3.9))
    left, right = figure.subplots(1, 2)
    chosen = variants("GPT-2 124M")
    loads = work(chosen["all in one step"])[:2].sum((0, 1))
    left.bar(range(8), (loads / loads.mean()).tolist(), color="#1f5fbf", width=0.7)
    left.set_ylim(0, 1.3)
    left.set_xlabel("process")
    left.set_title("work of a mean step over that of the mean process", fontsize=10)
    for place, ((variant, division), colour) in enumerate(zip(chosen.items(), COLOURS.values(), strict=True)):
        found = balance(division)
        label = f"{variant.replace('`', '')}: {found.critical_path:.2f} on average"
        right.bar([t + 0.27 * (place - 1) for t in range(10)], found.times, 0.27, color=colour, label=label)
    right.set_xlabel("step of the period")
    right.set_xticks(range(10))
    right.set_title("time of a step, waiting included, over the same", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.axhline(1, color="black", linewidth=1)
    plain(left, right)
    figure.tight_layout()
    save(figure, picture)
