"""Shapes, memory formats, dtypes and torch's defaults: none of them changes what a step does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.contract.configurations import Configuration, every_configuration
from tests.contract.models import SHAPES, Net, new_parameters, same, seeded, take_steps, train

STEPS = 4
ODD_SHAPES = [(), (1,), (7,), (0,), (0, 3), (3, 0, 2), (1, 1), (1, 6), (6, 1), (2, 1, 3), (1, 1, 1, 1), (2, 2, 1, 2, 2)]
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "transposed": ((4, 3), lambda x: x.t().contiguous().t()),
    "permuted": ((2, 3, 4), lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0)),
    "slice of rows": ((4, 3), lambda x: torch.cat([x, x])[: len(x)]),
    "slice of columns": ((4, 3), lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]]),
    "every other column": ((4, 3), lambda x: x.repeat_interleave(2, dim=1)[:, ::2]),
    "strided vector": ((5,), lambda x: x.repeat_interleave(3)[::3]),
    "channels_last": ((2, 3, 2, 2), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "channels_last_3d": ((2, 3, 2, 2, 2), lambda x: x.contiguous(memory_format=torch.channels_last_3d)),
}


def arrange(layout: str, tensor: Tensor) -> Tensor:
    arranged = LAYOUTS[layout][1](tensor)
    assert torch.equal(arranged, tensor)
    return arranged


@every_configuration()
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_every_shape_takes_steps(configuration: Configuration, shape: tuple[int, ...]) -> None:
    """A parameter of any shape takes steps: 0-D, without elements, with axes of one element, 5-D."""
    (p,) = parameters = new_parameters([shape])
    optimizer = configuration.optimizer(parameters)
    before = p.detach().clone()
    take_steps(optimizer, parameters, STEPS)
    assert p.shape == shape
    assert p.isfinite().all()
    assert int(optimizer.state[p]["step"]) == STEPS
    assert (p != before).all()


@every_configuration()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["parameter", "gradient", "both"])
def test_memory_layout_does_not_matter(configuration: Configuration, layout: str, of: str) -> None:
    """A non-contiguous parameter or gradient steps as a contiguous one, and keeps its strides."""
    shape = LAYOUTS[layout][0]
    (plain,) = new_parameters([shape], torch.float64)
    start = plain.detach().clone()
    p = nn.Parameter(arrange(layout, start)) if of != "gradient" else nn.Parameter(start)
    strides, pointer = p.stride(), p.data_ptr()
    optimizer, control = configuration.optimizer([p]), configuration.optimizer([plain])
    for step in range(STEPS):
        grad = seeded(shape, step, torch.float64)
        plain.grad = grad
        p.grad = arrange(layout, grad) if of != "parameter" else grad.clone()
        grad_strides = p.grad.stride()
        for one in (optimizer, control):
            one.step()
        assert p.grad.stride() == grad_strides
    torch.testing.assert_close(p, plain)
    assert (p.stride(), p.data_ptr()) == (strides, pointer)


@every_configuration()
def test_a_parameter_that_is_a_slice_leaves_its_neighbours_alone(configuration: Configuration) -> None:
    """A parameter that is a view into a larger tensor moves, and its neighbours there do not."""
    storage = seeded((6, 8), 0)
    before = storage.clone()
    p = nn.Parameter(storage[1:5, 2:5])
    take_steps(configuration.optimizer([p]), [p], STEPS)
    changed = storage != before
    assert changed[1:5, 2:5].all()
    assert changed.sum() == 12


@every_configuration()
def test_an_expanded_gradient_is_read_and_not_written(configuration: Configuration) -> None:
    """A gradient that is an expanded view, as `sum().backward()` may make, counts as the tensor that it shows."""
    shapes = [(5,), (4, 3), (2, 3, 2, 2)]
    parameters, plain = new_parameters(shapes, torch.float64), new_parameters(shapes, torch.float64)
    optimizer, control = configuration.optimizer(parameters), configuration.optimizer(plain)
    for step in range(STEPS):
        for p, q in zip(parameters, plain, strict=True):
            one = seeded(p.shape[-1:], step, torch.float64)
            p.grad = one.expand(p.shape)
            q.grad = one.expand(p.shape).clone()
        optimizer.step()
        control.step()
    torch.testing.assert_close(parameters, plain)


@every_configuration()
def test_a_channels_last_model_stays_in_channels_last(configuration: Configuration) -> None:
    """A model in `channels_last` stays in it, and steps as a contiguous one does with the same gradients."""
    conv = nn.Conv2d(2, 3, 2, bias=False).double().to(memory_format=torch.channels_last)
    plain = nn.Parameter(conv.weight.detach().clone(memory_format=torch.contiguous_format))
    optimizer, control = configuration.optimizer(conv.parameters()), configuration.optimizer([plain])
    for step in range(STEPS):
        optimizer.zero_grad()
        images = seeded((4, 2, 4, 4), step, torch.float64).contiguous(memory_format=torch.channels_last)
        conv(images).square().mean().backward()
        assert conv.weight.grad.is_contiguous(memory_format=torch.channels_last)
        plain.grad = conv.weight.grad.contiguous()
        optimizer.step()
        control.step()
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.weight.is_contiguous()
    torch.testing.assert_close(conv.weight, plain)


@every_configuration()
def test_dtypes_may_be_mixed_in_a_group(configuration: Configuration) -> None:
    """Parameters of different dtypes in one group step each as it does alone."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    mixed = [p for dtype in dtypes for p in new_parameters(dtype=dtype)]
    optimizer = configuration.optimizer(mixed)
    for step in range(STEPS):
        for p in mixed:
            p.grad = seeded(p.shape, 100 * step + p.ndim, p.dtype)
        optimizer.step()
    for dtype in dtypes:
        alone = new_parameters(dtype=dtype)
        control = configuration.optimizer(alone)
        for step in range(STEPS):
            for p in alone:
                p.grad = seeded(p.shape, 100 * step + p.ndim, p.dtype)
            control.step()
        assert same([p for p in mixed if p.dtype == dtype], alone)


@every_configuration(adamw_fails="AdamW keeps the moments of a 16-bit parameter in 16 bits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_of_16_bit_parameters_has_32_bits(configuration: Configuration, dtype: torch.dtype) -> None:
    """The floating-point state of a 16-bit parameter, besides its step, is float32."""
    parameters = new_parameters(dtype=dtype)
    optimizer = configuration.optimizer(parameters)
    take_steps(optimizer, parameters, STEPS)
    items = [item for state in optimizer.state.values() for item in state.items() if "step" not in item[0]]
    assert {value.dtype for _, value in items if value.is_floating_point()} == {torch.float32}


@every_configuration()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_dtype_does_not_matter(
    configuration: Configuration, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """`torch.set_default_dtype(float64)` changes nothing for parameters of another dtype, nor their state's dtype."""
    plain, parameters = new_parameters(dtype=dtype), new_parameters(dtype=dtype)
    control, optimizer = configuration.optimizer(plain), configuration.optimizer(parameters)
    take_steps(control, plain, STEPS)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    take_steps(optimizer, parameters, STEPS)
    assert same(parameters, plain)
    for p, q in zip(parameters, plain, strict=True):
        wanted = {key: value.dtype for key, value in control.state[q].items() if key != "step"}
        assert {key: value.dtype for key, value in optimizer.state[p].items() if key != "step"} == wanted


@every_configuration()
def test_the_default_device_does_not_matter(configuration: Configuration) -> None:
    """A default device other than the parameters' changes nothing."""
    plain, parameters = new_parameters(), new_parameters()
    take_steps(configuration.optimizer(plain), plain, STEPS)
    optimizer = configuration.optimizer(parameters)
    for step in range(STEPS):
        for index, p in enumerate(parameters):
            p.grad = seeded(SHAPES[index], 100 * step + index)
        with torch.device("meta"):
            optimizer.step()
    assert same(parameters, plain)


@every_configuration()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_inside_autocast_is_an_ordinary_step(configuration: Configuration, dtype: torch.dtype) -> None:
    """A step inside `torch.autocast` is bit for bit the step outside of it."""
    plain, parameters = new_parameters(), new_parameters()
    take_steps(configuration.optimizer(plain), plain, STEPS)
    optimizer = configuration.optimizer(parameters)
    with torch.autocast("cpu", dtype=dtype):
        take_steps(optimizer, parameters, STEPS)
    assert same(parameters, plain)


@every_configuration()
def test_deterministic_algorithms_can_be_required(configuration: Configuration, request: pytest.FixtureRequest) -> None:
    """Training works, and equally, under `torch.use_deterministic_algorithms`."""
    model, plain = Net(), Net()
    losses = train(configuration.optimizer(plain.parameters()), plain, STEPS)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True)
    assert train(configuration.optimizer(model.parameters()), model, STEPS) == losses
