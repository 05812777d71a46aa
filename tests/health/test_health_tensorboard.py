"""HealthMonitor with a real SummaryWriter: what is in the event file is what was measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from emerging_optimizers.health import HealthMonitor
from emerging_optimizers.soap import SOAP


def test_an_event_file_holds_every_measurement_at_its_step(tmp_path: Path) -> None:
    # Not at the head of the module: they take a second to import, and no other test needs them.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = SOAP(model.parameters(), lr=1e-2, precondition_frequency=3)
    measured: dict[tuple[str, int], float] = {}
    with SummaryWriter(tmp_path) as writer:
        monitor = HealthMonitor(optimizer, every=4, log=writer, names=model.named_parameters())
        beside = HealthMonitor(
            optimizer,
            every=4,
            log=lambda name, value, step: measured.update({(name, step): value}),
            names=model.named_parameters(),
        )
        optimizer.register_step_post_hook(monitor)
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(16, 6)).square().mean().backward()
            optimizer.step()
            beside()

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"health/0.weight/residual_0", "health/2.weight/residual_1", "health/0.bias/direction_rms"} <= set(tags)
    assert {"health/worst_residual", "health/worst_orthogonality", "health/findings"} <= set(tags)
    written = {(tag, event.step): event.value for tag in tags for event in events.Scalars(tag)}
    assert {step for _, step in written} == {4, 8}
    assert written.keys() == measured.keys()
    assert all(math.isfinite(value) for value in written.values())
    assert written == pytest.approx(measured, rel=1e-6)  # the file has float32
