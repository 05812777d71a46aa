"""What training code puts around an optimizer: clipping, accumulation, loss scaling, averaging, tied weights."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations
from torch.optim import swa_utils

from tests.contract.configurations import Configuration, every_configuration
from tests.contract.models import Net, batch, give_gradients, loss_of, new_parameters, same, seeded, snapshot, train


@every_configuration()
def test_a_step_in_the_backward_pass_equals_an_ordinary_one(configuration: Configuration) -> None:
    """An optimizer per parameter that steps in the backward pass equals ordinary training."""
    model, plain = Net(), Net()
    optimizers = {p: configuration.optimizer([p]) for p in model.parameters()}

    def step_now(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    losses = []
    for step in range(5):
        loss = loss_of(model, step)
        loss.backward()
        losses.append(loss.item())
    assert losses == train(configuration.optimizer(plain.parameters()), plain, 5)
    assert same(model.parameters(), plain.parameters())
    assert all(p.grad is None for p in model.parameters())


@every_configuration()
@pytest.mark.parametrize("clip", [lambda ps: clip_grad_norm_(ps, 0.1), lambda ps: clip_grad_value_(ps, 0.05)])
def test_clipped_gradients_are_what_is_used(configuration: Configuration, clip: object) -> None:
    """Gradients that were clipped in place are what a step uses."""
    parameters, control, unclipped = every = [new_parameters() for _ in range(3)]
    optimizers = [configuration.optimizer(params, eps=0.1) for params in every]
    for step in range(4):
        for params in every:
            give_gradients(params, step)
        clip(parameters)
        for p, q in zip(parameters, control, strict=True):
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert same(parameters, control)
    assert not any(torch.equal(p, q) for p, q in zip(parameters, unclipped, strict=True))


@every_configuration()
def test_accumulated_gradients_equal_a_larger_batch(configuration: Configuration) -> None:
    """Gradients accumulated over several backward passes equal those of the whole batch."""
    model, plain = Net().double(), Net().double()
    # eps keeps directions without a gradient, whose rounding differs, from being scaled up
    optimizer, control = (configuration.optimizer(net.parameters(), eps=1e-3) for net in (model, plain))
    for step in range(4):
        images, targets = (x.double() for x in batch(step))
        optimizer.zero_grad()
        for part in range(4):
            rows = slice(4 * part, 4 * part + 4)
            ((model(images[rows]) - targets[rows]).square().mean() / 4).backward()
        optimizer.step()
        control.zero_grad()
        (plain(images) - targets).square().mean().backward()
        control.step()
    torch.testing.assert_close(snapshot(model.parameters()), snapshot(plain.parameters()))


@every_configuration()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_with_a_grad_scaler_trains(configuration: Configuration, dtype: torch.dtype) -> None:
    """Autocast with a GradScaler trains; a step whose gradients overflow is skipped, and the scale reduced."""
    model = Net()
    optimizer = configuration.optimizer(model.parameters(), lr=0.03)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    losses = []
    for step in range(25):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model, step)
        scaler.scale(loss).backward()
        if step == 5:
            model.head.weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        before = snapshot(model.parameters())
        scaler.step(optimizer)
        scaler.update()
        if step == 5:
            assert same(model.parameters(), before)
            assert scaler.get_scale() == 512.0
        losses.append(loss.item())
    assert scaler.get_scale() == 512.0
    assert all(int(state["step"]) == 24 for state in optimizer.state.values())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@every_configuration()
def test_a_grad_scaler_changes_nothing_but_the_scale(configuration: Configuration) -> None:
    """With a scale that is a power of two, training through a GradScaler is bit for bit training without."""
    model, plain = Net(), Net()
    optimizer = configuration.optimizer(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    losses = []
    for step in range(5):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses == train(configuration.optimizer(plain.parameters()), plain, 5)


@every_configuration()
def test_weight_averaging_follows_the_weights(configuration: Configuration) -> None:
    """AveragedModel, its exponential variant and SWALR work as with any optimizer."""
    model = Net()
    optimizer = configuration.optimizer(model.parameters(), lr=0.02)
    mean = swa_utils.AveragedModel(model)
    ema = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    scheduler = swa_utils.SWALR(optimizer, swa_lr=0.005, anneal_epochs=3)
    weights: list[list[Tensor]] = []
    expected: list[Tensor] = []
    for step in range(5):
        train(optimizer, model, 1, start=step)
        scheduler.step()
        mean.update_parameters(model)
        ema.update_parameters(model)
        weights.append(snapshot(model.parameters()))
        pairs = zip(expected or weights[-1], weights[-1], strict=True)
        expected = [(old + new) / 2 for old, new in pairs]
    means = [torch.stack(history).mean(0) for history in zip(*weights, strict=True)]
    torch.testing.assert_close(snapshot(mean.module.parameters()), means)
    torch.testing.assert_close(snapshot(ema.module.parameters()), expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


@every_configuration()
@pytest.mark.parametrize("kind", ["orthogonal", "weight norm"])
def test_parametrized_weights_train(configuration: Configuration, kind: str) -> None:
    """A layer whose weight is parametrized (orthogonal, weight norm) trains, through the original tensors."""
    model = Net()
    if kind == "orthogonal":  # the Householder map keeps signs among the weights, which weight decay spoils
        parametrizations.orthogonal(model.hidden, orthogonal_map="matrix_exp")
    else:
        parametrizations.weight_norm(model.hidden)
    optimizer = configuration.optimizer(model.parameters(), lr=0.02)
    before, weight, loss = snapshot(model.parameters()), model.hidden.weight.detach().clone(), loss_of(model, 0).item()
    for _ in range(15):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        optimizer.step()
    assert loss_of(model, 0).item() < loss
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert not torch.allclose(model.hidden.weight, weight)
    if kind == "orthogonal":
        columns = model.hidden.weight
        torch.testing.assert_close(columns.T @ columns, torch.eye(3))


@every_configuration()
def test_tied_weights_are_one_parameter(configuration: Configuration) -> None:
    """Tied weights are one parameter: one state, stepped once with the sum of both gradients."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.embedding.weight.data = seeded((6, 4), 1)
            self.out.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.embedding(tokens))

    model, (alone,) = Tied(), new_parameters([(6, 4)])
    alone.data.copy_(model.out.weight.data)
    optimizer, control = configuration.optimizer(model.parameters()), configuration.optimizer([alone])
    for step in range(4):
        tokens = torch.arange(12) % 6
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens.roll(step)).backward()
        alone.grad = model.out.weight.grad.clone()
        optimizer.step()
        control.step()
    assert len(optimizer.state) == 1
    assert torch.equal(model.embedding.weight, alone)
    assert model.embedding.weight is model.out.weight


@every_configuration()
def test_two_optimizers_on_one_model_are_one_with_two_groups(configuration: Configuration) -> None:
    """Two optimizers on the halves of a model do what one with two groups does."""
    model, plain = Net(), Net()
    halves = [configuration.optimizer(list(model.parameters())[part]) for part in (slice(0, 3), slice(3, 6))]
    one = configuration.optimizer([{"params": list(plain.parameters())[:3]}, {"params": list(plain.parameters())[3:]}])
    losses = []
    for step in range(5):
        for optimizer in halves:
            optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        for optimizer in halves:
            optimizer.step()
        losses.append(loss.item())
    assert losses == train(one, plain, 5)


@every_configuration()
def test_weights_may_be_replaced_under_the_optimizer(configuration: Configuration) -> None:
    """Weights that are loaded into the model in the middle of training are what the next step starts from."""
    model = Net()
    optimizer = configuration.optimizer(model.parameters(), lr=1e-4)
    train(optimizer, model, 3)
    loaded = {name: seeded(value.shape, 77) for name, value in model.state_dict().items()}
    model.load_state_dict(loaded)
    train(optimizer, model, 1, start=3)
    for name, value in model.state_dict().items():
        assert not torch.equal(value, loaded[name])
        torch.testing.assert_close(value, loaded[name], rtol=0, atol=1e-3)
