"""The precision of float32 products, who computes them, and that neither setting leaks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers import precision
from emerging_optimizers.precision import (
    add_matrix_product_,
    fp32_matmul_precision,
    matrix_product,
    move_towards_product_,
)
from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.decompositions import orthonormal_columns

LARGE = torch.empty(1, precision.ONEDNN_FROM, 8)


def current() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU where oneDNN is the faster one, wherever the tests run."""
    monkeypatch.setattr(precision, "_onednn_is_faster_and_exact", lambda: True)


def test_an_inherited_precision_is_not_pinned() -> None:
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        with fp32_matmul_precision("highest"):
            pass
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_matmul_precision_is_restored_also_after_an_error(precision: str) -> None:
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    inside = {"highest": ["ieee", "ieee"], "high": ["tf32", "tf32"], "medium": ["tf32", "bf16"]}[precision]
    seen = []

    def fail_inside() -> None:
        with fp32_matmul_precision(precision):
            seen.extend(switch.fp32_precision for switch in switches)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert seen == inside
    assert [switch.fp32_precision for switch in switches] == before
    with pytest.raises(ValueError, match="Invalid matmul precision: 'tf32'"), fp32_matmul_precision("tf32"):
        pass


@pytest.mark.parametrize(
    ("operand", "inside"),
    [
        (LARGE, "bf16"),
        (LARGE.mT, "bf16"),
        (LARGE[:, 1:], "ieee"),
        (LARGE.to("meta"), "ieee"),
        (torch.empty(10_000), "ieee"),
        (None, "ieee"),
    ],
    ids=["large", "wide", "small", "elsewhere", "vector", "none"],
)
@pytest.mark.usefixtures("on_amd")
def test_large_products_go_to_onednn_on_an_amd_cpu(operand: Tensor | None, inside: str) -> None:
    before = current()
    with fp32_matmul_precision("highest", operand):
        assert current() == inside
    assert current() == before


@pytest.mark.usefixtures("on_amd")
def test_a_step_hands_its_large_products_to_onednn_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, set[str]] = {}

    def recorded(real: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def record(left: Tensor, right: Tensor) -> Tensor:
            seen.setdefault(max(*left.shape, *right.shape), set()).add(current())
            return real(left, right)

        return record

    for name in ("mm", "bmm"):
        monkeypatch.setattr(torch, name, recorded(getattr(torch, name)))
    monkeypatch.setattr(precision, "ONEDNN_FROM", 12)
    parameters = [nn.Parameter(torch.zeros(12, 3)), nn.Parameter(torch.zeros(11, 2))]
    optimizer = SOAP(parameters, lr=0.1, fp32_matmul_prec="highest", precondition_frequency=1)
    for seed in range(2):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    assert seen == {12: {"bf16"}, 11: {"ieee"}, 3: {"ieee"}, 2: {"ieee"}}  # the last two are factors on their own


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.usefixtures("on_amd")
def test_onednn_need_not_compile_a_kernel_for_every_step(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does for every ``beta`` of a product that is added to a tensor, and bias correction changes it every step."""
    monkeypatch.setattr(precision, "ONEDNN_FROM", 12)
    monkeypatch.setattr(precision, "ALONE_FROM", 12 if alone else 100)
    seen = []

    def recorded(name: str) -> None:
        real = getattr(Tensor, name)

        def record(self: Tensor, *operands: Tensor, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
            seen.append((name, current(), beta))
            return real(self, *operands, beta=beta, alpha=alpha)

        monkeypatch.setattr(Tensor, name, record)

    recorded("addmm_")
    recorded("baddbmm_")
    parameter = nn.Parameter(torch.zeros(14, 12))
    optimizer = SOAP([parameter], lr=0.1, fp32_matmul_prec="highest", precondition_frequency=10)
    for seed in range(3):
        parameter.grad = torch.randn(14, 12, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    if alone:
        assert set(seen) == {("addmm_", "bf16", 1.0)}
    else:
        assert {(name, setting) for name, setting, _ in seen} == {("baddbmm_", "ieee")}
        assert len({beta for *_, beta in seen}) == 3


@pytest.mark.parametrize("faster", [True, False])
def test_only_what_was_handed_to_onednn_is_taken_back(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "medium" asks for bfloat16, and where the CPU has units for it, oneDNN must go on getting these products."""
    monkeypatch.setattr(precision, "_onednn_is_faster_and_exact", lambda: faster)
    with fp32_matmul_precision("medium"):
        with precision._without_onednn():
            assert current() == ("ieee" if faster else "bf16")
        assert current() == "bf16"
    with fp32_matmul_precision("highest"), precision._without_onednn():
        assert current() == "ieee"


@pytest.mark.usefixtures("on_amd")
def test_what_is_taken_back_from_onednn_is_not_pinned() -> None:
    before = torch.backends.mkldnn.fp32_precision
    try:
        torch.backends.mkldnn.fp32_precision = "bf16"  # by the user, for all of oneDNN
        with precision._without_onednn():
            assert current() == "ieee"
        assert current() == "bf16"
        torch.backends.mkldnn.fp32_precision = "ieee"
        assert current() == "ieee"
    finally:
        torch.backends.mkldnn.fp32_precision = before


@pytest.mark.parametrize("operand", [LARGE, None], ids=["large", "small"])
@pytest.mark.parametrize("name", ["highest", "high"])
def test_products_are_float32_whoever_computes_them(name: str, operand: Tensor | None) -> None:
    """On this machine as it is. bfloat16 would be wrong by 1e-3, TensorFloat-32 by 1e-4."""
    if any(torch.cpu.get_capabilities().get(unit) for unit in precision.AMX) and name == "high":
        pytest.skip('this CPU has matrix units, which "high" may use')
    for shape in [(2048, 96, 64), (130, 1024, 700), (1000, 1000, 1000)]:
        m, n, k = shape
        left, right = torch.rand(1, m, k), torch.rand(1, k, n)
        exact = left.double() @ right.double()
        with fp32_matmul_precision(name, operand):
            several = [matrix_product(left, right), matrix_product(left.mT.contiguous().mT, right)]
            several += [matrix_product(left.expand(2, -1, -1), right.expand(2, -1, -1))[1:]]
        for one in several:
            assert ((one - exact).abs() / exact).max() < 2e-6


CAPABLE = {"cpu_name": "AMD EPYC", "avx512_f": True, "amx_tile": False}


@pytest.mark.parametrize(
    ("facts", "product", "expected"),
    [
        (CAPABLE, lambda a, b: a.matmul(b), True),
        ({**CAPABLE, "cpu_name": "INTEL(R) XEON(R)"}, lambda a, b: a.matmul(b), False),
        ({**CAPABLE, "amx_tile": True}, lambda a, b: a.matmul(b), False),
        ({}, lambda a, b: a.matmul(b), False),
        (CAPABLE, lambda a, b: (a.bfloat16().float()).matmul(b.bfloat16().float()), False),
        (CAPABLE, lambda a, b: (a.bfloat16().float()).matmul(b) if len(a) > 500 else a.matmul(b), False),
    ],
    ids=["amd", "intel", "amx", "unknown", "rounds", "rounds-some"],
)
def test_onednn_is_taken_only_where_it_is_faster_and_does_not_round(
    facts: dict[str, object],
    product: Callable[[Tensor, Tensor], Tensor],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: facts)
    monkeypatch.setattr(Tensor, "__matmul__", product)
    before = current()
    with torch.autocast("cpu"):  # as a step may be
        assert precision._onednn_is_faster_and_exact.__wrapped__() is expected
    assert current() == before


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own, of entering `flags`
def test_nothing_is_tried_while_onednn_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(precision, "_onednn_is_faster_and_exact", lambda: asked.append(current()) or True)
    with torch.backends.mkldnn.flags(enabled=False), fp32_matmul_precision("highest", LARGE):
        assert current() == "ieee"
    assert not asked  # the answer is kept for the process, and would have been MKL's
    with fp32_matmul_precision("highest", LARGE):
        assert current() == "bf16"
    assert asked


def test_a_torch_that_does_not_know_its_cpu_stays_with_its_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert precision._onednn_is_faster_and_exact.__wrapped__() is False


@pytest.mark.parametrize("large", [3, 100])
@pytest.mark.parametrize("count", [1, 3])
def test_products_of_one_matrix_and_of_stacks_are_bmm_and_baddbmm(
    count: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "ALONE_FROM", large)
    stack = torch.randn(count, 9, 8)
    left, right, target = stack[:, 1:5, :3], stack[:, 2:5, 2:8], stack[:, 3:7, 2:8].clone()
    torch.testing.assert_close(matrix_product(left, right), torch.bmm(left, right))
    expected = torch.baddbmm(target, left, right, alpha=-2.0)
    add_matrix_product_(target, left, right, alpha=-2.0)
    torch.testing.assert_close(target, expected)


@pytest.mark.parametrize("handed_on", [False, True])
@pytest.mark.parametrize("of", ["a stack", "a stack's parts", "a matrix"])
def test_a_target_moves_towards_a_product(of: str, handed_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_is_handed_on", lambda: handed_on)
    stack = torch.randn(3, 9, 8)
    left, right, target = stack[:, 1:5, :3], stack[:, 2:5, 2:8], stack[:, 3:7, 2:8].clone()
    expected = 0.75 * target + 0.25 * left @ right
    whole = torch.zeros(3, 5, 7)
    if of == "a matrix":
        left, right, target, expected = left[0], right[0], target[0], expected[0]
    elif of == "a stack's parts":
        target = whole[:, 1:, :6].copy_(target)
    move_towards_product_(target, left, right, 0.25)
    torch.testing.assert_close(target, expected)
    if of == "a stack's parts":
        assert not whole[:, 0].any()
        assert not whole[..., 6].any()


@pytest.mark.parametrize("size", [512, 1100])
def test_a_qr_is_never_at_reduced_precision(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products on a CPU would follow ``fp32_matmul_prec``, and cost orthogonality where the CPU can do bfloat16."""
    monkeypatch.setattr(precision, "_onednn_is_faster_and_exact", lambda: False)
    seen = set()
    real = torch.geqrf

    def geqrf(matrix: Tensor) -> tuple[Tensor, Tensor]:
        seen.add(current())
        return real(matrix)

    monkeypatch.setattr(torch, "geqrf", geqrf)
    matrix = torch.randn(1, size, size)
    with fp32_matmul_precision("medium"):
        basis, failed = orthonormal_columns(matrix, matrix)
    assert seen == {"ieee"}
    assert not failed.any()
    assert (basis[0].T @ basis[0] - torch.eye(size)).abs().max() < 1e-5
