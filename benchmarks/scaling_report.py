"""The tables and pictures of ``docs/scale.md``, from what ``scaling`` measured and predicted."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cost_model import (
    Balance,
    balance,
    flops,
)
from benchmarks.scaling_predictions import PREDICTED, variants


def rows(header: str, lines: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    names = header.split(" | ")
    table = [names, ["---"] * len(names), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in table)


def short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def tables(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each table of the docs."""
    measured = []
    for world in result.get("worlds", ()):
        for run in world["runs"]:
            name = run["placement"] + (", staggered" if run["staggered"] else "")
            busy, guess = max(run["cpu_ms"]), max(run["predicted_cpu_ms"])
            measured.append(
                [
                    world["processes"],
                    name if world["processes"] > 1 else name.replace("ddp", "alone"),
                    f"{short(busy)} / {short(guess)}",
                    f"{short(run['wall_ms'])} / {short(run['predicted_wall_ms'])}",
                    f"{max(run['state_bytes']) / 1e6:.2f}"
                    + ("" if run["state_bytes_exact"] else " (not as predicted!)"),
                    f"{run['factor_share'] * world['processes']:.3f}",
                    f"{max(run['sent_bytes']) / 1e6:.3f}",
                    f"{min(run['sent_over_formula']):.3f} to {max(run['sent_over_formula']):.3f}",
                ]
            )
    header = "Processes | Placement | CPU ms, measured / predicted | Wall ms, measured / predicted | "
    header += "State, MB | Factor share x N | Sent, MB | Sent / formula"
    yield "measured", rows(header, measured) if measured else "Not measured yet."
    header = "Model | Placement | GPUs | Mean ms | Longest | staggered: mean | longest | Forward and backward ms | "
    header += "State, GB | Sent, GB | Received, GB"
    yield "predicted", rows(
        header,
        [
            [
                line["model"], line["placement"], line["gpus"], short(line["mean_ms"]), short(line["worst_ms"]),
                short(line["staggered_mean_ms"]), short(line["staggered_worst_ms"]), short(line["training_ms"]),
                short(line["state_bytes"] / 1e9), short(line["sent_bytes"] / 1e9), short(line["received_bytes"] / 1e9),
            ]
            for line in result["predictions"] if line["gpus"] in (8, 64, 512, 4096)
        ],
    )  # fmt: skip
    header = "Model, 8 processes | Refreshes | Ranks, max/mean | Steps, max/mean | In a step, max/mean | "
    header += "Critical path | Longest step"
    yield (
        "balance",
        rows(
            header,
            [
                [line["model"], line["variant"]]
                + [f"{line[key]:.2f}" for key in ("ranks", "steps", "within_steps", "critical_path", "worst_step")]
                for line in result["balance"]
            ],
        ),
    )
    header = "Model | Options | State in all, GB | TFLOP per step | 64 GPUs: mean ms | longest | state per GPU, GB"
    yield "sizes", rows(
        header,
        [
            [
                line["model"], line["options"], short(line["state_bytes"] / 1e9), short(line["flops"] / 1e12),
                short(line["mean_ms"]), short(line["worst_ms"]), short(line["state_bytes_64"] / 1e9),
            ]
            for line in result["sizes"]
        ],
    )  # fmt: skip
    header = "Model, 64 GPUs, FSDP2 | QR at 1 TFLOP/s: mean ms | 4 | 16"
    lines = result["sensitivity"]
    yield (
        "sensitivity",
        rows(header, [[name] + [short(one["mean_ms"]) for one in lines if one["model"] == name] for name in PREDICTED]),
    )


def fill(page: Path, result: dict[str, Any]) -> None:
    """Prints the tables, and puts them between their markers in the page if there is one."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    for name, table in tables(result):
        print(f"\n{name}\n{table}")
        begin, end = f"<!-- {name}: written by benchmarks/scaling.py -->", f"<!-- {name}: end -->"
        head, found, rest = text.partition(begin)
        if found:
            text = f"{head}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    if text:
        page.write_text(text, encoding="utf-8")


COLOURS = {"GPT-3 1.3B": "#1f5fbf", "Llama-3 8B": "#dd8452", "Llama-3 70B": "#c44e52"}
STYLES = {"ddp": ":", "fsdp": "-", "hsdp": "--"}


def draw_scale(lines: Sequence[dict[str, Any]], picture: Path) -> None:
    """Time, state and bytes against the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    figure, three = plt.subplots(1, 3, figsize=(11, 4.2))
    panels = (
        ("mean_ms", 1, "optimizer step, ms (mean)"),
        ("state_bytes", 1e9, "state per GPU, GB (largest)"),
        ("sent_bytes", 1e9, "sent per GPU and step, GB (largest)"),
    )
    for axes, (key, unit, label) in zip(three, panels, strict=True):
        for model, colour in COLOURS.items():
            for placement in dict.fromkeys(line["placement"] for line in lines if line["model"] == model):
                shown = [line for line in lines if (line["model"], line["placement"]) == (model, placement)]
                axes.plot(
                    [line["gpus"] for line in shown],
                    [line[key] / unit for line in shown],
                    STYLES[placement[:4].strip()],
                    color=colour,
                    linewidth=1.3,
                    label=f"{model}, {placement[:4].strip().upper()}{placement[4:]}",
                )
            if key == "mean_ms":
                shown = [line for line in lines if line["model"] == model and line["placement"] == "fsdp"]
                axes.plot([line["gpus"] for line in shown], [line["training_ms"] for line in shown],
                          color=colour, linewidth=5, alpha=0.15)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator([8, 32, 128, 512, 2048]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("GPUs")
        axes.set_title(label, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    three[0].text(0.98, 0.98, "pale: forward and backward pass", fontsize=8, color="#666666", ha="right", va="top",
                  transform=three[0].transAxes)  # fmt: skip
    names, labels = three[0].get_legend_handles_labels()
    figure.legend(names, labels, fontsize=8, frameon=False, loc="lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(picture, dpi=130)


def draw_balance(picture: Path) -> None:
    """GPT-2 124M on 8 processes: work of each process, and how long each step takes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.9))
    chosen = dict(list(variants("GPT-2 124M", 8).items())[:3])
    loads = flops(next(iter(chosen.values()))).sum(1)
    per_rank = loads.mean(0) / loads.mean()
    left.bar(range(8), per_rank.tolist(), color="#1f5fbf", width=0.7)
    left.axhline(1, color="black", linewidth=1)
    left.axhline(1.15, color="#8c8c8c", linewidth=1, linestyle="--")
    left.text(7.5, 1.16, "1.15", fontsize=8, ha="right", va="bottom", color="#666666")
    left.set_ylim(0, 1.3)
    left.set_xlabel("process")
    left.set_title("work of a mean step over that of the mean process", fontsize=10)
    colours = ("#c44e52", "#3fa7d6", "#55a868")
    for place, ((variant, division), colour) in enumerate(zip(chosen.items(), colours, strict=True)):
        found: Balance = balance(division)
        label = f"{variant.replace('`', '')}: {found.critical_path:.2f} on average"
        right.bar([t + 0.27 * (place - 1) for t in range(10)], found.times, 0.27, color=colour, label=label)
    right.axhline(1, color="black", linewidth=1)
    right.set_xlabel("step of the period")
    right.set_xticks(range(10))
    right.set_title("time of a step, waiting included, over the same", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture, dpi=130)
