"""Whether a refresh at frequency 1 does what a peer's does: the residual of every eigenbasis, SOAP's and theirs.

    PYTHONPATH=. benchmarks/.venv-peers/bin/python -m benchmarks.basis_residual

Both get the same 40 gradients of two GPT layers of width 128, a new one in every step. The residual of a basis is the
norm of what is off the diagonal of ``Q^T K Q``, over that of ``K``. ``benchmarks.step_time`` makes the environment.
Results go to ``benchmarks/results/basis_residual.json``.
"""

import json
from statistics import mean

import torch
from torch import Tensor

from benchmarks.parameter_sets import gpt
from benchmarks.step_time import OPTIMIZERS, ROOT, Trial, heading, low_rank

SHAPES, STEPS = gpt(128, 2), 40


def residual(factor: Tensor, basis: Tensor) -> float:
    rotated = basis.T @ factor @ basis
    return ((rotated - torch.diag(rotated.diagonal())).norm() / factor.norm()).item()


def residuals(name: str) -> list[float]:
    trial = Trial(OPTIMIZERS[name], SHAPES, 1, "cpu")
    generator = torch.Generator().manual_seed(7)
    trial.gradients = [[low_rank(shape, generator, "cpu") for shape in SHAPES] for _ in range(STEPS)]
    trial.play(STEPS)
    found = []
    for state in (trial.optimizer.state[parameter] for parameter in trial.parameters):
        ours = [(state[f"GG_{axis}"], state[f"Q_{axis}"]) for axis in range(2)] if "GG_0" in state else None
        found += [residual(factor, basis) for factor, basis in ours or zip(state["GG"], state["Q"], strict=True)]
    return found


def main() -> None:
    found = {name: residuals(name) for name in ("soap", "pytorch-optimizer")}
    ratios = [own / theirs for own, theirs in zip(*found.values(), strict=True)]
    print({name: round(mean(values), 4) for name, values in found.items()})
    print(f"SOAP's over theirs, basis by basis: {min(ratios):.3f} to {max(ratios):.3f}")
    path = ROOT / "benchmarks/results/basis_residual.json"
    path.write_text(json.dumps({**heading("cpu"), "steps": STEPS, "residuals": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
