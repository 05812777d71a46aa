"""``soap plan``: the words of the command line, and which of the planner's answers they ask for."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emerging_optimizers.lab import arguments as words
from emerging_optimizers.lab.errors import LabError

if TYPE_CHECKING:
    from emerging_optimizers.plan import Budget

UNITS = {unit: 1000**i for i, unit in enumerate(("B", "KB", "MB", "GB", "TB"))}
UNITS |= {unit: 1024**i for i, unit in enumerate(("KiB", "MiB", "GiB", "TiB"), start=1)}
CALIBRATION_SECONDS = 10.0


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="gpt2, gpt2-xl, llama-3-8b, llama-3-70b, resnet50, vit-b; package.module:function, which returns a "
            "module; or a file: Hugging Face config.json, .safetensors or its index, torch checkpoint",
            autocompletion=words.preset_names,
        ),
    ],
    frequency: Annotated[
        int,
        typer.Option(metavar="N", parser=words.whole_number("--frequency"), help="steps between eigenbasis refreshes"),
    ] = 10,
    max_precond_dim: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=words.whole_number("--max-precond-dim", least=0),
            help="a longer axis keeps no factor  [default: SOAP's, 10000]",
        ),
    ] = None,
    merge_dims: Annotated[bool, typer.Option("--merge-dims", help="fold a convolution's axes")] = False,
    pack_factors: Annotated[bool, typer.Option("--pack-factors", help="keep a triangle of each factor")] = False,
    bfloat16_state: Annotated[
        bool, typer.Option("--bfloat16-state", help="first moment and bases in bfloat16")
    ] = False,
    no_routing: Annotated[
        bool, typer.Option("--no-routing", help="as SOAP(model.parameters()): embeddings and head too")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="of the parameters: float32, bfloat16, float16, float64  [default: the model's]",
            autocompletion=words.dtype_names,
        ),
    ] = None,
    ranks: Annotated[
        int,
        typer.Option(
            metavar="N", parser=words.whole_number("--ranks", most=10_000), help="processes that divide the work"
        ),
    ] = 1,
    sharded: Annotated[
        bool, typer.Option("--sharded", help="weights sharded over the ranks (FSDP2), not whole on each (DDP)")
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=words.whole_number("--tokens"),
            help="tokens per step over all ranks; shows the optimizer's share of the FLOPs",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="such as 24GB or 24GiB: find options whose state fits on every rank"),
    ] = None,
    with_weights: Annotated[
        bool, typer.Option("--with-weights", help="--memory holds weights and gradients too")
    ] = False,
    overhead: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="such as 5%: find options that add no more to the training FLOPs"),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="measure this machine's rates (10 s); predict milliseconds")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="a line per parameter, not per kind of layer")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", help="draw the state of each kind of layer as bars", autocompletion=words.files
        ),
    ] = None,
) -> None:
    """Say what SOAP will cost on a model: memory and FLOPs, next to AdamW and Muon. Nothing is allocated."""
    for package in ("rich", *(["matplotlib"] if picture else [])):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)
    if picture is not None and picture.suffix.lower() != ".png":
        raise LabError(f"--picture {picture}: expected a name that ends in .png")
    if picture is not None and not picture.parent.is_dir():
        raise LabError(f"--picture {picture}: there is no folder {picture.parent}")
    if dtype is not None and dtype not in words.DTYPES:
        raise LabError(f"--dtype {dtype}: choose {', '.join(words.DTYPES)}")
    budget = read_budget(memory, with_weights, overhead, tokens)
    if calibrate and ranks > 1:
        raise LabError("--calibrate predicts one process, and no transfers: leave out --ranks")

    import torch

    from emerging_optimizers import plan as planner
    from emerging_optimizers.lab import plan_report

    options: dict[str, Any] = {"precondition_frequency": frequency, "merge_dims": merge_dims}
    options |= {"pack_factors": pack_factors, "state_dtype": torch.bfloat16 if bfloat16_state else None}
    if max_precond_dim is not None:
        options["max_precond_dim"] = max_precond_dim
    try:
        described = planner.load_model(model)
        if dtype is not None:
            described = planner.model_of(described, parameter_dtype=getattr(torch, dtype))
        arguments = {"ranks": ranks, "sharded": sharded, "tokens_per_step": tokens, "routed": not no_routing, **options}
        planned = planner.plan(described, **arguments)
        fit = None if budget is None else planner.fit_budget(described, budget, **arguments)
    except ValueError as error:
        raise LabError(str(error)) from error
    prediction = planner.predict(planned, planner.calibrate(CALIBRATION_SECONDS)) if calibrate else None
    if picture is not None:
        packed = planner.plan(described, **{**arguments, "pack_factors": True})
        plan_report.write_picture(picture, planned, packed)
    if as_json:
        plan_report.print_json(planned, fit, prediction)
    else:
        plan_report.print_plan(planned, fit, prediction, every, picture)
    if fit is not None and not fit.met:
        raise typer.Exit(1)


def read_budget(memory: str | None, with_weights: bool, overhead: str | None, tokens: int | None) -> Budget | None:
    """Read ``24GB`` and ``5%``.

    Raises:
        LabError: one of them is malformed, or lacks what it needs.
    """
    if with_weights and memory is None:
        raise LabError("--with-weights belongs to --memory")
    if memory is None and overhead is None:
        return None
    if overhead is not None and tokens is None:
        raise LabError("--overhead is a share of the training step: give its batch with --tokens")
    size = share = None
    if memory is not None:
        found = re.fullmatch(r"(\d{1,15}\.?\d{0,15})\s*([A-Za-z]+)", memory.strip())
        unit = next((unit for unit in UNITS if found and unit.lower() == found[2].lower()), None)
        size = int(float(found[1]) * UNITS[unit]) if found and unit else 0
        if size < 1:
            raise LabError(f"--memory {memory}: expected a size with its unit, for example 24GB or 512MiB")
    if overhead is not None:
        found = re.fullmatch(r"(\d{1,15}\.?\d{0,15})\s*%", overhead.strip())
        share = float(found[1]) / 100 if found else 0.0
        if not share > 0:
            raise LabError(f"--overhead {overhead}: expected a percentage, for example 5%")

    from emerging_optimizers.plan import Budget

    return Budget(size, share, with_weights)
