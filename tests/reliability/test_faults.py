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
from torch import Tensor

import emerging_optimizers
from emerging_optimizers.soap import SOAP, incidents, state
from emerging_optimizers.soap.linalg import eigenvectors, orthonormal_columns, refresh_bases
from emerging_optimizers.soap.refresh import refresh_eigenbasis_and_moments
from emerging_optimizers.soap.soap_utils import get_eigenbasis_eigh
from tests.unit.test_soap import COUNTERS, MODES, Everything, new_model, train

#: Every place of the package that calls a decomposition, and with it every place where these tests plant failures.
CALL_SITES = {
    ("soap/decompositions.py", "eigh"): (torch.linalg, eigenvectors, "eigh"),
    ("soap/decompositions.py", "geqrf"): (torch, orthonormal_columns, "qr"),
    ("soap/decompositions.py", "householder_product"): (torch.linalg, orthonormal_columns, "qr"),
}
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


#: What only reads a state, and goes on with the diagonal where it fails.
READERS = {("health/measure.py", "eigvalsh")}


def test_every_call_of_a_decomposition_is_known_here() -> None:
    package = Path(emerging_optimizers.__file__).parent
    found = {
        (path.relative_to(package).as_posix(), name)
        for path in package.rglob("*.py")
        for name in call_sites(path.read_text(encoding="utf-8"))
    }
    assert found == set(CALL_SITES) | READERS


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
    """Makes a routine fail in the calls that ``fails`` chooses by their number, from 0."""

    def __init__(self, real: Callable, failure: str, fails: Callable[[int], bool]) -> None:
        self.real, self.failure, self.fails = real, FAILURES[failure], fails
        self.calls = self.planted = 0

    def __call__(self, *arguments: Tensor, **options: object) -> object:
        number, self.calls = self.calls, self.calls + 1
        if not self.fails(number):
            return self.real(*arguments, **options)
        self.planted += 1
        if callable(self.failure):
            raise self.failure()
        result = self.real(*arguments, **options)
        if isinstance(result, Tensor):
            return result.fill_(self.failure)
        return type(result)([part.fill_(self.failure) for part in result])


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The incidents of one test."""
    counter = type(incidents.incidents)()
    monkeypatch.setattr(incidents, "incidents", counter)
    return counter


def random_factors(count: int, d: int, seed: int = 0) -> Tensor:
    roots = torch.randn(count, d, 2 * d, generator=torch.Generator().manual_seed(seed))
    return roots @ roots.mT / d


@pytest.mark.parametrize(
    ("failing_calls", "kind"),
    # For a stack of two: the stack, then for each matrix alone, float64, CPU.
    [({0}, ""), ({0, 1}, "float64"), ({0, 1, 2}, "cpu"), ({0, 1, 2, 3}, "kept")],
)
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("site", CALL_SITES, ids=lambda site: site[1])
def test_a_failing_routine_is_retried_alone_in_float64_on_the_cpu_and_then_the_last_good_stays(
    site: tuple[str, str],
    failure: str,
    failing_calls: set[int],
    kind: str,
    counted: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, decompose, name = CALL_SITES[site]
    matrices, last_good = random_factors(2, 5), eigenvectors(random_factors(2, 5, seed=1), random_factors(2, 5))[0]
    expected, _ = decompose(matrices, last_good)
    fault = Fault(getattr(module, site[1]), failure, lambda call: call in failing_calls)
    monkeypatch.setattr(module, site[1], fault)
    with caplog.at_level(logging.WARNING):
        result, kept = decompose(matrices, last_good)
    assert fault.planted == len(failing_calls)
    assert kept.tolist() == [kind == "kept", False]
    torch.testing.assert_close(result[0].abs(), (last_good if kind == "kept" else expected)[0].abs())
    torch.testing.assert_close(result[1].abs(), expected[1].abs())
    assert result.dtype == matrices.dtype
    assert dict(counted) == ({f"{name} {kind}": 1} if kind else {})
    assert [kind in record.getMessage() or "stays" in record.getMessage() for record in caplog.records if kind] == (
        [True] if kind else []
    )


@pytest.mark.parametrize("decompose", [eigenvectors, orthonormal_columns])
def test_no_memory_for_a_retry_is_one_more_failure(decompose: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("planted")

    matrices, last_good = random_factors(1, 4), torch.eye(4).expand(1, 4, 4)
    monkeypatch.setattr(torch.linalg, "eigh", no_memory)
    monkeypatch.setattr(torch, "geqrf", no_memory)
    monkeypatch.setattr(Tensor, "to", no_memory)
    result, kept = decompose(matrices, last_good)
    assert kept.tolist() == [True]
    assert torch.equal(result, last_good)


def test_each_kind_is_told_once_and_counted_always(
    counted: dict[str, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("planted")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            (basis,) = get_eigenbasis_eigh([random_factors(1, 4)[0]])
    assert torch.equal(basis, torch.eye(4))
    assert dict(counted) == {"eigh kept": 3}
    assert [record.getMessage() for record in caplog.records] == [
        "eigh of a 4 x 4 Kronecker factor on cpu failed and failed in float64 and on the CPU too; the last good basis "
        "stays. Further cases are counted, not logged."
    ]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("decompose", [eigenvectors, orthonormal_columns])
def test_a_matrix_with_nan_keeps_its_basis_and_leaves_its_neighbour_alone(
    decompose: Callable, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "masks_on", lambda device: masks)
    matrices, last_good = random_factors(2, 4), torch.eye(4).expand(2, 4, 4)
    expected, _ = decompose(matrices, last_good)
    matrices[0, 2, 1] = float("nan")
    result, kept = decompose(matrices, last_good)
    assert kept.tolist() == [True, False]
    assert torch.equal(result[0], torch.eye(4))
    torch.testing.assert_close(result[1].abs(), expected[1].abs())


@pytest.mark.parametrize("power_iter_steps", [1, 2])
def test_a_failed_iteration_carries_the_moments_with_the_reordered_old_basis(
    power_iter_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The old basis may come back with its columns in another order; then both moments must have that order too.
    factors, moment = [random_factors(1, 4), None], torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(3))
    basis = eigenvectors(random_factors(1, 4, seed=7), torch.eye(4))[0]
    monkeypatch.setattr(torch, "geqrf", Fault(torch.geqrf, "LinAlgError", lambda call: True))
    refreshed = refresh_eigenbasis_and_moments(
        factors, [basis, None], moment, moment.square(), power_iter_steps=power_iter_steps
    )
    order = (refreshed.bases[0].mT @ basis)[0].round().int()
    assert order.abs().sum() == 4
    assert not torch.equal(order, torch.eye(4).int())
    torch.testing.assert_close(refreshed.bases[0] @ refreshed.exp_avg, basis @ moment)
    torch.testing.assert_close(refreshed.exp_avg_sq, refreshed.exp_avg.square())
    assert refreshed.failed.tolist() == [True]


def test_a_failure_in_a_later_power_step_keeps_the_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    factors, basis = random_factors(1, 4), eigenvectors(random_factors(1, 4, seed=7), torch.eye(4))[0]
    once = refresh_bases(factors, basis)
    fault = Fault(torch.geqrf, "LinAlgError", lambda call: call > 0)
    monkeypatch.setattr(torch, "geqrf", fault)
    twice = refresh_bases(factors, basis, power_iter_steps=2)
    assert torch.equal(twice.bases, once.bases)
    assert torch.equal(twice.order, once.order)
    assert twice.failed.tolist() == [True]


def train_with_faults(
    mode: str, site: tuple[str, str], failure: str, fails: Callable[[int], bool], steps: int = 60
) -> tuple[Everything, SOAP, list[float], Fault]:
    model = new_model()
    optimizer = SOAP(model.parameters(), **{"lr": 3e-2, **MODES[mode], "precondition_frequency": 2})
    module = CALL_SITES[site][0]
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(getattr(module, site[1]), failure, fails)
        patch.setattr(module, site[1], fault)
        losses = train(optimizer, model, steps)
    return model, optimizer, losses, fault


@pytest.mark.parametrize("failure", ["LinAlgError", "NaN"])
@pytest.mark.parametrize(
    ("site", "mode"),
    [
        (site, mode)
        for site in CALL_SITES
        for mode in ["default", "kl", "eigh", "warm-up", "1-D", "merged", "kronecker", "3 power steps"]
        if site[1] != "solve_triangular" or mode in ("default", "3 power steps")  # slow on small matrices
    ],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_a_run_with_failures_in_half_of_the_calls_goes_on_and_recovers(
    site: tuple[str, str], failure: str, mode: str
) -> None:
    rng = random.Random(0)
    chosen = [rng.random() < 0.5 for _ in range(10_000)]
    model, optimizer, losses, fault = train_with_faults(mode, site, failure, lambda call: chosen[call])
    if fault.calls > 20:  # eigh runs once per matrix in the modes that iterate
        assert fault.planted > 5
    after = train(optimizer, model, 40, start=60)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert sum(after[-10:]) <= 1.1 * sum(losses[-10:])  # which at this rate no longer falls by itself on every CPU
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("mode", ["default", "kl", "eigh", "adaptive"])
@pytest.mark.parametrize("site", CALL_SITES, ids=lambda site: site[1])
def test_a_routine_that_never_works_leaves_a_run_that_trains(site: tuple[str, str], mode: str) -> None:
    model, optimizer, losses, fault = train_with_faults(mode, site, "LinAlgError", lambda call: True)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert all(p.isfinite().all() for p in model.parameters())
    failed = sum(int(state.get("failed_refreshes", 0)) for state in optimizer.state.values())
    assert (failed > 0) == (fault.planted > 0)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("name", "mode"), [("eigh", "eigh"), ("geqrf", "default")])
def test_a_failed_refresh_is_counted_in_the_state_of_its_tensor_alone(
    name: str, mode: str, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = {"eigh": torch.linalg, "geqrf": torch}[name]
    parameters = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(5, 6))]
    optimizer = SOAP(parameters, lr=0.1, **MODES[mode])
    real = getattr(module, name)

    def fail_for_one_axis(matrices: Tensor) -> object:
        if matrices.shape[-1] == 5 + axis:
            raise torch.linalg.LinAlgError("planted")
        return real(matrices)

    for step in range(4):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        with monkeypatch.context() as patch:
            if step in (1, 2):
                patch.setattr(module, name, fail_for_one_axis)
                before = copy.deepcopy(optimizer.state[parameters[1]])
            optimizer.step()
        if step in (1, 2):
            state = optimizer.state[parameters[1]]
            kept, changed = (state[f"Q_{k}"].mT @ before[f"Q_{k}"] for k in (axis, 1 - axis))
            torch.testing.assert_close(kept.abs().sum(0), torch.ones(5 + axis))  # the same columns, in some order
            assert not torch.allclose(changed.abs().sum(0), torch.ones(6 - axis))  # the other axis was refreshed
    assert [int(optimizer.state[p]["failed_refreshes"]) for p in parameters] == [0, 2]


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


def test_skips_that_only_the_device_knows_of_are_told_at_a_later_step(
    counted: dict[str, int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emerging_optimizers.soap.state.masks_on", lambda device: True)
    monkeypatch.setattr(incidents, "_skips", {})
    parameters = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(4))]
    optimizer = SOAP(parameters, lr=0.1)
    seen = []
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            for p in parameters:
                p.grad = torch.ones_like(p)
                if step in (1, 2):
                    p.grad.view(-1)[0] = float("nan")
            optimizer.step()
            seen.append((sum(counted.values()), len(caplog.records)))
    assert seen == [(0, 0), (0, 0), (2, 1), (4, 1), (4, 1)]
    assert "2 gradients on cpu had NaN or Inf or overflowed when squared" in caplog.text
    counted.clear()  # who empties the public counter must not be told of old skips again
    optimizer.step()
    optimizer.step()
    assert not counted
    assert [int(optimizer.state[p]["skipped_steps"]) for p in parameters] == [2, 2]


def test_kl_factors_are_not_poisoned_by_a_gradient_far_outside_of_their_history() -> None:
    parameter = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = SOAP([parameter], lr=1e-3, use_kl_shampoo=True)
    for step in range(30):
        scale = 1e17 if step == 10 else 1e-6
        parameter.grad = scale * torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        assert all(v.isfinite().all() for k, v in optimizer.state[parameter].items() if k not in COUNTERS)
    assert parameter.isfinite().all()
