"""Packages that cannot be installed beside the others, in a folder that only the examples that need them see.

PyPI's torchvision is built for CUDA. Beside a CPU-only torch its import fails, and with it that of torchmetrics, and so
of Lightning, and of parts of transformers, which import it where it is installed. torchtitan 0.3.0 asks for a datasets
that wants older versions of huggingface_hub and fsspec than constraints.txt has; the example uses neither.
"""

from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.trainers.harness import ROOT

FOLDER = ROOT / ".trainers"

# torchvision's import describes these two, which its CUDA build then has not loaded. timm uses neither.
DECLARE_OPERATORS = """\
import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def folders_with(*packages: str) -> list[Path]:
    """The folders beside what is installed that these can be imported from; skips the test if there are none."""
    if all(find_spec(package) for package in packages):
        return []
    missing = [p for p in packages if not find_spec(p) and PathFinder.find_spec(p, [str(FOLDER)]) is None]
    if missing:
        pytest.skip(f"not installed, here or in {FOLDER.name}: {', '.join(missing)}")
    return [FOLDER]
