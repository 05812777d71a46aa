"""Where a model's shapes come from: a preset, a function that makes it, a configuration, a checkpoint."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emerging_optimizers.plan.architectures import PRESET_CONFIGS, decoder, resnet50, vit_b
from emerging_optimizers.plan.shapes import Model, model_of

PRESETS = (*PRESET_CONFIGS, "resnet50", "vit-b")
SOURCES = "a preset, package.module:function, or a config.json, .safetensors, .safetensors.index.json, .pt or .bin file"
FILES = (".json", ".safetensors", ".pt", ".pth", ".bin", ".ckpt")

#: What is saved with the weights and not trained: batch norm's statistics, causal masks, rotary frequencies.
BUFFER = re.compile(r"(running_mean|running_var|num_batches_tracked|\.attn\.bias|masked_bias|inv_freq)$")
Entries = dict[str, tuple[tuple[int, ...], torch.dtype]]
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_model(source: str) -> Model:
    """Finds out the parameters of a model; its weights are neither made nor read.

    Args:
        source: One of ``PRESETS``; ``package.module:function``, called without arguments on the meta device, from the
            current folder or wherever Python finds it; a Hugging Face ``config.json``; a ``.safetensors`` file, or the
            index of a sharded one with its files beside it; a torch checkpoint, a state dict or a dict with one under
            "model", "state_dict" or "model_state_dict". In files, embeddings and heads are told by their names.

    Raises:
        ValueError: There is no such source, or it is not what it should be; one line that says what to do.

    Example:
        >>> model = load_model("llama-3-8b")
        >>> sum(route.numel for route in model.routes)
        8030261248
    """
    if source in PRESET_CONFIGS:
        return decoder(PRESET_CONFIGS[source], source)
    if source in PRESETS:
        return {"resnet50": resnet50, "vit-b": vit_b}[source]()
    path = Path(source)
    try:
        if path.suffix == ".py" or Path(f"{source.replace('.', '/')}.py").is_file():
            hint = spelling_hint(source, "function") or f"write {source}:function"
            raise ValueError(f"model {source!r}: {hint}, by the name of what makes the model there")
        if path.is_dir() and (path / "config.json").is_file():
            path = path / "config.json"
        if path.is_file():
            return _from_file(path)
    except OSError as error:
        raise ValueError(f"{source}: {error.strerror}; name a readable file") from error
    if source and path.is_dir():
        raise ValueError(f"{source}: a folder without config.json; give {SOURCES}")
    if ":" in source:
        return _from_function(source)
    if path.suffix in FILES or len(path.parts) > 1:
        raise ValueError(f"{source}: no such file; give {SOURCES}")
    close = difflib.get_close_matches(source, PRESETS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"no model {source!r}: {hint}presets are {', '.join(PRESETS)}; or give {SOURCES[10:]}")


def _from_function(source: str) -> Model:
    module_name, _, function_name = source.partition(":")
    if hint := spelling_hint(module_name, function_name):
        raise ValueError(f"model {source!r}: {hint}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        make = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever a user's module raises while it is imported
        where = search_hint(module_name, error)
        raise ValueError(f"model {source!r}: cannot be imported ({_reason(error)}){where}") from error
    try:
        with torch.device("meta"):
            model = make()
    except Exception as error:
        hint = "; the function must take no arguments: wrap it" if _needs_arguments(make) else ""
        reason = f"{function_name}() failed on the meta device ({_reason(error)}){hint}"
        raise ValueError(f"model {source!r}: {reason}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {source!r}: {function_name}() must return an nn.Module, got {type(model).__name__}")
    return model_of(model, name=source)


def spelling_hint(module: str, name: str) -> str | None:
    """Say what to write where a file is named instead of a module; None where it is none."""
    if not module.endswith(".py") and "/" not in module:
        return None
    path = Path(module.removesuffix(".py"))
    if path.is_absolute() or ".." in path.parts:
        return f"start in {path.parent} and write {path.name}:{name}"
    return f"write {'.'.join(path.parts)}:{name}"


def search_hint(module: str, error: Exception) -> str:
    """Say where was looked, if the module itself was not found; nothing if one that it imports was not."""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return f" (looked in {Path.cwd()} and on Python's path; start in its folder)"
    return ""


def _needs_arguments(function: Any) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return callable(function)
    except ValueError:  # a built-in one without a signature
        pass
    return False


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _from_file(path: Path) -> Model:
    if path.suffix == ".safetensors":
        return _from_entries(path, _header(path))
    if path.suffix != ".json":
        return _from_entries(path, _checkpoint(path))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file; give {SOURCES}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object; give {SOURCES}")
    if isinstance(found.get("weight_map"), dict):
        entries: Entries = {}
        for shard in dict.fromkeys(map(str, found["weight_map"].values())):
            entries |= _header(path.parent / Path(shard).name)  # beside the index, whatever it says
        return _from_entries(path, entries)
    try:
        return decoder(found, path.parent.name if path.name == "config.json" else path.name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _header(path: Path) -> Entries:
    """Names, shapes and dtypes of floating-point tensors in a safetensors file: a length, then JSON, then the data."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > LONGEST_HEADER:
                raise ValueError("header too long")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: (tuple(entry["shape"]), _SAFETENSORS_DTYPES[entry["dtype"]])
            for name, entry in header.items()
            if entry["dtype"] in _SAFETENSORS_DTYPES
        }
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file, though the index names it") from error
    except (ValueError, struct.error, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one") from error


def _checkpoint(path: Path) -> Entries:
    try:
        # Mapped, and put on the meta device: no weight is read.
        loaded: Any = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except Exception as error:  # zip, pickle and storage errors share no base class
        reason = f"{path}: not a checkpoint that torch.load reads with weights_only; give {SOURCES}"
        raise ValueError(reason) from error
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items() if t.is_floating_point()}


def _from_entries(path: Path, entries: Entries) -> Model:
    def is_buffer(name: str) -> bool:
        causal_mask = not name.endswith(".attn.bias") or len(entries[name][0]) > 1
        return BUFFER.search(name) is not None and causal_mask

    trained = {name: entry for name, entry in entries.items() if not is_buffer(name)}
    if not trained:
        raise ValueError(f"{path}: holds no model's weights; give {SOURCES}")
    try:
        model = model_of({name: shape for name, (shape, _) in trained.items()}, name=path.name)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return model._replace(dtypes=tuple(dtype for _, dtype in trained.values()))
