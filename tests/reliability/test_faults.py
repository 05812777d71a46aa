"""No failure of a matrix decomposition stops a run or poisons it: failures planted in every routine that can fail."""

import ast
import copy
import itertools
import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import emerging_optimizers
from emerging_optimizers.soap import SOAP, incidents
from emerging_optimizers.soap.linalg import eigenvectors, orthonormal_columns
from emerging_optimizers.soap.soap import update_eigenbasis_and_momentum
from emerging_optimizers.soap.soap_utils import get_eigenbasis_eigh, get_eigenbasis_qr
from tests.algorithm.test_soap import COUNTERS, MODES, Everything, new_model, train

#: Every decomposition that the package calls in soap/linalg.py, which these tests make fail; where torch has it, what
#: calls it, and the incidents' name.
ROUTINES = {
    "eigh": (torch.linalg, eigenvectors, "eigh"),
    "geqrf": (torch, orthonormal_columns, "qr"),
    "householder_product": (torch.linalg, orthonormal_columns, "qr"),
}
#: What only reads a state, and goes on with the diagonal where it fails; and what times them on matrices of its own.
READERS = {("health/measure.py", "eigvalsh"), *(("plan/calibration.py", name) for name in list(ROUTINES)[1:])}
#: torch.linalg's functions that accept any matrix.
CANNOT_FAIL = {"vector_norm", "matrix_norm", "norm", "diagonal", "matmul", "multi_dot", "cross", "vecdot"}
DECOMPOSITIONS = (
    {name for name in dir(torch.linalg) if not name.startswith("_")}
    | {"geqrf", "orgqr", "ormqr", "lobpcg", "svd_lowrank", "pca_lowrank", "cholesky_inverse", "cholesky_solve", "lu"}
    | {"triangular_solve", "lu_solve", "logdet", "slogdet", "pinverse", "inverse"}
) - CANNOT_FAIL


def call_sites(source: str) -> set[str]:
    """The decompositions that a module's source names as an attribute of anything or imports."""
    tree = ast.parse(source)
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imports = {name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names}
    return (attributes | imports) & DECOMPOSITIONS


def test_every_call_of_a_decomposition_is_known_here() -> None:
    package = Path(emerging_optimizers.__file__).parent
    found = {
        (path.relative_to(package).as_posix(), name)
        for path in package.rglob("*.py")
        for name in call_sites(path.read_text(encoding="utf-8"))
    }
    assert found == {("soap/linalg.py", name) for name in ROUTINES} | READERS


@pytest.mark.parametrize(
    "source",
    [
        "torch.linalg.cholesky_ex(matrix)",
        "matrix.qr()",
        "from torch.linalg import svd",
        "method = torch.linalg.solve_triangular",
        "torch.lobpcg(matrix)",
    ],
)
def test_a_new_call_would_be_seen(source: str) -> None:
    assert call_sites(source)
    assert not call_sites("torch.linalg.vector_norm(matrix) + torch.bmm(matrix, matrix)")


FAILURES: dict[str, Callable[[], Exception] | float] = {
    "LinAlgError": lambda: torch.linalg.LinAlgError("planted"),
    "RuntimeError": lambda: RuntimeError("cusolver error: planted"),
    "OutOfMemoryError": lambda: torch.OutOfMemoryError("planted"),
    "NaN": float("nan"),
    "Inf": float("inf"),
}


class Fault:
    """Makes a routine fail in the calls that ``fails`` chooses by their number, from 0, and their matrix."""

    def __init__(self, routine: str, failure: str, fails: Callable[[int, Tensor], bool]) -> None:
        self.module, self.name = ROUTINES[routine][0], routine
        self.real, self.failure, self.fails = getattr(self.module, routine), FAILURES[failure], fails
        self.calls = self.planted = 0

    def plant(self, patch: pytest.MonkeyPatch) -> "Fault":
        patch.setattr(self.module, self.name, self)
        return self

    def __call__(self, matrices: Tensor, *arguments: object, **options: object) -> object:
        number, self.calls = self.calls, self.calls + 1
        if not self.fails(number, matrices):
            return self.real(matrices, *arguments, **options)
        self.planted += 1
        if callable(self.failure):
            raise self.failure()
        result = self.real(matrices, *arguments, **options)
        if isinstance(result, Tensor):
            return result.fill_(self.failure)
        return type(result)([part.fill_(self.failure) for part in result])


def always(*_: object) -> bool:
    return True


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The incidents of one test."""
    counter = type(incidents.incidents)()
    monkeypatch.setattr(incidents, "incidents", counter)
    return counter


def random_factors(count: int, d: int, seed: int = 0) -> Tensor:
    roots = torch.randn(count, d, 2 * d, generator=torch.Generator().manual_seed(seed))
    return roots @ roots.mT / d


# --- the rescue -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failing_calls", "kind"),
    # For a stack of two: the stack, then for each matrix alone, float64, CPU.
    [({0}, ""), ({0, 1}, "float64"), ({0, 1, 2}, "cpu"), ({0, 1, 2, 3}, "kept")],
)
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("routine", ROUTINES)
def test_a_failing_routine_is_retried_alone_in_float64_on_the_cpu_and_then_the_last_good_stays(
    routine: str,
    failure: str,
    failing_calls: set[int],
    kind: str,
    counted: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, decompose, name = ROUTINES[routine]
    matrices, last_good = random_factors(2, 5), eigenvectors(random_factors(2, 5, seed=1), random_factors(2, 5))[0]
    expected, _ = decompose(matrices, last_good)
    fault = Fault(routine, failure, lambda call, _: call in failing_calls).plant(monkeypatch)
    with caplog.at_level(logging.WARNING):
        result, failed = decompose(matrices, last_good)
    assert fault.planted == len(failing_calls)
    assert failed.tolist() == [kind == "kept", False]
    torch.testing.assert_close(result[0].abs(), (last_good if kind == "kept" else expected)[0].abs())
    torch.testing.assert_close(result[1].abs(), expected[1].abs())
    assert result.dtype == matrices.dtype
    assert dict(counted) == ({f"{name} {kind}": 1} if kind else {})
    assert len(caplog.records) == bool(kind)


@pytest.mark.parametrize("decompose", [eigenvectors, orthonormal_columns])
def test_no_memory_for_a_retry_is_one_more_failure(decompose: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("planted")

    matrices, last_good = random_factors(1, 4), torch.eye(4).expand(1, 4, 4)
    for module, name in ((torch.linalg, "eigh"), (torch, "geqrf"), (Tensor, "to")):
        monkeypatch.setattr(module, name, no_memory)
    result, failed = decompose(matrices, last_good)
    assert failed.tolist() == [True]
    assert torch.equal(result, last_good)


@pytest.mark.parametrize("decompose", [eigenvectors, orthonormal_columns])
def test_a_matrix_with_nan_keeps_its_basis_and_leaves_its_neighbour_alone(decompose: Callable) -> None:
    matrices, last_good = random_factors(2, 4), torch.eye(4).expand(2, 4, 4)
    expected, _ = decompose(matrices, last_good)
    matrices[0, 2, 1] = float("nan")
    result, failed = decompose(matrices, last_good)
    assert failed.tolist() == [True, False]
    assert torch.equal(result[0], torch.eye(4))
    torch.testing.assert_close(result[1].abs(), expected[1].abs())


def test_each_kind_is_told_once_and_counted_always(
    counted: dict[str, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Fault("eigh", "LinAlgError", always).plant(monkeypatch)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            (basis,) = get_eigenbasis_eigh([random_factors(1, 4)[0]])
    assert torch.equal(basis, torch.eye(4))
    assert dict(counted) == {"eigh kept": 3}
    assert ["eigh" in record.getMessage() for record in caplog.records] == [True]


# --- a refresh ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power_iter_steps", [1, 2])
def test_a_failed_iteration_carries_the_moments_with_the_reordered_old_basis(
    power_iter_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The old basis may come back with its columns in another order; then both moments must have that order too.
    (factor,), (basis,) = random_factors(1, 4), get_eigenbasis_eigh([random_factors(1, 4, seed=7)[0]])
    before = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    Fault("geqrf", "LinAlgError", always).plant(monkeypatch)
    lists = [factor, torch.empty(0)], [basis, torch.empty(0)]
    (new, _), momentum, exp_avg_sq = update_eigenbasis_and_momentum(
        *lists, before.square(), before.clone(), power_iter_steps=power_iter_steps
    )
    order = (new.mT @ basis).round().int()
    assert order.abs().sum() == 4
    assert not torch.equal(order, torch.eye(4).int())
    torch.testing.assert_close(new @ momentum, basis @ before)
    torch.testing.assert_close(exp_avg_sq, momentum.square())


def test_a_failure_in_a_later_power_step_keeps_the_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    (factor,), (basis,) = random_factors(1, 4), get_eigenbasis_eigh([random_factors(1, 4, seed=7)[0]])
    lists = [factor, torch.empty(0)], [basis, torch.empty(0)]
    once, _ = get_eigenbasis_qr(*lists, torch.ones(4, 3))
    Fault("geqrf", "LinAlgError", lambda call, _: call > 0).plant(monkeypatch)
    twice, _ = get_eigenbasis_qr(*lists, torch.ones(4, 3), power_iter_steps=2)
    assert torch.equal(twice[0], once[0])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("routine", "mode"), [("eigh", "eigh"), ("geqrf", "default")])
def test_a_failed_refresh_is_counted_in_the_state_of_its_tensor_alone(
    routine: str, mode: str, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5, 6))]
    optimizer = SOAP(parameters, lr=0.1, **MODES[mode])
    for step in range(4):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        before = copy.deepcopy(optimizer.state[parameters[1]])
        with monkeypatch.context() as patch:
            if step in (1, 2):
                Fault(routine, "LinAlgError", lambda _, matrices: matrices.shape[-1] == 5 + axis).plant(patch)
            optimizer.step()
        if step in (1, 2):
            state = optimizer.state[parameters[1]]
            kept, changed = (state[f"Q_{k}"].mT @ before[f"Q_{k}"] for k in (axis, 1 - axis))
            torch.testing.assert_close(kept.abs().sum(0), torch.ones(5 + axis))  # the same columns, in some order
            assert not torch.allclose(changed.abs().sum(0), torch.ones(6 - axis))  # the other axis was refreshed
    assert [int(optimizer.state[p]["failed_refreshes"]) for p in parameters] == [0, 2]


# --- a run ----------------------------------------------------------------------------------------------------------


def train_with_faults(
    mode: str, routine: str, failure: str, fails: Callable[[int, Tensor], bool]
) -> tuple[Everything, SOAP, list[float], Fault]:
    model = new_model()
    optimizer = SOAP(model.parameters(), **{"lr": 3e-2, **MODES[mode], "precondition_frequency": 2})
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(routine, failure, fails).plant(patch)
        losses = train(optimizer, model, 60)
    return model, optimizer, losses, fault


@pytest.mark.parametrize("failure", ["LinAlgError", "NaN"])
@pytest.mark.parametrize("mode", ["default", "kl", "eigh", "warm-up", "1-D", "merged", "kronecker", "3 power steps"])
@pytest.mark.parametrize("routine", ROUTINES)
def test_a_run_with_failures_in_half_of_the_calls_goes_on_and_recovers(routine: str, mode: str, failure: str) -> None:
    rng = random.Random(0)
    chosen = [rng.random() < 0.5 for _ in range(10_000)]
    model, optimizer, losses, fault = train_with_faults(mode, routine, failure, lambda call, _: chosen[call])
    if fault.calls > 20:  # eigh runs once per matrix in the modes that iterate
        assert fault.planted > 5
    after = train(optimizer, model, 40, start=60)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert sum(after[-10:]) < 0.6 * sum(losses[:10])
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("mode", ["default", "kl", "eigh", "adaptive"])
@pytest.mark.parametrize("routine", ROUTINES)
def test_a_routine_that_never_works_leaves_a_run_that_trains(routine: str, mode: str, counted: dict[str, int]) -> None:
    model, optimizer, losses, fault = train_with_faults(mode, routine, "LinAlgError", always)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert all(p.isfinite().all() for p in model.parameters())
    failed = sum(int(state.get("failed_refreshes", 0)) for state in optimizer.state.values())
    assert (failed > 0) == (fault.planted > 0) == (counted[f"{ROUTINES[routine][2]} kept"] > 0)


# --- gradients that cannot be used ----------------------------------------------------------------------------------

SPOILED = {"gradient with NaN": float("nan"), "gradient with Inf": float("-inf"), "gradient overflows": 1e30}


def test_skipped_gradients_are_told_once_per_kind_with_the_parameters_name(
    counted: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    model = new_model()
    optimizer = SOAP(model.named_parameters(), lr=1e-2)
    with caplog.at_level(logging.WARNING):
        for value, _ in itertools.product(SPOILED.values(), range(2)):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            model.hidden.weight.grad[1, 2] = value
            optimizer.step()
    assert dict(counted) == dict.fromkeys(SPOILED, 2)
    says = ["parameter 'hidden.weight' has NaN", "parameter 'hidden.weight' has Inf", "'hidden.weight' overflows when"]
    assert len(caplog.records) == 3
    assert all(text in record.getMessage() for text, record in zip(says, caplog.records, strict=True))
    assert int(optimizer.state[model.hidden.weight]["skipped_steps"]) == 6


def test_kl_factors_are_not_poisoned_by_a_gradient_far_outside_of_their_history() -> None:
    parameter = nn.Parameter(torch.ones(6, 4))
    optimizer = SOAP([parameter], lr=1e-3, use_kl_shampoo=True)
    for step in range(30):
        scale = 1e17 if step == 10 else 1e-6
        parameter.grad = scale * torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        assert all(v.isfinite().all() for k, v in optimizer.state[parameter].items() if k not in COUNTERS)
    assert parameter.isfinite().all()
