"""The built-in tasks: deterministic, learnable, and scored against the truth."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from emerging_optimizers.lab.tasks import BUILT_IN, make_task, settings_of
from emerging_optimizers.lab.tasks.charlm import BATCH, CONTEXT, CharLM
from emerging_optimizers.lab.tasks.pinn import burgers_reference


def tensors(batch: object) -> list[torch.Tensor]:
    return [batch] if isinstance(batch, torch.Tensor) else list(batch)  # type: ignore[call-overload]


@pytest.mark.parametrize("name", BUILT_IN)
def test_batches_are_a_pure_function_of_seed_and_step(name: str) -> None:
    task, again, other = (make_task(name, seed, {}) for seed in (0, 0, 1))
    late = task.batch(7)
    task.batch(3)
    for x, y, z, other_seed in zip(*map(tensors, (late, again.batch(7), task.batch(8), other.batch(7))), strict=True):
        assert torch.equal(x, y)
        assert not torch.equal(x, z)
        assert not torch.equal(x, other_seed)


@pytest.mark.parametrize("name", BUILT_IN)
def test_validation_is_the_same_for_every_seed_and_leaves_no_trace(name: str) -> None:
    torch.manual_seed(0)
    tasks = [make_task(name, seed, {}) for seed in (0, 1)]
    model = tasks[0].model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second, third = tasks[0].validate(model), tasks[0].validate(model), tasks[1].validate(model)
    assert first == second == third
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    task = make_task(name, 0, {})
    model = task.model()
    task.loss(model, task.batch(0)).backward()
    # A softmax does not see a bias on the keys: its gradient is rounding noise, but there.
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_charlm_is_what_the_docs_say(tmp_path: Path) -> None:
    task = CharLM(0)
    inputs, targets = task.batch(0)
    assert inputs.shape == targets.shape == (BATCH, CONTEXT) == (16, 128)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    model = task.model()
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 0.7e6
    assert abs(task.validate(model) - math.log(task.vocabulary)) < 0.3
    path = tmp_path / "text.txt"
    path.write_text("äöü€" * 3000, encoding="utf-8")
    assert CharLM(0, text=str(path)).vocabulary == 4  # a file has its own alphabet


def test_charlm_cannot_see_the_next_character() -> None:
    task = CharLM(0)
    model = task.model()
    inputs, _ = task.batch(0)
    changed = inputs.clone()
    changed[:, 60] = (changed[:, 60] + 1) % task.vocabulary
    with torch.no_grad():
        a, b = model(inputs), model(changed)
    assert torch.equal(a[:, :60], b[:, :60])
    assert not torch.equal(a[:, 60:], b[:, 60:])


@pytest.mark.parametrize("viscosity", [0.05 / math.pi, 0.01])
def test_burgers_reference_equals_a_spectral_solution(viscosity: float) -> None:
    """Fourier in space, since -sin(pi x) is periodic on [-1, 1], and Runge-Kutta 4 in time, float64."""
    n, steps = 512, 8000
    x = -1.0 + 2.0 * torch.arange(n, dtype=torch.float64) / n
    k = 1j * math.pi * torch.cat([torch.arange(0, n // 2), torch.arange(-n // 2, 0)]).to(torch.float64)
    keep = (k.abs() < math.pi * n / 3).to(torch.float64)  # two thirds, against aliasing of the product

    def slope(spectrum: torch.Tensor) -> torch.Tensor:
        u = torch.fft.ifft(spectrum * keep).real
        return -0.5 * k * torch.fft.fft(u * u) * keep + viscosity * k * k * spectrum

    spectrum, h = torch.fft.fft(-torch.sin(math.pi * x)), 1.0 / steps
    for step in range(1, steps + 1):
        a = slope(spectrum)
        b = slope(spectrum + h / 2 * a)
        c = slope(spectrum + h / 2 * b)
        d = slope(spectrum + h * c)
        spectrum = spectrum + h / 6 * (a + 2 * b + 2 * c + d)
        if step in (steps // 4, steps):
            exact = burgers_reference(x, torch.full_like(x, step / steps), viscosity)
            assert (torch.fft.ifft(spectrum).real - exact).abs().max() < 1e-6


def test_burgers_reference_meets_its_initial_and_boundary_values() -> None:
    x = torch.linspace(-1.0, 1.0, 33, dtype=torch.float64)
    torch.testing.assert_close(burgers_reference(x, torch.zeros_like(x)), -torch.sin(math.pi * x))
    edge = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    assert burgers_reference(edge, torch.full_like(edge, 0.7)).abs().max() < 1e-12


def test_burgers_residual_vanishes_on_the_exact_solution() -> None:
    """The loss that trains the network is the equation that the reference solves."""

    class Exact(torch.nn.Module):
        def forward(self, points: torch.Tensor) -> torch.Tensor:
            return burgers_reference(points[:, 0].double(), points[:, 1].double())

    task = make_task("pinn", 0, {})
    inside = torch.tensor([[x, t] for x in (-0.7, -0.2, 0.05, 0.6) for t in (0.2, 0.9)], dtype=torch.float64)
    assert task.loss(Exact(), inside).item() < 1e-12
    assert task.validate(Exact()) < 1e-6


def test_a_users_task_needs_only_four_methods(folder: Path) -> None:
    task = make_task("tiny_tasks:Tiny", 0, {})
    assert settings_of(task).name == "tiny"
    assert settings_of(type("Bare", (), {})()) == ("Bare", "validation loss", 300, 10)
