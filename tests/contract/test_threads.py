"""Optimizers in several threads: they do not disturb each other, nor torch's global settings."""

import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.contract.configurations import Configuration, every_configuration
from tests.contract.models import new_parameters, same, seeded

STEPS = 40


def global_settings() -> dict[str, object]:
    backends = {
        "all": torch.backends,
        "cuda": torch.backends.cuda.matmul,
        "cudnn": torch.backends.cudnn,
        "mkldnn": torch.backends.mkldnn,
        "mkldnn.matmul": torch.backends.mkldnn.matmul,
        "mkldnn.conv": torch.backends.mkldnn.conv,
    }
    return {name: one.fp32_precision for name, one in backends.items()} | {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture
def fast_switching() -> Iterator[None]:
    """Threads take turns after every few bytecodes, so that a race that there is happens."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def go(configuration: Configuration, parameters: list[nn.Parameter], seed: int, options: dict) -> None:
    optimizer = configuration.optimizer(parameters, **options)
    for step in range(STEPS):
        for p in parameters:
            p.grad = seeded(p.shape, 1000 * seed + step)
        optimizer.step()


@every_configuration()
@pytest.mark.usefixtures("fast_switching")
def test_two_threads_give_what_one_after_the_other_gives(configuration: Configuration) -> None:
    """Two optimizers in two threads give what they give one after the other, and leave torch's settings alone."""
    shapes = [(4, 3), (3,)]
    options = [{}, {}]
    if configuration.info.name == "SOAP":
        options = [{"fp32_matmul_prec": "medium"}, {"fp32_matmul_prec": "highest"}]
    expected = [new_parameters(shapes) for _ in options]
    for seed, own in enumerate(options):
        go(configuration, expected[seed], seed, own)
    before, errors = global_settings(), []
    found = [new_parameters(shapes) for _ in options]
    barrier = threading.Barrier(len(options))

    def work(seed: int) -> None:
        try:
            barrier.wait()
            go(configuration, found[seed], seed, options[seed])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(len(options))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)
    assert global_settings() == before
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


@every_configuration()
@pytest.mark.parametrize("setting", ["none", "ieee", "tf32"])
def test_a_step_leaves_torchs_settings_alone(configuration: Configuration, setting: str) -> None:
    """A step, also one that raises, leaves torch's global settings as they were, whatever they were."""
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.fp32_precision
    torch.backends.fp32_precision = setting
    try:
        settings = global_settings()
        (p,) = new_parameters([(4, 3)])
        optimizer = configuration.optimizer([p])
        for step in range(4):
            p.grad = seeded((4, 3), step)
            optimizer.step()
            assert global_settings() == settings
        p.grad = seeded((4, 3), 9).to_sparse()
        with pytest.raises(RuntimeError):
            optimizer.step()
        assert global_settings() == settings
        torch.backends.fp32_precision = "ieee" if setting == "tf32" else "tf32"
        inherited = torch.backends.mkldnn.matmul.fp32_precision
        torch.backends.fp32_precision = setting
        assert torch.backends.mkldnn.matmul.fp32_precision == settings["mkldnn.matmul"]
        assert inherited == ("ieee" if setting == "tf32" else "tf32"), "a general setting must still reach the products"
    finally:
        torch.backends.fp32_precision = before[1]
    assert torch.backends.mkldnn.matmul.fp32_precision == before[0]
