"""`torch.compile` around the optimizer: of the forward pass and the loss, and of a whole training step."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.contract.configurations import Configuration, every_configuration
from tests.contract.models import same, seeded


class Small(nn.Module):
    """Two layers; little to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(9, 4), nn.Linear(4, 1)
        for index, p in enumerate(self.parameters()):
            p.data = seeded(p.shape, index) / 2

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(inputs))).squeeze(1)


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    return (model(inputs) - inputs[:, 0]).square().mean()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_configuration()
def test_a_compiled_forward_pass_and_loss_train_alike(configuration: Configuration) -> None:
    """With the forward pass and the loss compiled, training is bit for bit what it is without, and compiles once."""
    model, plain = Small(), Small()
    optimizer, control = configuration.optimizer(model.parameters()), configuration.optimizer(plain.parameters())
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(loss_of, backend=counter)
    for step in range(5):
        inputs = seeded((16, 9), step)
        optimizer.zero_grad()
        compiled(model, inputs).backward()
        optimizer.step()
        control.zero_grad()
        loss_of(plain, inputs).backward()
        control.step()
    assert counter.frame_count == 1
    assert same(model.parameters(), plain.parameters())


@every_configuration()
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, when it imports inductor
def test_a_compiled_training_step_trains_alike(configuration: Configuration) -> None:
    """A compiled training step with `optimizer.step()` in it does the same, and compiles nothing after four steps."""
    model, plain = Small(), Small()
    optimizer, control = configuration.optimizer(model.parameters()), configuration.optimizer(plain.parameters())
    counter = CompileCounterWithBackend("eager")

    @torch.compile(backend=counter)
    def training_step(inputs: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()

    compiled = []
    for step in range(8):
        inputs = seeded((16, 9), step)
        training_step(inputs)
        compiled.append(counter.frame_count)
        control.zero_grad()
        loss_of(plain, inputs).backward()
        control.step()
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))
    assert compiled[3:] == [compiled[3]] * 5
