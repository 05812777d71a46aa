"""``soap inspect``: the optimizer states in a checkpoint file, measured, as a table, as JSON and as a page."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from emerging_optimizers.health import Health, TensorHealth, examine
from emerging_optimizers.lab.errors import LabError
from emerging_optimizers.lab.printable import printable

FORMAT = "soap-inspect/1"
OPTIMIZER_KEYS = ("optimizer", "optim", "optimizer_state_dict", "optimizer_states", "optimizers")
MODEL_KEYS = ("model", "state_dict", "model_state_dict", "model_state")


class Inspected(NamedTuple):
    """One optimizer state of a file.

    Attributes:
        label: Where in the file it is, as "optimizer"; "" where it is the file.
        health: What was found.
    """

    label: str
    health: Health


def inspect_file(path: Path) -> list[Inspected]:
    """Measure every SOAP state in a checkpoint file. Nothing in it is executed, nothing written.

    Raises:
        LabError: the file cannot be read, or has no state of a SOAP optimizer.
    """
    checkpoint = _load(path)
    found = list(_states(checkpoint, "", {}))
    if not found:
        keys = ", ".join(map(str, list(checkpoint)[:8])) if isinstance(checkpoint, Mapping) else "no dict"
        raise LabError(f"{path}: no optimizer state under {', '.join(OPTIMIZER_KEYS)}, nor is it one; it has: {keys}")
    ours = [(label, state, weights) for label, state, weights in found if _is_soap(state)]
    if not ours:
        raise LabError(f"{path}: the optimizer state in it is not SOAP's (its groups have no shampoo_beta)")
    try:
        return [Inspected(label, examine(state, weights=weights)) for label, state, weights in ours]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise LabError(f"{path}: {error}") from error


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch compares no check sums
            if damaged is not None:
                raise LabError(f"{path}: damaged (bad check sum of {damaged})")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what it then refuses: the error says so
            # Mapped, not read: a matrix at a time is looked at.
            return torch.load(path, weights_only=True, map_location="cpu", mmap=zipped)
    except OSError as error:
        hint = "; name a file in it" if path.is_dir() else ""
        raise LabError(f"{path}: {error.strerror or error}{hint}") from error
    except LabError:
        raise
    except Exception as error:  # zip, pickle and storage errors share no base class
        hint = ""
        if "DTensor" in str(error):
            hint = "; it has DTensors: save the full state"
        elif found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            hint = f"; it has a {found[1]}: save optimizer.state_dict(), not the object"
        raise LabError(f"{path}: not a checkpoint that torch.load(weights_only=True) reads{hint}") from error


def _states(value: Any, label: str, weights: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """The optimizer states in a checkpoint, each with where it is and the weights beside it."""
    if isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _states(inner, f"{label} {place}".strip(), weights)
    elif not isinstance(value, Mapping):
        return
    elif isinstance(value.get("param_groups"), list | tuple) and isinstance(value.get("state"), Mapping):
        yield label, value, weights
    elif str(value.get("format", "")).startswith("soap-race-checkpoint/"):
        yield from _race_states(value)
    else:
        weights = next((value[key] for key in MODEL_KEYS if isinstance(value.get(key), Mapping)), weights)
        for key in value:
            # A contender of a race keeps its optimizers under "0" and "1".
            if key in OPTIMIZER_KEYS or (label and isinstance(key, str) and key.isdigit()):
                yield from _states(value[key], f"{label} {key}".strip(), weights)


def _race_states(value: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    runs = value.get("runs")
    for run in runs if isinstance(runs, list) else []:
        record = run.get("record") if isinstance(run, Mapping) else None
        if isinstance(record, Mapping):
            label = f"{record.get('optimizer')}, rate {record.get('lr')}, seed {record.get('seed')}"
            inner = {"model": run.get("model"), "optimizer": run.get("optimizer")}
            for found, state, weights in _states(inner, "run", {}):
                number = found.removeprefix("run optimizer").strip()
                yield label + (f", optimizer {number}" if number not in ("", "0") else ""), state, weights


def _is_soap(state: Mapping[str, Any]) -> bool:
    return any(isinstance(group, Mapping) and "shampoo_beta" in group for group in state["param_groups"])


COLUMNS = ("tensor", "shape", "age", "residual", "orth.", "rank", "cond.", "update", "/ weight")


def cells(tensor: TensorHealth) -> tuple[str, ...]:
    """Format a tensor for a table with the headings `COLUMNS`: of several axes the worst."""
    ranks = [f for f in tensor.factors if f.effective_rank is not None]
    lowest = min(ranks, key=lambda f: (f.effective_rank or 0.0) / f.size, default=None)
    return (
        tensor.name,
        "x".join(map(str, tensor.shape)) or "scalar",
        "-" if tensor.age is None else str(tensor.age),
        _worst((f.residual for f in tensor.factors), ".2f"),
        _worst((f.orthogonality for f in tensor.factors), ".0e"),
        "-" if lowest is None else f"{lowest.effective_rank:.1f}/{lowest.size}",
        _worst((f.condition for f in tensor.factors), ".0e"),
        _number(tensor.update_rms),
        _number(tensor.update_ratio),
    )


def _worst(values: Iterable[float | None], form: str) -> str:
    return format(max(known), form) if (known := [value for value in values if value is not None]) else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def verdict(health: Health) -> str:
    """Say in a line what was found."""
    count = len(health.tensors)
    tensors = f"{count} tensor{'' if count == 1 else 's'}"
    with_factors = sum(tensor.preconditioned for tensor in health.tensors)
    if not count:
        return "No tensor has a state yet: the optimizer has not taken a step."
    known = f"{tensors} ({with_factors} preconditioned; {health.step} steps)"
    if not health.findings:
        return f"Nothing wrong with {known}."
    return f"Something is wrong with {len({finding.name for finding in health.findings})} of {known}."


def notes(health: Health) -> list[str]:
    """Say what was not looked at, and what shows nothing."""
    said = []
    if still := tuple(tensor.name for tensor in health.tensors if tensor.learning_rate == 0):
        whose = "" if len(still) == len(health.tensors) else f" of {_few(still)}"
        said.append(f"The saved learning rate{whose} is 0, as at the end of a schedule; so the updates shown are 0.")
    if health.waiting:
        said.append(f"Without a state yet (no gradient has come): {_few(health.waiting)}.")
    if health.elsewhere:
        said.append(f"Worked on by another process, so not looked at here: {_few(health.elsewhere)}.")
    if health.tensors and all(tensor.weight_rms is None for tensor in health.tensors):
        said.append(
            "What an update is to its weight is not known: that takes the model's weights in the file beside the "
            "optimizer's state and an optimizer that was given model.named_parameters()."
        )
    return said


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def to_json(path: Path, inspected: list[Inspected]) -> dict[str, Any]:
    """Collect everything as plain values, finite numbers only."""
    states = [{"label": label, "verdict": verdict(health)} | health.to_dict() for label, health in inspected]
    return {"format": FORMAT, "checkpoint": printable(path.name), "states": states}
