"""Health: the measurements against a direct float64 computation, planted faults, and silence where nothing is wrong."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from emerging_optimizers.health import Health, HealthMonitor, TensorHealth, concern, examine
from emerging_optimizers.health.diagnosis import threshold_rows
from emerging_optimizers.lab.race.optimizers import tuned_rate
from emerging_optimizers.lab.race.race import learning_rate_factor
from emerging_optimizers.lab.tasks import make_task
from emerging_optimizers.routing import route_parameters
from emerging_optimizers.soap import SOAP


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(steps: int = 25, shapes: Any = ((6, 4), (5,)), seed: int = 0, grads: Any = None, **options: Any) -> SOAP:
    """An optimizer after some steps on random gradients, with the parameters named a, b, .."""
    generator = torch.Generator().manual_seed(seed)
    dtype = options.pop("dtype", torch.float32)
    named = [
        ("abcdef"[i], nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)))
        for i, shape in enumerate(shapes)
    ]
    optimizer = SOAP(named, **{"lr": 1e-2, "precondition_frequency": 10, **options})
    for step in range(steps):
        for _, parameter in named:
            made = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            parameter.grad = made if grads is None else grads(step, parameter, made)
        optimizer.step()
    return optimizer


def parameter(optimizer: SOAP, place: int = 0) -> Tensor:
    return [p for group in optimizer.param_groups for p in group["params"]][place]


def kinds(health: Health) -> set[tuple[str, str]]:
    return {(finding.kind, finding.name) for finding in health.findings}


def state_bytes(optimizer: SOAP) -> list[bytes]:
    values = [v for state in optimizer.state.values() for v in state.values()]
    return [v.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for v in values if v.numel()]


# measurements


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_measurement_equals_a_direct_float64_computation(dtype: torch.dtype) -> None:
    optimizer = trained(steps=27, dtype=dtype, precondition_frequency=10)
    weight = parameter(optimizer)
    state = {key: value.double() for key, value in optimizer.state[weight].items()}
    found, quick = (examine(optimizer, exact_spectra=exact).tensors[0] for exact in (True, False))
    close = {"rel": 2e-4 if dtype == torch.float32 else 1e-9}

    assert (found.name, found.shape, found.step, found.age) == ("a", (6, 4), 27, 6)
    assert found.frequency == 10
    assert found.periods == 0.6
    for factor in found.factors:
        k, q = state[f"GG_{factor.axis}"], state[f"Q_{factor.axis}"]
        rotated = q.T @ k @ q
        off = rotated - rotated.diagonal().diag()
        eigenvalues = torch.linalg.eigvalsh(k).flip(0)
        p = eigenvalues / eigenvalues.sum()
        assert factor.size == k.shape[0]
        assert factor.orthogonality == pytest.approx((q.T @ q - torch.eye(factor.size)).abs().max().item(), abs=5e-7)
        assert factor.residual == pytest.approx((off.norm() / k.norm()).item(), **close)
        assert factor.effective_rank == pytest.approx(math.exp(-(p * p.log()).sum().item()), **close)
        assert factor.condition == pytest.approx((eigenvalues[0] / eigenvalues[-1]).item(), rel=1e-2)
        assert factor.spectrum == pytest.approx(eigenvalues.tolist(), rel=1e-3)
        assert factor.dead_share == 0
        # Rayleigh quotients stand in for the spectrum where it is not asked for.
        quotients = rotated.diagonal().sort(descending=True).values.tolist()
        assert quick.factors[factor.axis].spectrum == pytest.approx(quotients, rel=1e-4)
    assert found.weight_rms == pytest.approx(weight.double().square().mean().sqrt().item(), **close)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"correct_bias": False},
        {"max_update_rms": 0.1},
        {"max_precond_dim": 0},
        {"eps": 0.1},
        {"merge_dims": True},
        {"precondition_frequency": 1},
    ],
)
def test_the_update_rms_is_that_of_the_last_step(options: dict[str, Any]) -> None:
    optimizer = trained(steps=14, shapes=((6, 4, 3),), weight_decay=0.0, dtype=torch.float64, **options)
    weight = parameter(optimizer)
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    optimizer.step()
    moved = (weight.detach() - before).square().mean().sqrt().item()
    found = examine(optimizer).tensors[0]
    assert found.update_rms == pytest.approx(moved, rel=1e-5)
    assert found.update_ratio == pytest.approx(moved / (found.weight_rms or 0), rel=1e-5)


def test_a_gradient_of_rank_one_has_effective_rank_one_and_the_largest_condition() -> None:
    optimizer = trained(grads=lambda step, p, made: torch.ones_like(p))
    for factor in examine(optimizer).tensors[0].factors:
        assert factor.effective_rank == pytest.approx(1.0, abs=1e-3)
        assert factor.condition is not None
        assert 1e5 < factor.condition <= 1 / torch.finfo(torch.float32).eps


def test_indices_without_a_gradient_are_the_dead_share() -> None:
    def dead_rows(step: int, p: Tensor, made: Tensor) -> Tensor:
        return made * (torch.arange(p.shape[0]) >= 3).view(-1, *[1] * (p.dim() - 1))

    found = examine(trained(grads=dead_rows)).tensors[0]
    assert [factor.dead_share for factor in found.factors] == [0.5, 0.0]


@pytest.mark.parametrize("scale", [1e-18, 1e15])
def test_the_scale_of_the_gradient_changes_no_ratio(scale: float) -> None:
    plain = examine(trained(eps=0.0)).tensors[0]
    scaled = examine(trained(eps=0.0, grads=lambda step, p, made: scale * made)).tensors[0]
    for a, b in zip(plain.factors, scaled.factors, strict=True):
        assert (a.residual, a.effective_rank, a.condition) == pytest.approx(
            (b.residual, b.effective_rank, b.condition), rel=1e-2
        )


def test_packed_factors_and_16_bit_bases_are_measured_as_what_they_stand_for() -> None:
    plain, packed = examine(trained()), examine(trained(pack_factors=True))
    for a, b in zip(plain.tensors[0].factors, packed.tensors[0].factors, strict=True):
        assert a.residual == pytest.approx(b.residual, rel=1e-3)
        assert a.spectrum == pytest.approx(b.spectrum, rel=1e-3)
    rounded = examine(trained(state_dtype=torch.bfloat16, steps=120))
    factor = rounded.tensors[0].factors[0]
    assert factor.basis_dtype == "bfloat16"
    assert factor.orthogonality is not None
    assert 1e-4 < factor.orthogonality < 2**-7
    assert rounded.findings == ()


def test_one_sided_warming_up_routed_and_empty_tensors_have_what_can_be_known() -> None:
    (one_sided,) = examine(trained(shapes=((6, 4),), max_precond_dim=5)).tensors
    assert [factor.axis for factor in one_sided.factors] == [1]
    (warming,) = examine(trained(shapes=((6, 4),), adam_warmup_steps=100)).tensors
    assert warming.age is None
    assert [(f.orthogonality, f.residual) for f in warming.factors] == [(None, None)] * 2
    assert all(f.effective_rank is not None for f in warming.factors)
    (routed,) = examine(trained(shapes=((6, 4),), max_precond_dim=0)).tensors
    assert not routed.preconditioned
    assert routed.update_rms is not None
    assert routed.frequency is None
    empty = examine(trained(shapes=((0, 4), ())))
    assert [tensor.direction_rms is None for tensor in empty.tensors] == [True, False]
    assert empty.findings == ()


def test_parameters_without_a_state_or_on_another_process_are_named_and_not_measured() -> None:
    optimizer = trained(steps=1)
    late = nn.Parameter(torch.ones(3, 3))
    optimizer.add_param_group({"params": [("late", late)]})
    state = optimizer.state[parameter(optimizer)]
    for key in state:
        if key != "step":  # as emerging_optimizers.soap.state.init_elsewhere leaves it
            state[key] = torch.zeros(0, dtype=state[key].dtype)
    health = examine(optimizer)
    assert health.elsewhere == ("a",)
    assert health.waiting == ("late",)
    assert late not in optimizer.state
    assert [tensor.name for tensor in health.tensors] == ["b"]


def test_a_frequency_that_is_a_callable_is_known_live_and_not_when_saved() -> None:
    optimizer = trained(precondition_frequency=lambda step: 5)
    assert examine(optimizer).tensors[0].frequency == 5
    assert examine(optimizer.state_dict()).tensors[0].frequency is None


MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "kl": {"use_kl_shampoo": True},
    "packed": {"pack_factors": True, "state_dtype": torch.bfloat16},
    "merged": {"merge_dims": True, "precondition_1d": True},
    "float64": {"dtype": torch.float64},
    "staggered": {"stagger_updates": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_state_gives_what_the_live_optimizer_gives(mode: str, tmp_path: Any) -> None:
    optimizer = trained(shapes=((6, 4), (5,), (3, 2, 4)), **MODES[mode])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    weights = dict(zip("abc", (p.detach() for p in optimizer.param_groups[0]["params"]), strict=True))
    assert examine(saved, weights=weights).tensors == examine(optimizer).tensors
    without = examine(saved).tensors
    assert all(tensor.weight_rms is None and tensor.update_rms is not None for tensor in without)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_written(mode: str) -> None:
    optimizer = trained(shapes=((6, 4), (5,), (3, 2, 4)), **MODES[mode])
    parameters = optimizer.param_groups[0]["params"]
    before = state_bytes(optimizer)
    weights = copy.deepcopy([(p, p.grad) for p in parameters])
    versions = [v._version for state in optimizer.state.values() for v in state.values()]
    for exact in (True, False):
        examine(optimizer, exact_spectra=exact)
    HealthMonitor(optimizer, every=1)()
    assert state_bytes(optimizer) == before
    assert [v._version for state in optimizer.state.values() for v in state.values()] == versions
    for p, (weight, grad) in zip(parameters, weights, strict=True):
        assert torch.equal(p, weight)
        assert torch.equal(p.grad, grad)


def test_autocast_changes_nothing() -> None:
    optimizer = trained(shapes=((40, 30),))
    plain = examine(optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        assert examine(optimizer).tensors == plain.tensors


class Operations(TorchDispatchMode):
    """Which operations ran, and at which precision of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
        self.seen.append((func.__name__, precision))
        return func(*args, **(kwargs or {}))


def test_products_are_at_full_precision_whatever_the_optimizers_are() -> None:
    optimizer = trained(fp32_matmul_prec="medium")
    with Operations() as operations:
        examine(optimizer)
    assert {precision for name, precision in operations.seen if "mm" in name} == {"ieee"}


def test_everything_is_json() -> None:
    optimizer = trained(grads=lambda step, p, made: 0 * made)
    optimizer.state[parameter(optimizer)]["exp_avg"].fill_(math.nan)
    text = json.dumps(examine(optimizer).to_dict(), allow_nan=False)
    assert json.loads(text)["tensors"][0]["finite"] is False


# what is wrong


def test_the_page_has_the_thresholds() -> None:
    page = (Path(__file__).parents[2] / "docs" / "health.md").read_text(encoding="utf-8")
    assert "\n".join(f"| {' | '.join(row)} |" for row in threshold_rows()) in page


def turning(step: int, p: Tensor, made: Tensor) -> Tensor:
    """Gradients of about rank one, whose direction has turned by a right angle after 130 steps."""
    angle = step / 130 * math.pi / 2
    here, there = torch.ones(p.shape[0]), torch.ones(p.shape[0])
    there[::2] = -1.0
    along = math.cos(angle) * here + math.sin(angle) * there
    return along.view(-1, *[1] * (p.dim() - 1)) * made.abs() + 0.05 * made


def test_a_basis_that_a_frozen_refresh_left_behind_is_stale() -> None:
    frozen = examine(trained(steps=130, grads=turning, precondition_frequency=10**9))
    assert kinds(frozen) == {("stale basis", "a")}
    (finding,) = [f for f in frozen.findings if "axis 0" in f.what]
    assert "lower precondition_frequency (now 1000000000)" in finding.advice
    assert "129 steps after the last refresh" in finding.what
    refreshed = examine(trained(steps=130, grads=turning, precondition_frequency=5))
    assert refreshed.findings == ()


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}, {"dtype": torch.float64}])
def test_a_basis_that_was_corrupted_is_not_orthogonal(options: dict[str, Any]) -> None:
    optimizer = trained(**options)
    assert examine(optimizer).findings == ()
    basis = optimizer.state[parameter(optimizer)]["Q_1"]
    basis[0, 0] += 0.1 if options.get("state_dtype") else 0.001
    health = examine(optimizer)
    assert kinds(health) == {("basis not orthogonal", "a")}
    assert "axis 1" in health.findings[0].what
    assert "earlier checkpoint" in health.findings[0].advice


def test_a_gradient_that_was_always_zero_is_dead_once_it_had_time_to_live() -> None:
    def second_is_dead(step: int, p: Tensor, made: Tensor) -> Tensor:
        return made if p.dim() == 2 else 0 * made

    assert examine(trained(steps=5, grads=second_is_dead)).findings == ()
    assert kinds(examine(trained(grads=second_is_dead))) == {("dead gradient", "b")}
    dead_matrix = examine(trained(grads=lambda step, p, made: 0 * made))
    assert kinds(dead_matrix) == {("dead gradient", "a"), ("dead gradient", "b")}
    assert dead_matrix.tensors[0].factors[0].dead_share == 1
    assert "25 steps" in dead_matrix.findings[0].what


def test_a_gradient_that_stopped_is_told_for_matrices() -> None:
    stopped = examine(trained(steps=400, grads=lambda step, p, made: made if step < 100 else 0 * made))
    assert ("gradient stopped", "a") in kinds(stopped)
    assert ("gradient stopped", "b") not in kinds(stopped)


def test_many_skipped_steps_are_told_and_a_few_are_not() -> None:
    def sometimes(every: int) -> Callable[[int, Tensor, Tensor], Tensor]:
        return lambda step, p, made: made * (math.nan if step % every == every - 1 else 1)

    for every, told in {1: "30 of 30", 5: "6 of 30"}.items():
        many = examine(trained(steps=30, grads=sometimes(every)))
        assert {kind for kind, _ in kinds(many)} == {"skipped steps"}
        assert told in many.findings[0].what
    assert examine(trained(steps=30, grads=sometimes(12))).findings == ()


def test_refreshes_that_failed_or_are_overdue_are_told() -> None:
    optimizer = trained()
    state = optimizer.state[parameter(optimizer)]
    state["failed_refreshes"].fill_(2)
    state["refresh_step"].fill_(1)
    assert kinds(examine(optimizer)) == {("failed refreshes", "a"), ("refresh overdue", "a")}


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "GG_0", "Q_1"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_that_is_not_finite_is_told(key: str, value: float) -> None:
    optimizer = trained()
    optimizer.state[parameter(optimizer)][key].view(-1)[1] = value
    health = examine(optimizer)
    assert kinds(health) == {("state not finite", "a")}
    assert concern(health.tensors[0]) > concern(health.tensors[1])
    assert health.worst_first[0].name == "a"


def test_updates_that_are_far_too_large_or_lost_in_rounding_are_told() -> None:
    optimizer = trained()
    parameter(optimizer).data.mul_(1e-6)
    assert kinds(examine(optimizer)) == {("update too large", "a")}
    tiny = trained(dtype=torch.bfloat16, lr=1e-7)
    assert {kind for kind, _ in kinds(examine(tiny))} == {"update lost in rounding"}
    optimizer = trained()
    optimizer.state[parameter(optimizer)]["exp_avg_sq"].mul_(1e-10)
    assert kinds(examine(optimizer)) == {("second moment too small", "a")}


HEALTHY = [
    ("digits", 0, {}),
    ("digits", 1, {"second_moment_refresh": "kronecker"}),
    ("pinn", 0, {"pack_factors": True, "state_dtype": torch.bfloat16}),
    ("pinn", 2, {"use_kl_shampoo": True}),
    ("digits", 2, {"precondition_frequency": 1, "stagger_updates": True}),
]


@pytest.mark.parametrize(("task_name", "seed", "options"), HEALTHY)
def test_healthy_races_are_quiet(
    task_name: str, seed: int, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    steps = 160
    task = make_task(task_name, seed, {})
    torch.manual_seed(seed)
    model = task.model()
    kind = "kl-soap" if "use_kl_shampoo" in options else "soap-kronecker" if len(options) == 1 else "soap"
    rate = tuned_rate(task_name, kind)
    optimizer = SOAP(
        route_parameters(model).param_groups(), rate, (0.9, 0.95), **{"precondition_frequency": 10, **options}
    )
    monitor = HealthMonitor(optimizer, every=20)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * learning_rate_factor(step, steps)
        optimizer.zero_grad()
        task.loss(model, task.batch(step)).backward()
        optimizer.step()
        monitor()
    assert monitor.health is not None
    assert monitor.health.step == steps
    assert monitor.health.findings == ()
    assert [r.message for r in caplog.records if r.name.startswith("emerging_optimizers.health")] == []


# names and mistakes


def test_names_come_from_the_model_the_groups_or_the_place() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = SOAP(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()

    def names(source: Any, **arguments: Any) -> list[str]:
        return [tensor.name for tensor in examine(source, **arguments).tensors]

    assert names(optimizer)[1] == "parameter 1"
    assert names(optimizer, names=model.named_parameters())[1] == "0.bias"
    assert names(optimizer.state_dict(), names=["p", "q", "r", "s"]) == ["p", "q", "r", "s"]
    by_name = optimizer.state_dict()  # as torch.distributed.checkpoint's state dicts have it
    by_name["state"] = {"w": by_name["state"][0]}
    by_name["param_groups"][0]["params"] = ["w"]
    assert names(by_name) == ["w"]


@pytest.mark.parametrize(
    ("call", "arguments", "error", "words"),
    [
        (examine, {"names": ["one"]}, ValueError, "names must have one name per parameter, 2, got 1"),
        (examine, {"names": [3, 4]}, TypeError, "names must be strings"),
        (examine, {"source": 3}, TypeError, "source must be a SOAP optimizer or its state dict, got int"),
        (examine, {"source": {}}, ValueError, "'param_groups'"),
        (examine, {"source": {"state": {}, "param_groups": [3]}}, ValueError, "parameter group 0"),
        (examine, {"source": torch.optim.AdamW([torch.ones(1)])}, ValueError, "source must be SOAP's: .* 0 has no"),
        (HealthMonitor, {"every": 0}, ValueError, "every must be an integer >= 1, got 0"),
        (HealthMonitor, {"every": 2.5}, TypeError, "every must be an integer >= 1, got 2.5"),
        (HealthMonitor, {"log": 3}, TypeError, "log must be a callable"),
        (HealthMonitor, {"names": ["one"]}, ValueError, "names must have one name per parameter"),
        (HealthMonitor, {"optimizer": 3}, TypeError, "optimizer must be a SOAP optimizer, got int"),
        (HealthMonitor, {"optimizer": torch.optim.AdamW([torch.ones(1)])}, ValueError, "must be SOAP's"),
    ],
)
def test_a_wrong_argument_is_named(call: Any, arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    source = "source" if call is examine else "optimizer"
    with pytest.raises(error, match=words):
        call(**{source: trained(steps=1), **arguments})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("Q_0", torch.ones(2, 3), r"the state 'Q_0' of a must have shape \(6, 6\), got \(2, 3\)"),
        ("GG_1", torch.ones(3), r"the state 'GG_1' of a must have shape \(10,\), got \(3,\)"),
        ("exp_avg_sq", torch.ones(2), "the state 'exp_avg_sq' of a must have shape"),
        ("exp_avg", None, "the state 'exp_avg' of a must be a dense tensor of real numbers, got nothing"),
        ("exp_avg", torch.ones(6, 4, dtype=torch.int64), "got torch.int64"),
        ("step", torch.ones(2), "the state 'step' of a must be a whole number"),
    ],
)
def test_a_damaged_state_is_an_error_that_names_the_tensor(key: str, value: Any, words: str) -> None:
    state_dict = trained(steps=3).state_dict()
    state_dict["state"][0] = {**state_dict["state"][0], key: value}
    with pytest.raises(ValueError, match=words):
        examine(state_dict)


# the monitor


def test_the_monitor_logs_every_n_steps_to_a_callable_or_a_writer_and_as_a_hook() -> None:
    optimizer = trained(steps=1)
    logged: list[tuple[str, float, int]] = []
    written: list[tuple[str, float, int]] = []
    writer = SimpleNamespace(add_scalar=lambda *given: written.append(given))
    by_hand = HealthMonitor(optimizer, every=4, log=lambda *given: logged.append(given))
    hooked = HealthMonitor(optimizer, every=4, log=writer)
    optimizer.register_step_post_hook(hooked)
    for _ in range(8):
        optimizer.step()
        by_hand.step()
    assert {step for *_, step in logged} == {5, 9}
    assert written == logged
    assert all(type(value) is float and math.isfinite(value) for _, value, _ in logged)
    tags = {name for name, *_ in logged}
    assert {"health/a/residual_0", "health/a/effective_rank_1", "health/b/update_ratio", "health/findings"} <= tags
    found = examine(optimizer, exact_spectra=False).tensors[0]
    assert ("health/a/residual_0", found.factors[0].residual, 9) in logged


def test_a_call_that_does_not_log_runs_no_tensor_operation() -> None:
    monitor = HealthMonitor(trained(), every=5)
    with Operations() as operations:
        for _ in range(4):
            monitor()
        assert operations.seen == []
        assert monitor.health is None
        monitor()
    assert len(operations.seen) > 10


def test_the_monitor_warns_once_per_kind_and_tensor(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = trained(grads=lambda step, p, made: 0 * made)
    monitor = HealthMonitor(optimizer, every=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            monitor()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "a: dead gradient: every gradient of 25 steps was zero" in caplog.text
    optimizer.state[parameter(optimizer)]["failed_refreshes"].fill_(1)
    optimizer.state[parameter(optimizer)]["exp_avg_sq"].fill_(1.0)
    monitor()
    monitor()
    told = [" ".join(record.message.split(": ")[1:3]) for record in caplog.records]
    assert told == ["a dead gradient", "b dead gradient", "a gradient stopped", "a failed refreshes"]


def test_the_worst_comes_first() -> None:
    optimizer = trained(shapes=((6, 4), (5, 5), (3, 3)))
    optimizer.state[parameter(optimizer, 1)]["Q_0"][0, 0] += 0.5
    health = examine(optimizer)
    ordered: list[TensorHealth] = health.worst_first
    assert ordered[0].name == "b"
    assert [concern(tensor) for tensor in ordered] == sorted(map(concern, ordered), reverse=True)
