"""What only a GPU can show: that a step waits for nothing, and that it does there what it does on the CPU."""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from emerging_optimizers.soap import SOAP, incidents
from tests.algorithm.test_soap import MODES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [(64, 32), (64, 32), (48, 80), (32, 16, 3, 3), (32,), (), (80,)]


def parameters_on(device: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(parameters):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(p)


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Any wait for the device is an error until the test ends, if it has called the fixture's value."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("spoiled", [False, True])
@pytest.mark.parametrize("lr", ["number", "CPU tensor", "GPU tensor"])
@pytest.mark.parametrize(
    "mode", ["default", "kl", "1-D", "merged", "clipped", "l2", "staggered", "adamw", "packed, bfloat16"]
)
@pytest.mark.usefixtures("no_sync")
def test_a_step_without_a_refresh_waits_for_nothing(mode: str, lr: str, spoiled: bool) -> None:
    rate = {"number": 1e-3, "CPU tensor": torch.tensor(1e-3), "GPU tensor": torch.tensor(1e-3, device="cuda")}[lr]
    parameters = parameters_on("cuda")
    options = {**MODES[mode], "precondition_frequency": 1000, "stagger_updates": False}
    optimizer = SOAP(parameters, lr=rate, **options)
    for step in range(3):
        set_gradients(parameters, step)
        optimizer.step()
    set_gradients(parameters, 3)
    if spoiled:
        parameters[0].grad[0, 0] = float("nan")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(3):
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    assert int(optimizer.state[parameters[0]]["skipped_steps"]) == 3 * spoiled


STEPS = 12
#: An eigenvector turns by a rounding over its gap (1e-5, say), Adam divides by eps (1e-4), in each step.
ROUNDING = STEPS * torch.finfo(torch.float64).eps / 1e-5 / 1e-4


# The basis of a null space is arbitrary, and rounded to bfloat16 it lets through what an exact one does not.
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "packed, bfloat16"])
def test_a_gpu_does_what_the_cpu_does(mode: str) -> None:
    options = {"lr": 1e-2, **MODES[mode], "eps": 1e-4}
    here, there = parameters_on("cpu", torch.float64), parameters_on("cuda", torch.float64)
    on_cpu, on_gpu = SOAP(here, **options), SOAP(there, **options)
    for step in range(STEPS):
        set_gradients(here, step)
        set_gradients(there, step)
        on_cpu.step()
        on_gpu.step()
    for p, q in zip(here, there, strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=ROUNDING, atol=ROUNDING)


def test_a_skipped_gradient_is_told_within_a_few_steps(caplog: pytest.LogCaptureFixture) -> None:
    parameters = parameters_on("cuda")
    optimizer = SOAP(parameters, lr=1e-3)
    incidents.incidents.clear()
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            set_gradients(parameters, step)
            if step == 1:
                parameters[2].grad[0, 0] = float("inf")
            optimizer.step()
            torch.cuda.synchronize()
    assert incidents.incidents["gradient skipped on cuda:0"] == 1
    assert len(caplog.records) == 1


def test_state_and_counters_are_where_they_belong() -> None:
    parameters = parameters_on("cuda", torch.bfloat16)
    optimizer = SOAP(parameters, lr=1e-3)
    set_gradients(parameters, 0)
    optimizer.step()
    for state in optimizer.state.values():
        devices = {key: value.device.type for key, value in state.items()}
        on_cpu = {key for key, device in devices.items() if device == "cpu"}
        assert on_cpu == {"step", "refresh_step"} & set(devices)
