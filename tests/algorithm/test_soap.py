"""The optimizer as a whole: every mode on a real model, options per group, state, and gradients that cannot be used."""

import copy
import itertools
import logging
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from emerging_optimizers.routing import route_parameters
from emerging_optimizers.schedules import LinearFrequency
from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.refresh import raise_to_floor
from emerging_optimizers.soap.step import adam

MODES = {
    "default": {},
    "frequency 10": {"precondition_frequency": 10},
    "schedule": {"precondition_frequency": LinearFrequency(1, 10, 50)},
    "kl": {"use_kl_shampoo": True},
    "kl, 1-D, eigh": {"use_kl_shampoo": True, "precondition_1d": True, "use_eigh": True},
    "kl, warm-up": {"use_kl_shampoo": True, "adam_warmup_steps": 3, "precondition_frequency": 10},
    "eigh": {"use_eigh": True},
    "warm-up": {"adam_warmup_steps": 3, "precondition_frequency": 10},
    "1-D": {"precondition_1d": True},
    "merged": {"merge_dims": True},
    "kronecker": {"second_moment_refresh": "kronecker", "precondition_frequency": 10},
    "adaptive": {"use_adaptive_criteria": True, "adaptive_update_tolerance": 0.01},
    "3 power steps": {"power_iter_steps": 3},
    "nesterov": {"use_nesterov": True},
    "no bias correction": {"correct_bias": False, "max_update_rms": 1.0},
    "l2": {"weight_decay_method": "l2"},
    "independent": {"weight_decay_method": "independent", "weight_decay": 1e-4},
    "limited": {"max_precond_dim": 16},
    "adamw": {"max_precond_dim": 0},
    "raise": {"nonfinite": "raise"},
    "propagate": {"nonfinite": "propagate"},
    "clipped": {"max_update_rms": 0.5},
    "staggered": {"stagger_updates": True, "precondition_frequency": 5},
    "packed": {"pack_factors": True},
    "packed, bfloat16": {"pack_factors": True, "state_dtype": torch.bfloat16, "precondition_frequency": 3},
}

COUNTERS = ("step", "refresh_step", "skipped_steps", "failed_refreshes")


class Everything(nn.Module):
    """A layer of each kind that users have: Embedding, Conv2d, LayerNorm, Linear with and without bias, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.LayerNorm(24)
        self.hidden = nn.Linear(24, 20)
        self.head = nn.Linear(20, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        image = self.embedding(tokens).unsqueeze(1)  # (batch, 1, length, 16)
        features = self.conv(image).amax(2).flatten(1)[:, :24]
        return self.scale * self.head(torch.tanh(self.hidden(self.norm(features)))).squeeze(1)


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 11, (32, 6), generator=generator)
        output = model(tokens)
        loss = (
            (output.to(torch.promote_types(output.dtype, torch.float32)) - (tokens[:, 2:5].float().mean(1) - 5) / 2)
            .square()
            .mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def new_model(seed: int = 0) -> Everything:
    torch.manual_seed(seed)
    return Everything()


@pytest.mark.parametrize("mode", MODES)
def test_a_model_of_every_kind_of_layer_trains_50_steps_without_a_log_line(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = new_model()
    optimizer = SOAP(model.parameters(), lr=3e-2, **MODES[mode])
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = train(optimizer, model, 50)
    assert not caplog.records
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["default", "kl", "warm-up", "merged"])
def test_every_parameter_dtype_trains_with_state_of_at_least_float32(dtype: torch.dtype, mode: str) -> None:
    model = new_model().to(dtype)
    optimizer = SOAP(model.parameters(), lr=3e-2, **MODES[mode])
    losses = train(optimizer, model, 50)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for parameter, state in optimizer.state.items():
        assert parameter.dtype == dtype
        assert {value.dtype for key, value in state.items() if key not in COUNTERS} == {wanted}


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (2, 3, 2, 3), (2, 3, 2, 1, 2)])
@pytest.mark.parametrize("precondition_1d", [False, True])
def test_the_state_is_flat_and_its_keys_depend_on_the_shape_alone(shape: tuple, precondition_1d: bool) -> None:
    parameter = nn.Parameter(torch.ones(shape))
    parameter.grad = torch.ones(shape)
    optimizer = SOAP([parameter], lr=0.1, precondition_1d=precondition_1d, adam_warmup_steps=5)
    optimizer.step()
    state = optimizer.state[parameter]
    axes = range(len(shape)) if len(shape) > 1 or (precondition_1d and shape) else []
    wanted = {"exp_avg", "exp_avg_sq", *(COUNTERS if axes else ("step", "skipped_steps"))}
    assert set(state) == wanted | {f"{kind}_{k}" for kind in ("GG", "Q") for k in axes}
    assert all(isinstance(value, Tensor) for value in state.values())
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
    assert all(state[f"{kind}_{k}"].shape == (shape[k], shape[k]) for kind in ("GG", "Q") for k in axes)
    assert state["step"].dtype == torch.float64
    assert state["step"].device.type == "cpu"


def test_a_plain_adamw_group_has_no_factor_state() -> None:
    model = new_model()
    optimizer = SOAP(model.parameters(), lr=1e-2, max_precond_dim=0)
    train(optimizer, model, 1)
    keys = {key for state in optimizer.state.values() for key in state}
    assert keys == {"step", "exp_avg", "exp_avg_sq", "skipped_steps"}


def test_options_differ_per_group() -> None:
    model = new_model()
    routing = route_parameters(model)
    groups = routing.param_groups(soap={"precondition_frequency": 3, "use_kl_shampoo": True}, adamw={"lr": 1e-3})
    optimizer = SOAP(groups, lr=1e-2)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    assert [group["max_precond_dim"] for group in optimizer.param_groups] == [10000, 0]
    train(optimizer, model, 5)
    preconditioned = {name for name, p in model.named_parameters() if "Q_0" in optimizer.state[p]}
    assert preconditioned == {"conv.weight", "hidden.weight"}
    assert optimizer.state[model.hidden.weight]["refresh_step"].item() == 4


def test_refresh_happens_when_due_and_after_warm_up_whatever_the_frequency_says() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = SOAP([parameter], lr=0.1, adam_warmup_steps=3, precondition_frequency=10)
    seen = []
    for step in range(22):
        parameter.grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        seen.append(int(optimizer.state[parameter]["refresh_step"]))
    assert seen == [0] * 3 + [4] * 7 + [11] * 10 + [21] * 2


def test_a_tensor_without_gradient_signal_waits_for_it_with_its_first_basis() -> None:
    # A basis of a zero factor is an arbitrary one, and would last until the next refresh.
    waiting, moving = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    optimizer = SOAP([waiting, moving], lr=0.1, weight_decay=0.0, precondition_frequency=100)
    for step in range(4):
        moving.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        waiting.grad = torch.zeros(3, 4) if step < 2 else moving.grad.clone()
        optimizer.step()
    assert optimizer.state[moving]["refresh_step"].item() == 1
    assert optimizer.state[waiting]["refresh_step"].item() == 3
    factor, basis = optimizer.state[waiting]["GG_0"], optimizer.state[waiting]["Q_0"]
    assert not torch.equal(basis, torch.eye(3))
    assert factor.isfinite().all()


@pytest.mark.parametrize("weight_decay_method", ["decoupled", "independent", "l2"])
@pytest.mark.parametrize("warm", [0, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_nonfinite_gradient_leaves_that_tensor_untouched_and_is_counted(
    weight_decay_method: str, warm: int, bad: float
) -> None:
    options = {"lr": 0.1, "weight_decay": 0.1, "weight_decay_method": weight_decay_method, "use_kl_shampoo": warm > 0}
    parameters = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3, 4))]
    optimizer = SOAP(parameters, precondition_1d=True, eps=0.0 if warm == 0 else 1e-8, **options)

    def step(seed: int, spoil: bool = False) -> None:
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        if spoil:
            parameters[0].grad[1, 2] = bad
            parameters[1].grad[2] = bad
        optimizer.step()

    for seed in range(warm):
        step(seed)
    before = copy.deepcopy([[p.detach(), dict(optimizer.state[p])] for p in parameters])
    step(50, spoil=True)
    optimizer.param_groups[0]["eps"] = 1e-8  # eps = 0 makes NaN of later zero gradients, as in torch
    for p, (weight, state) in list(zip(parameters, before, strict=True))[:2]:
        assert torch.equal(p, weight)
        for key, value in state.items():
            if key not in COUNTERS:
                assert torch.equal(optimizer.state[p][key], value), key
    assert [int(optimizer.state[p]["skipped_steps"]) for p in parameters] == [1, 1, 0]
    assert [int(optimizer.state[p]["step"]) for p in parameters] == [warm + 1] * 3
    assert not torch.equal(parameters[2], before[2][0])
    for seed in range(60, 65):
        step(seed)
    assert all(p.isfinite().all() and int(optimizer.state[p]["refresh_step"]) == warm + 6 for p in parameters)
    assert all(value.isfinite().all() for p in parameters for value in optimizer.state[p].values())


def test_a_nonfinite_gradient_at_the_first_refresh_postpones_it() -> None:
    parameter = nn.Parameter(torch.ones(3, 4))
    optimizer = SOAP([parameter], lr=0.1, adam_warmup_steps=3, precondition_frequency=100)
    for seed in range(6):
        parameter.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        if seed == 3:
            parameter.grad[0, 0] = float("nan")
        optimizer.step()
    state = optimizer.state[parameter]
    assert int(state["refresh_step"]) == 5
    assert not torch.equal(state["Q_0"], torch.eye(3))


@pytest.mark.parametrize("eps", [1e-8, 1e-46])
def test_kl_factors_survive_an_eps_that_float32_cannot_hold(eps: float) -> None:
    parameter = nn.Parameter(torch.ones(6, 2))
    optimizer = SOAP([parameter], lr=0.1, use_kl_shampoo=True, eps=eps)
    for seed in range(10):
        parameter.grad = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    assert parameter.isfinite().all()
    with pytest.raises(ValueError, match="Invalid epsilon value: 0 .KL factors"):
        SOAP([parameter], lr=0.1, use_kl_shampoo=True, eps=0.0)


def test_nonfinite_raise_names_the_parameter_and_changes_nothing() -> None:
    model = new_model()
    optimizer = SOAP(model.named_parameters(), lr=0.1, nonfinite="raise")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.hidden.weight.grad[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"gradient of parameter 'hidden.weight' has NaN or Inf"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state


def test_nonfinite_propagate_is_torchs_behaviour() -> None:
    parameter = nn.Parameter(torch.ones(4))
    parameter.grad = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    SOAP([parameter], lr=0.1, nonfinite="propagate").step()
    assert parameter.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_a_sparse_or_complex_gradient_is_an_error_before_anything_changes(kind: str) -> None:
    dtype = torch.complex64 if kind == "complex" else torch.float32
    parameters = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3, dtype=dtype))]
    optimizer = SOAP(parameters, lr=0.1)
    grad = torch.eye(3, dtype=dtype)
    parameters[0].grad, parameters[1].grad = torch.eye(3), grad.to_sparse() if kind == "sparse" else grad
    message = f"{kind} gradients, got one for parameter 1 of its group, shape \\(3, 3\\)"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert torch.equal(parameters[0], torch.ones(3, 3))


@pytest.mark.parametrize("kept", [None, torch.bfloat16])
def test_at_frequency_one_the_first_moment_is_adams_own_until_the_frequency_is_another(
    kept: torch.dtype | None,
) -> None:
    weight = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    optimizer = SOAP([weight], lr=0.1, precondition_frequency=1, state_dtype=kept)
    average = torch.zeros(4, 6)
    for seed in range(8):
        weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        average.lerp_(weight.grad, 0.1)
        if seed == 6:
            optimizer.param_groups[0]["precondition_frequency"] = 5
        optimizer.step()
        state = optimizer.state[weight]
        outside = state["Q_0"].float() @ state["exp_avg"].float() @ state["Q_1"].float().T
        rounding = torch.finfo(kept or torch.float32).eps  # once per step, and of either basis
        torch.testing.assert_close(outside, average, rtol=0, atol=3 * (seed + 1) * rounding)


def test_a_parameter_without_gradient_keeps_its_own_clock() -> None:
    late, early = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    optimizer = SOAP([late, early], lr=0.1, adam_warmup_steps=2, precondition_frequency=3)
    for seed in range(9):
        early.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        late.grad = None if seed < 4 else torch.randn(3, 4, generator=torch.Generator().manual_seed(seed - 4))
        optimizer.step()
        if seed == 3:
            assert late not in optimizer.state
    alone = nn.Parameter(torch.ones(3, 4))
    control = SOAP([alone], lr=0.1, adam_warmup_steps=2, precondition_frequency=3)
    for seed in range(5):
        alone.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        control.step()
    assert torch.equal(late, alone)
    assert [int(optimizer.state[p]["step"]) for p in (late, early)] == [5, 9]


def test_a_frequency_below_one_is_an_error_before_anything_changes() -> None:
    first, second = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    first.grad, second.grad = torch.eye(3), torch.eye(3)
    groups = [{"params": [first]}, {"params": [second], "precondition_frequency": lambda step: 0}]
    optimizer = SOAP(groups, lr=0.1)
    optimizer.step()  # the first basis is due whatever the frequency says
    before = first.detach().clone()
    with pytest.raises(ValueError, match="precondition_frequency at step 1: 0"):
        optimizer.step()
    assert torch.equal(first, before)


def test_a_frequency_is_not_asked_where_it_decides_nothing() -> None:
    asked = []

    def frequency(step: int) -> int:
        asked.append(step)
        return step // 3  # 0 in the first steps

    matrix, vector = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))
    optimizer = SOAP([matrix, vector], lr=0.1, adam_warmup_steps=3, precondition_frequency=frequency)
    for seed in range(6):
        for p in (matrix, vector):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    assert set(asked) == {4, 5}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_precond_dim": 0}, RuntimeError, "state of parameter 0 .* cannot change after the first step"),
        ({"max_precond_dim": 3}, RuntimeError, "max_precond_dim, merge_dims, precondition_1d and pack_factors"),
        ({"merge_dims": True}, RuntimeError, "cannot change after the first step"),
        ({"pack_factors": True}, RuntimeError, "pack_factors now give; they cannot change after the first step"),
        ({"fp32_matmul_prec": "tf32"}, ValueError, "Invalid fp32_matmul_prec: 'tf32'"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ],
)
def test_an_option_changed_to_what_cannot_be_is_refused_before_anything_changes(
    change: dict, error: type[Exception], message: str
) -> None:
    parameters = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3, 4, 2))]
    optimizer = SOAP([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1)
    for p in parameters:
        p.grad = torch.ones(p.shape)
    optimizer.step()
    before = [p.detach().clone() for p in parameters]
    optimizer.param_groups[1].update(change)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert [int(optimizer.state[p]["step"]) for p in parameters] == [1, 1]


def test_the_counters_stay_on_the_cpu_whatever_the_default_device() -> None:
    parameter = nn.Parameter(torch.ones(3, 4))
    parameter.grad = torch.ones(3, 4)
    with torch.device("meta"):
        optimizer = SOAP([parameter], lr=0.1, max_precond_dim=0)
        optimizer.step()
        optimizer.step()
    assert {value.device.type for value in optimizer.state[parameter].values()} == {"cpu"}


class Products(TorchDispatchMode):
    """The precision at which matrices are multiplied, by the operands' last two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], tuple[int, ...], str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "matmul", "baddbmm", "addmm", "baddbmm_", "addmm_"):
            left, right = (tuple(t.shape[-2:]) for t in args[-2:])
            self.seen.append((left, right, torch.backends.mkldnn.matmul.fp32_precision))
        return func(*args, **(kwargs or {}))


def test_each_precision_option_governs_its_own_products() -> None:
    parameter = nn.Parameter(torch.ones(5, 7))
    optimizer = SOAP([parameter], lr=0.1, fp32_matmul_prec="medium", qr_fp32_matmul_prec="high", power_iter_steps=2)
    for seed in range(2):
        parameter.grad = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
        with Products() as products:
            optimizer.step()
    of_factors = [precision for left, right, precision in products.seen if left == right]
    of_gradients = {precision for left, right, precision in products.seen if left != right}
    assert of_factors == ["ieee", "tf32", "ieee", "tf32"]  # K Q of each axis: eigenvalues first, then a power step more
    assert of_gradients == {"bf16"}


def test_a_step_never_modifies_gradients_and_returns_the_closures_loss() -> None:
    parameter = nn.Parameter(torch.ones(3, 4))
    optimizer = SOAP([parameter], lr=0.1, weight_decay_method="l2", maximize=True)
    calls = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        calls.append(1)
        parameter.grad = torch.full((3, 4), 2.0)
        return 7.5

    assert optimizer.step(closure) == 7.5
    assert len(calls) == 1
    assert torch.equal(parameter.grad, torch.full((3, 4), 2.0))
    assert parameter.sum() > 12, "maximize goes up the gradient"


@pytest.mark.parametrize("lr", [torch.tensor(2.0**-4), torch.tensor([2.0**-4])])  # the same number in float32
def test_a_tensor_learning_rate_is_read_at_every_step(lr: Tensor) -> None:
    trajectories = []
    for rate in (2.0**-4, lr):
        model = new_model().double()
        optimizer = SOAP(model.parameters(), lr=rate, weight_decay=0.1)
        train(optimizer, model, 3)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.5 if isinstance(rate, float) else group["lr"].mul_(0.5)
        trajectories.append(train(optimizer, model, 3, start=3))
    assert trajectories[0] == pytest.approx(trajectories[1], rel=1e-5)


# --- options ------------------------------------------------------------------------------------------------------

INVALID = {
    "lr": [(-1.0, ValueError), (float("nan"), ValueError), ("x", TypeError), (torch.ones(2), ValueError)],
    "betas": [((0.9, 1.0), ValueError), ((-0.1, 0.9), ValueError), (0.9, ValueError), (("a", 0.9), TypeError)],
    "shampoo_beta": [(1.0, ValueError), (None, TypeError)],
    "eps": [(-1e-8, ValueError), (None, TypeError)],
    "weight_decay": [(-0.1, ValueError), ("x", TypeError)],
    "weight_decay_method": [("adamw", ValueError)],
    "use_nesterov": [(1, TypeError)],
    "precondition_frequency": [(0, ValueError), (2.0, TypeError), (True, TypeError)],
    "adam_warmup_steps": [(-1, ValueError), (1.5, TypeError)],
    "precondition_1d": [("yes", TypeError)],
    "correct_bias": [(None, TypeError)],
    "fp32_matmul_prec": [("tf32", ValueError)],
    "use_eigh": [(0, TypeError)],
    "qr_fp32_matmul_prec": [("low", ValueError)],
    "use_adaptive_criteria": [(0, TypeError)],
    "adaptive_update_tolerance": [(-1e-7, ValueError), (2.0, ValueError), (None, TypeError)],
    "power_iter_steps": [(0, ValueError), (1.0, TypeError)],
    "max_update_rms": [(-1.0, ValueError), ("x", TypeError)],
    "use_kl_shampoo": [("kl", TypeError)],
    "correct_shampoo_beta_bias": [(1, TypeError)],
    "maximize": [(None, TypeError)],
    "max_precond_dim": [(-1, ValueError), (1e4, TypeError)],
    "merge_dims": [(2, TypeError)],
    "second_moment_refresh": [("rotate", ValueError)],
    "nonfinite": [("ignore", ValueError)],
    "stagger_updates": [(1, TypeError)],
    "pack_factors": [(1, TypeError)],
    "state_dtype": [(torch.float16, ValueError), (torch.float64, ValueError), ("bfloat16", TypeError)],
}
CALLED = {"lr": "learning rate|Tensor lr", "betas": "beta", "eps": "epsilon"}


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [(name, value, error) for name, cases in INVALID.items() for value, error in cases],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_an_invalid_option_is_refused_in_the_constructor_and_in_groups(
    option: str, value: object, error: type[Exception]
) -> None:
    options = {"lr": 0.1} | {option: value}
    with pytest.raises(error, match=CALLED.get(option, option)):
        SOAP([nn.Parameter(torch.ones(2))], **options)
    optimizer = SOAP([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(error, match=CALLED.get(option, option)):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], option: value})
    assert len(optimizer.param_groups) == 1


def test_every_option_is_validated_and_lives_in_the_groups() -> None:
    optimizer = SOAP([nn.Parameter(torch.ones(2))], lr=0.1)
    assert set(INVALID) == set(optimizer.defaults) - {"differentiable"}
    assert set(INVALID) <= set(optimizer.param_groups[0])
    assert not set(INVALID) & set(vars(optimizer))


def test_modes_cover_every_option() -> None:
    used = set(itertools.chain.from_iterable(MODES.values()))
    untried = {"lr", "betas", "eps", "shampoo_beta", "correct_shampoo_beta_bias", "maximize"}
    assert set(INVALID) - used - untried == {"fp32_matmul_prec", "qr_fp32_matmul_prec"}


# --- no spikes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(24, 4), (128, 32), (1, 20), (4, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("mode", ["default", "kl", "eigh", "kronecker", "3 power steps", "warm-up", "nesterov"])
def test_no_step_is_larger_than_adams_largest_even_while_factors_have_low_rank(
    mode: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    # Adam's M**2 / V is bounded by Cauchy-Schwarz. Carried to new bases by rank alone the moments break the bound, and
    # steps of 1e4 to 1e6 times the learning rate followed.
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = SOAP([parameter], lr=1.0, weight_decay=0.0, **MODES[mode])
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        before = parameter.detach().clone()
        parameter.grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.step()
        rms = (parameter.detach() - before).square().mean().sqrt()
        assert rms < (1.5 if mode == "nesterov" else 1.17)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.95, 0.9), (0.9, 0.81), (0.0, 0.99), (0.9, 0.0)])
def test_the_floor_of_the_second_moment_is_below_it_in_a_fixed_basis(betas: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    exp_avg, exp_avg_sq = torch.zeros(100, dtype=torch.float64), torch.zeros(100, dtype=torch.float64)
    for updates in range(20):
        assert torch.allclose(raise_to_floor(exp_avg_sq, exp_avg, updates, betas), exp_avg_sq, rtol=1e-12, atol=0)
        grad = torch.randn(100, generator=generator, dtype=torch.float64) ** 3
        adam(grad, exp_avg, exp_avg_sq, 1, {"betas": betas, "eps": 1e-8, "correct_bias": False, "use_nesterov": False})


@pytest.mark.parametrize("betas", [(0.9, 0.3), (0.98, 0.95), (0.9, 0.95), (0.9, 0.81)])
def test_the_floor_stays_finite_for_a_million_steps(betas: tuple[float, float]) -> None:
    for updates in (1, 1_000, 65_190, 1_000_000):
        floor = raise_to_floor(torch.zeros(1), torch.ones(1), updates, betas)
        assert floor.isfinite().all()
        assert floor <= 1.01 * (1 - betas[1]) / (1 - betas[0]) ** 2  # what it is after one update


def test_the_floor_is_reached_by_the_gradients_that_make_cauchy_schwarz_an_equality() -> None:
    exp_avg, exp_avg_sq = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for k in range(8):
        grad = torch.tensor((0.95 / 0.9) ** k, dtype=torch.float64)
        options = {"betas": (0.9, 0.95), "eps": 1e-8, "correct_bias": False, "use_nesterov": False}
        adam(grad, exp_avg, exp_avg_sq, 1, options)
    floor = raise_to_floor(torch.zeros((), dtype=torch.float64), exp_avg, 8, (0.9, 0.95))
    torch.testing.assert_close(floor, exp_avg_sq)


def test_a_module_or_a_routing_instead_of_parameters_is_told_what_to_give() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(TypeError, match=r"params is a module, Sequential: give its parameters\(\) or"):
        SOAP(model, lr=0.1)
    with pytest.raises(TypeError, match=r"params is a Routing: give its param_groups\(\)"):
        SOAP(route_parameters(model), lr=0.1)


def test_the_top_level_has_the_optimizer_and_imports_no_torch_before_it_is_asked_for() -> None:
    look = "import sys, emerging_optimizers as e; assert 'torch' not in sys.modules\n"
    look += "from emerging_optimizers import SOAP\n"
    look += "from emerging_optimizers.soap import SOAP as same; assert SOAP is same; e.nothing"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=False)
    assert done.stderr.endswith("AttributeError: module 'emerging_optimizers' has no attribute 'nothing'\n")


@pytest.mark.parametrize(
    ("key", "meant"),
    [("precondition_freqency", "precondition_frequency"), ("weight_deacy", "weight_decay"), ("beta", "betas")],
)
def test_a_misspelt_option_of_a_group_is_said(key: str, meant: str, caplog: pytest.LogCaptureFixture) -> None:
    optimizer = SOAP([{"params": [nn.Parameter(torch.ones(2, 2))], key: 1}], lr=0.1)
    assert (
        f"A parameter group has {key!r}, which is no option and has no effect. Did you mean {meant!r}?" in caplog.text
    )
    caplog.clear()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], key: 1})
    assert repr(meant) in caplog.text


def test_entries_of_a_group_that_are_somebody_elses_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    theirs = {"name": "decoder", "lr_scale": 2.0, "initial_lr": 0.1, "is_bias": False, "layer": 3}
    optimizer = SOAP([{"params": [("w", parameter)], **theirs}], lr=0.1, stagger_updates=True)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    SOAP(optimizer.param_groups, lr=0.1)  # with what the scheduler and the optimizer have added
    assert not caplog.text
    assert optimizer.param_groups[0]["lr_scale"] == 2.0
