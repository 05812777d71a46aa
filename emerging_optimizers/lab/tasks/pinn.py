"""`pinn`: a physics-informed network that solves Burgers' equation.

``u_t + u u_x = nu u_xx`` on x in [-1, 1], t in [0, 1], with ``u(x, 0) = -sin(pi x)`` and ``u(-1, t) = u(1, t) = 0``.
The network never sees the solution: its loss is the mean squared residual at random points, and its score the relative
L2 distance from a reference that is exact to many digits (Cole-Hopf transformation with Gauss-Hermite quadrature).
Points are (N, 2) tensors, columns x and t.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from emerging_optimizers.lab.tasks import step_generator

VISCOSITY = 0.05 / math.pi  # a front that a short run can resolve; 0.01 / pi is the literature's harder choice
POINTS = 1024  # collocation points per step
WIDTH = 64
HIDDEN_LAYERS = 4
QUADRATURE_NODES = 128


def burgers_reference(x: Tensor, t: Tensor, viscosity: float = VISCOSITY) -> Tensor:
    """Compute the exact solution (Cole 1951, Hopf 1950; closed form as in Basdevant et al. 1986, equation 2.5).

    The transformation turns Burgers' into the heat equation, whose solution is a Gaussian average:
    ``u = -E[sin(pi y) f(y)] / E[f(y)]`` with ``f(y) = exp(-cos(pi y) / (2 pi nu))`` and ``y`` normal around ``x`` with
    variance ``2 nu t``. Gauss-Hermite quadrature takes the averages.

    ``x`` and the times ``t``, of which 0 is allowed, are float64 of one shape, and so is the solution. From a viscosity
    of about 0.003 upwards the quadrature has converged.
    """
    from numpy.polynomial.hermite import hermgauss

    nodes, weights = (torch.from_numpy(array) for array in hermgauss(QUADRATURE_NODES))
    y = math.pi * (x[..., None] - 2.0 * (viscosity * t[..., None]).sqrt() * nodes)
    # softmax is the quotient of the two averages, and does not overflow where f would.
    average = torch.softmax(weights.log() - y.cos() / (2.0 * math.pi * viscosity), dim=-1)
    return -(y.sin() * average).sum(-1)


class TanhNetwork(nn.Module):
    """A tanh MLP (x, t) -> u that meets the initial and boundary values by construction.

    ``u = -sin(pi x) + t (1 - x^2) N(x, t)``: the loss needs no weights between residual and boundary terms.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = [2] + [WIDTH] * HIDDEN_LAYERS
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.head = nn.Linear(WIDTH, 1)
        for layer in (*self.hidden, self.head):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, points: Tensor) -> Tensor:
        """Map points (N, 2) to u (N,)."""
        h = points
        for layer in self.hidden:
            h = torch.tanh(layer(h))
        x, t = points.unbind(1)
        free: Tensor = self.head(h)[:, 0]
        return t * (1.0 - x * x) * free - torch.sin(math.pi * x)


class Burgers:
    """Burgers' equation with a moving front at x = 0; start weights and collocation points follow from the seed."""

    name = "pinn"
    metric = "relative L2 error"
    steps = 500
    eval_every = 10

    def __init__(self, seed: int) -> None:
        self.seed = seed
        x = torch.linspace(-1.0, 1.0, 129, dtype=torch.float64)
        t = torch.linspace(0.0, 1.0, 33, dtype=torch.float64)
        grid_x, grid_t = torch.meshgrid(x, t, indexing="ij")
        self._reference = burgers_reference(grid_x, grid_t).flatten()
        self._grid = torch.stack([grid_x.flatten(), grid_t.flatten()], dim=1).float()

    def model(self) -> nn.Module:
        """Make the network, 13,000 parameters."""
        return TanhNetwork()

    def batch(self, step: int) -> Tensor:
        """Draw POINTS points (N, 2), uniform over the domain."""
        points = torch.rand(POINTS, 2, generator=step_generator(self.seed, step))
        return points * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Compute the mean squared residual of the equation."""
        # Leaves of their own, so that autograd gives the derivatives along x and t separately.
        x, t = (column.clone().requires_grad_() for column in batch.unbind(1))
        u: Tensor = model(torch.stack([x, t], dim=1))
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        return (u_t + u * u_x - VISCOSITY * u_xx).square().mean()

    @torch.no_grad()
    def validate(self, model: nn.Module) -> float:
        """Compute the relative L2 distance from the exact solution on a grid of 129 x 33 points."""
        u: Tensor = model(self._grid)
        return (torch.dist(u.double(), self._reference) / self._reference.square().sum().sqrt()).item()
