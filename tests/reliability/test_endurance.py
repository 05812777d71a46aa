"""Long runs: bases stay orthonormal over thousands of refreshes, and memory does not grow with the steps."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers.soap import SOAP
from tests.reliability.memory_worker import MODES
from tests.reliability.test_extremes import ORTHONORMAL, orthogonality_error


class Drift:
    """Noisy gradients of a quadratic whose curvature, noise and scale wander, as they do in training."""

    def __init__(self, shape: tuple[int, int], seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.left, self.right = self.normal(shape[0], shape[0]), self.normal(shape[1], shape[1])
        self.target = self.normal(*shape)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def gradient(self, weight: Tensor, step: int) -> Tensor:
        if step % 10 == 0:
            self.left += 0.02 * (self.normal(*self.left.shape) - 0.01 * self.left)
            self.right += 0.02 * (self.normal(*self.right.shape) - 0.01 * self.right)
            self.target += 0.01 * self.normal(*self.target.shape)
        noise = self.left @ self.normal(*weight.shape) @ self.right  # correlated along both axes, spread over decades
        scale = 10.0 ** (-2.0 * (step % 7000) / 7000)  # the gradient shrinks a hundredfold, and starts again
        return scale * (weight - self.target + 0.3 * self.left @ noise @ self.right)


ITERATED = {
    "default": {},
    "kl": {"use_kl_shampoo": True},
    "kronecker, 2 power steps": {
        "second_moment_refresh": "kronecker",
        "power_iter_steps": 2,
        "fp32_matmul_prec": "medium",
        "qr_fp32_matmul_prec": "medium",
    },
}
REFRESHES = 5_000  # an eps in each would come to fifty times what is allowed


@pytest.mark.parametrize("mode", ITERATED)
def test_bases_stay_orthonormal_over_thousands_of_refreshes_without_eigh(mode: str) -> None:
    parameter = nn.Parameter(torch.zeros(6, 10))
    optimizer = SOAP([parameter], lr=0.01, precondition_frequency=1, **ITERATED[mode])
    drift, first = Drift((6, 10), seed=0), {}
    for step in range(1, REFRESHES + 1):
        parameter.grad = drift.gradient(parameter.detach(), step)
        optimizer.step()
        if step % 500 == 0 or step == 1:
            state = optimizer.state[parameter]
            assert int(state["refresh_step"]) == step, "a refresh was left out, so that nothing was tested"
            assert max(orthogonality_error(state[f"Q_{k}"]) for k in range(2)) <= ORTHONORMAL, step
            assert all(value.isfinite().all() for value in state.values())
            if step == 500:
                first = {k: state[f"Q_{k}"].clone() for k in range(2)}
    turned = [float((first[k].T @ state[f"Q_{k}"]).abs().max(0).values.min()) for k in range(2)]
    assert max(turned) < 0.95, "the bases have not turned, so that nothing was tested"


# --- memory -------------------------------------------------------------------------------------------------------

FIRST, LAST = 300, 1_300
in_one_process = pytest.mark.xdist_group("memory")


@pytest.fixture(scope="module")
def growth() -> dict[str, dict[str, int]]:
    """By how much memory grows between the two steps, by mode; in "leak" a tensor is kept per step."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("asks glibc")
    command = [sys.executable, "-m", "tests.reliability.memory_worker", str(FIRST), str(LAST)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def grows(growth: dict[str, int]) -> bool:
    # The smallest leak per step is one Python object, or a tensor that only C++ holds, some 300 bytes. Caches fill.
    steps = LAST - FIRST
    return growth["tensors"] != 0 or growth["objects"] >= 0.9 * steps or growth["bytes"] >= 100 * steps


@pytest.mark.slow
@in_one_process
@pytest.mark.parametrize("mode", MODES)
def test_memory_does_not_grow_with_the_steps(mode: str, growth: dict[str, dict[str, int]]) -> None:
    assert not grows(growth[mode]), growth[mode]


@pytest.mark.slow
@in_one_process
@pytest.mark.parametrize("blind", [(), ("tensors", "objects"), ("tensors", "bytes")], ids=str)
def test_a_leak_of_a_tensor_per_step_would_be_seen(blind: tuple[str, ...], growth: dict[str, dict[str, int]]) -> None:
    assert grows({**growth["leak"], **dict.fromkeys(blind, 0)}), growth["leak"]
