"""An ill-conditioned quadratic whose Hessian is rotated against the axes: what SOAP is for and Adam is not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from emerging_optimizers.soap import SOAP

ROWS, COLUMNS = 24, 16
CONDITION = 1e3  # of A and of B, so 1e6 of the Hessian


def rotated_spectrum(d: int, generator: torch.Generator) -> Tensor:
    """A symmetric matrix with eigenvalues from 1 down to 1 / CONDITION in a random basis."""
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return (basis * torch.logspace(0, -3, d, dtype=torch.float64)) @ basis.T


def train(optimizer_of: Callable[[list[Tensor]], torch.optim.Optimizer], steps: int, seed: int = 0) -> float:
    """f(W_end) / f(W_0) of f(W) = tr(W^T A W B) / 2, with linear decay of the learning rate."""
    generator = torch.Generator().manual_seed(seed)
    a, b = rotated_spectrum(ROWS, generator), rotated_spectrum(COLUMNS, generator)
    w = torch.nn.Parameter(torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64))
    start = float((w * (a @ w @ b)).sum().detach())
    optimizer = optimizer_of([w])
    peak = optimizer.param_groups[0]["lr"]
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = peak * (1 - t / steps)
        w.grad = a @ w.detach() @ b
        optimizer.step()
    w = w.detach()
    return float((w * (a @ w @ b)).sum()) / start


ADAM_GRID = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]


def test_soap_reaches_in_200_steps_what_the_best_adam_does_not_reach_in_2000() -> None:
    adam = {
        lr: train(lambda params, lr=lr: torch.optim.Adam(params, lr=lr, betas=(0.9, 0.95)), steps=2000)
        for lr in ADAM_GRID
    }
    best = min(adam, key=lambda lr: adam[lr])
    assert ADAM_GRID[0] < best < ADAM_GRID[-1], f"Adam's best rate lies at the edge of its grid: {adam}"
    # Every tenth step on purpose: over 4 seeds and 5 rates from 0.07 to 0.3 the oracle ended above 1e-2 in 5 of 20
    # runs at frequency 1 (QR, 'rank'), and below 1e-6 in all 20 at frequency 10. The rate is the best on seed 0.
    soap = train(lambda params: SOAP(params, 0.15, weight_decay=0.0, precondition_frequency=10), steps=200)
    assert adam[best] >= 100 * soap


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"use_eigh": True}, {"second_moment_refresh": "kronecker"}], ids=str)
def test_soap_solves_the_quadratic_whatever_the_refresh(options: dict, seed: int) -> None:
    end = train(lambda p: SOAP(p, 0.15, weight_decay=0.0, precondition_frequency=10, **options), 200, seed)
    assert end <= 1 / CONDITION**2
