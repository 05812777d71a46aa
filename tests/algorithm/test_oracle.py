"""SOAP equals the float64 oracle over 30 steps, over a pairwise design of all options.

Which basis a factor has is not always determined: in the null space of a rank-deficient factor (a tall matrix's,
early on) any orthonormal basis will do, and two correct implementations choose differently. Tolerances stay as they
are; instead the oracle then goes on with the optimizer's basis, after checking that it is a valid result of the
refresh: it is orthonormal, and it diagonalises the optimizer's factor (``eigh``) or makes ``Q^T K Q_before`` upper
triangular (QR). In float64 this happens only where the factor's spectrum leaves the basis open (under 2% of the
refreshes); everywhere else the oracle's own basis is used. In float32 it happens at every refresh, since an
eigenvector moves by roundoff / gap, which is no error of the optimizer. The factors themselves are compared too.
"""

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.due import refresh_offsets
from emerging_optimizers.soap.state import layout_for, unpack
from tests.algorithm.pairwise import all_pairs, covered_pairs, pairwise_design
from tests.oracle import OracleSOAP, preconditioned_axes, working_shape

STEPS = 30
LR = 0.05
GAP = {torch.float64: 1e-9, torch.float32: 1e-4}
# Where the second moment is still zero, as in a null space, U' = G' / (|G'| + eps) turns roundoff in G' into
# roundoff / eps. So eps stays above it here; the default eps has its own test, on factors of full rank.
EPS = {torch.float64: 1e-4, torch.float32: 1e-2}
OPEN_BASIS = 1e-6  # relative eigenvalue (or, for eigh, eigenvalue gap) under which a float64 basis counts as open
# The oracle's own basis, from which the next one is made, may be a rounding over that gap from the optimizer's. In
# float32 the oracle always goes on with the optimizer's: ten rows, each rounded in a product and a decomposition, in up
# to three power steps, on either side of Q^T K Q.
BASIS_ERROR = {torch.float64: 10 * torch.finfo(torch.float64).eps / OPEN_BASIS}
BASIS_ERROR[torch.float32] = 10 * 2 * 3 * 2 * torch.finfo(torch.float32).eps

SHAPES = {
    "0-D": (),
    "1-D": (6,),
    "2-D tall": (9, 4),
    "2-D wide": (4, 10),
    "3-D": (3, 5, 4),
    "4-D": (5, 3, 2, 2),
    "5-D": (3, 2, 2, 3, 2),
}
ONE_AXIS_BELOW = {"0-D": 4, "1-D": 5, "2-D tall": 5, "2-D wide": 5, "3-D": 4, "4-D": 4, "5-D": 2}


def shrinking_frequency(t: int) -> int:
    """Every second step at first, every fifth later."""
    return 2 if t < 13 else 5  # t = 12 is due, and would not be if it were called with t + 1


LEVELS = {
    "shape": ["1-D", "2-D tall", "2-D wide", "3-D", "4-D"],
    "path": ["qr 1", "qr 3", "eigh"],
    "use_kl_shampoo": [False, True],
    "use_nesterov": [False, True],
    "bias": [(True, None), (False, None), (True, False), (False, True)],
    "weight_decay_method": ["decoupled", "independent", "l2"],
    "adam_warmup_steps": [0, 3],
    "precondition_frequency": [1, 4, shrinking_frequency],
    "max_update_rms": [0.0, 0.3],
    "precondition_1d": [False, True],
    "use_adaptive_criteria": [False, True],
    "axis_limit": ["none", "below"],
    "merge_dims": [False, True],
    "maximize": [False, True],
    "second_moment_refresh": ["rank", "kronecker"],
    "stagger_updates": [False, True],
    "pack_factors": [False, True],
}
MATTERS_TO_ADAM = [
    "shape",
    "use_nesterov",
    "bias",
    "weight_decay_method",
    "max_update_rms",
    "precondition_1d",
    "axis_limit",
    "maximize",
]


def live_factors(row: Mapping[str, int]) -> Sequence[str]:
    """What matters in a row: folding needs axes to fold, and a 1-D tensor that is plain AdamW exercises little else."""
    shape = LEVELS["shape"][row["shape"]]
    below = LEVELS["axis_limit"][row["axis_limit"]] == "below"
    if shape == "1-D" and (below or not LEVELS["precondition_1d"][row["precondition_1d"]]):
        return MATTERS_TO_ADAM
    folds = shape == "4-D" or (shape == "3-D" and not below)
    return [name for name in LEVELS if name != "merge_dims" or folds]


NOTHING_TO_FOLD = {frozenset([("shape", i), ("merge_dims", j)]) for i in range(3) for j in range(2)}
WANTED = all_pairs(LEVELS) - NOTHING_TO_FOLD
DESIGN = pairwise_design(LEVELS, live_factors, WANTED)
CASES = [{name: LEVELS[name][level] for name, level in row.items()} for row in DESIGN]


def options_of(case: Mapping) -> dict:
    """The options that SOAP and the oracle both take."""
    same = [
        "use_kl_shampoo",
        "use_nesterov",
        "weight_decay_method",
        "adam_warmup_steps",
        "precondition_frequency",
        "max_update_rms",
        "precondition_1d",
        "use_adaptive_criteria",
        "merge_dims",
        "maximize",
        "second_moment_refresh",
        "stagger_updates",
        "pack_factors",
    ]
    correct_bias, correct_shampoo_beta_bias = case["bias"]
    return {name: case[name] for name in same} | {
        "lr": LR,
        "weight_decay": 0.02,
        "betas": (0.9, 0.95),
        "shampoo_beta": 0.9,
        "use_eigh": case["path"] == "eigh",
        "power_iter_steps": 3 if case["path"] == "qr 3" else 1,
        "adaptive_update_tolerance": 0.005,
        "correct_bias": correct_bias,
        "correct_shampoo_beta_bias": correct_shampoo_beta_bias,
        "max_precond_dim": ONE_AXIS_BELOW[case["shape"]] if case["axis_limit"] == "below" else 10000,
    }


def case_id(case: Mapping) -> str:
    """Short, and unique within the design."""
    words = [case["shape"], case["path"], case["weight_decay_method"], f"warm-up {case['adam_warmup_steps']}"]
    words += [f"frequency {getattr(case['precondition_frequency'], '__name__', case['precondition_frequency'])}"]
    words += ["bias " + "".join(str(flag)[0] for flag in case["bias"])]
    words += [name for name in LEVELS if case[name] is True]
    words += [case["second_moment_refresh"]]
    words += ["clip"] * (case["max_update_rms"] > 0) + ["limit"] * (case["axis_limit"] == "below")
    return ", ".join(words)


def anisotropic_gradients(shapes: Sequence[tuple[int, ...]], seed: int) -> list[list[Tensor]]:
    """Noise with a well-separated spectrum in a random basis along every axis, and a swinging drift.

    Of RMS about one, and exact in float32.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    gradients: list[list[Tensor]] = []
    for shape in shapes:
        drift = normal(*shape)
        colours = []
        for d in shape:
            left, right = torch.linalg.qr(normal(d, d)).Q, torch.linalg.qr(normal(d, d)).Q
            spectrum = torch.logspace(0, -1, d, dtype=torch.float64)
            colours.append(left * (spectrum / spectrum.square().mean().sqrt()) @ right)
        series = []
        for t in range(STEPS):
            g = normal(*shape)
            for colour in colours:  # each turn colours the first axis and moves it to the end
                g = torch.tensordot(g, colour, dims=([0], [0]))
            g = g + 0.4 * torch.sin(torch.tensor(0.3 * t + 1.0)) * drift
            series.append(g.to(torch.float32).to(torch.float64))
        gradients.append(series)
    return [list(step) for step in zip(*gradients, strict=True)]


def starting_weights(shapes: Sequence[tuple[int, ...]], seed: int = 7) -> list[Tensor]:
    """Random, float32-exact."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(torch.float64) for shape in shapes]


def assert_valid_basis(
    basis: Tensor, factor: Tensor, before: Tensor | None, use_eigh: bool, power_iter_steps: int, error: float
) -> None:
    """The basis is one of those that the refresh may return for this factor."""
    factor = factor / torch.linalg.norm(factor)
    eye = torch.eye(len(basis), dtype=torch.float64)
    assert (basis.T @ basis - eye).abs().max() <= error, "the basis is not orthonormal"
    if use_eigh or before is None:
        rotated = basis.T @ factor @ basis
        lam = torch.diagonal(rotated)
        assert (rotated - torch.diag(lam)).abs().max() <= error, "the basis does not diagonalise the factor"
        assert (lam.diff() <= error).all(), "the eigenvalues do not descend"
    else:
        for _ in range(power_iter_steps - 1):
            before, _ = torch.linalg.qr(factor @ before)
        triangle = basis.T @ factor @ before
        assert triangle.tril(-1).abs().max() <= error, "the basis is not the Q of qr(K Q)"


class Pair:
    """The optimizer and the oracle, stepped together on the same gradients."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        options: Mapping,
        dtype: torch.dtype,
        eps: float | None = None,
        with_nan: bool = False,
    ) -> None:
        self.options = dict(options) | {"eps": EPS[dtype] if eps is None else eps}
        self.dtype = dtype
        start = starting_weights(shapes)
        self.start = start
        self.params = [torch.nn.Parameter(w.to(dtype)) for w in start]
        self.spoiled = [torch.nn.Parameter(torch.zeros(shapes[0], dtype=dtype))] if with_nan else []
        for p in self.spoiled:
            p.grad = torch.full_like(p, math.nan)
        self.soap = SOAP(
            self.params + self.spoiled, fp32_matmul_prec="highest", qr_fp32_matmul_prec="highest", **self.options
        )
        self.oracle = OracleSOAP(start, adopt_basis=self.adopt, place=self.place, **self.options)

    def place(self, index: int, axis: int, frequency: int) -> int:
        """Where in the period the optimizer refreshes: which place it is has a test of its own."""
        layouts = tuple(layout_for(p, self.soap.param_groups[0]) for p in self.params + self.spoiled)
        return refresh_offsets(layouts, frequency)[index][layouts[index].axes.index(axis)]

    def adopt(self, index: int, axis: int, factor: Tensor, before: Tensor | None, own: Tensor) -> Tensor:
        """The oracle's own basis where it is determined, else the optimizer's once it is seen to be valid."""
        if self.dtype == torch.float64:
            lam = torch.linalg.eigvalsh(factor)
            distances = torch.cat([lam[:1], lam.diff()]) if before is None or self.options["use_eigh"] else lam[:1]
            if distances.min() > OPEN_BASIS * lam[-1]:
                return own
        state = self.soap.state[self.params[index]]
        theirs = state[f"Q_{axis}"].detach().to(torch.float64).clone()
        # Against their own factor: that it is the oracle's is looked at after the step.
        factor = self.unpacked(state[f"GG_{axis}"], len(factor))
        assert_valid_basis(
            theirs, factor, before, self.options["use_eigh"], self.options["power_iter_steps"], BASIS_ERROR[self.dtype]
        )
        return theirs

    def unpacked(self, factor: Tensor, size: int) -> Tensor:
        """A factor of the optimizer's, whole and in float64."""
        factor = factor.to(torch.float64)
        return unpack(factor.unsqueeze(0), size)[0] if self.options["pack_factors"] else factor

    def step(self, grads: Sequence[Tensor | None]) -> None:
        """One step of each, then everything comparable is compared."""
        for p, g in zip(self.params, grads, strict=True):
            p.grad = None if g is None else g.to(self.dtype)
        self.soap.step()
        self.oracle.step(grads)
        for index in range(len(self.params)):
            self.compare(index)
        assert not any(p.any() for p in self.spoiled)

    def compare(self, index: int) -> None:
        """Weights and second moments agree to the promised gap, the counters exactly."""
        p, s = self.params[index], self.oracle.state[index]
        state = self.soap.state.get(p, {})
        if s["t"] == 0:
            assert torch.equal(p.detach().to(torch.float64), self.start[index])
            return
        expected = self.oracle.weights[index]
        scale = max((expected - self.start[index]).abs().max(), torch.tensor(LR))
        gap = (p.detach().to(torch.float64) - expected).abs().max() / scale
        assert gap <= GAP[self.dtype], f"weights of tensor {index} are {gap:.1e} apart after {s['t']} steps"
        v = s["V"].reshape(p.shape)
        gap = (state["exp_avg_sq"].to(torch.float64) - v).abs().max() / v.abs().max().clamp(min=1e-30)
        assert gap <= GAP[self.dtype], f"second moments of tensor {index} are {gap:.1e} apart after {s['t']} steps"
        assert float(state["step"]) == s["t"]
        if s["K"]:
            assert float(state["refresh_step"]) == s["refresh_step"]
        m = s["M"].reshape(p.shape)
        if not s["K"]:  # in a basis it turns with the signs of a basis, which are open
            gap = (state["exp_avg"].to(torch.float64) - m).abs().max() / m.abs().max().clamp(min=1e-30)
            assert gap <= GAP[self.dtype], f"first moments of tensor {index} are {gap:.1e} apart"
        assert {name for name in state if name.startswith("GG_")} == {f"GG_{axis}" for axis in s["K"]}
        for axis, factor in s["K"].items():
            theirs = self.unpacked(state[f"GG_{axis}"], len(factor))
            gap = (theirs - factor).abs().max() / factor.abs().max().clamp(min=1e-30)
            assert gap <= GAP[self.dtype], f"factors {axis} of tensor {index} are {gap:.1e} apart"


def run(shapes: Sequence[tuple[int, ...]], options: Mapping, dtype: torch.dtype, with_nan: bool = False) -> Pair:
    """30 steps on the fixed gradients."""
    pair = Pair(shapes, options, dtype, with_nan=with_nan)
    for grads in anisotropic_gradients(shapes, seed=0):
        pair.step(grads)
    return pair


def base_options(**changes: object) -> dict:
    """A plain case, for the tests outside the design."""
    case = {name: values[0] for name, values in LEVELS.items()} | {"shape": "2-D wide"}
    return options_of(case) | {"weight_decay": 0.1} | changes


# --- the design ---------------------------------------------------------------------------------------------------


def test_the_design_covers_every_pair_of_levels_where_both_matter() -> None:
    covered = set().union(*(covered_pairs(row, live_factors) for row in DESIGN))
    assert covered == WANTED
    assert len(DESIGN) <= 40


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_soap_equals_the_oracle_over_30_steps(case: Mapping, dtype: torch.dtype) -> None:
    options = options_of(case)
    shape = SHAPES[case["shape"]]
    # Two of a shape, to meet any batching, and a stranger. In float64 a third whose gradients are NaN, so that the
    # others are stepped with a mask.
    pair = run([shape, shape, (3,)], options, dtype, with_nan=dtype == torch.float64)

    events = pair.oracle.events
    if case["max_update_rms"] > 0:
        assert events["clipped"] > 0, "the case does not exercise the clip"
    assert (events["refreshed"] > 0) == any(s["K"] for s in pair.oracle.state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("path", LEVELS["path"])
@pytest.mark.parametrize("variant", ["plain", "kl", "warm-up, limit, merge"])
@pytest.mark.parametrize("shape", ["0-D", "5-D"])
def test_scalars_and_five_axes_equal_the_oracle(shape: str, variant: str, path: str, dtype: torch.dtype) -> None:
    case = {name: values[0] for name, values in LEVELS.items()} | {"shape": shape, "path": path}
    case |= {"use_kl_shampoo": variant == "kl"}
    if variant.startswith("warm-up"):
        case |= {"adam_warmup_steps": 3, "precondition_frequency": 4, "axis_limit": "below", "merge_dims": True}
    run([SHAPES[shape]], options_of(case), dtype)


# --- what the design cannot reach ---------------------------------------------------------------------------------


def test_in_float64_the_oracle_keeps_its_own_basis_at_most_refreshes() -> None:
    pair = run([SHAPES["2-D tall"], SHAPES["3-D"]], base_options(), torch.float64)
    assert pair.oracle.events["adopted"] <= 0.1 * pair.oracle.events["refreshed"]


@pytest.mark.parametrize("path", ["qr", "eigh"])
def test_the_adaptive_criterion_is_met_at_some_refreshes_and_not_at_others(path: str) -> None:
    options = base_options(use_adaptive_criteria=True, use_eigh=path == "eigh", adaptive_update_tolerance=0.005)
    pair = run([SHAPES["2-D tall"], SHAPES["2-D tall"], SHAPES["3-D"]], options, torch.float64)
    assert pair.oracle.events["left alone"] >= 10
    assert pair.oracle.events["refreshed"] >= 10


def test_a_clip_that_holds_only_sometimes_equals_the_oracle() -> None:
    pair = run([SHAPES["2-D wide"], SHAPES["3-D"]], base_options(max_update_rms=0.35), torch.float64)
    assert pair.oracle.events["clipped"] >= 5
    assert pair.oracle.events["not clipped"] >= 5


def test_max_precond_dim_zero_is_adamw() -> None:
    shapes = [SHAPES["2-D tall"], SHAPES["1-D"], SHAPES["4-D"]]
    options = base_options(max_precond_dim=0, precondition_1d=True, eps=1e-8)
    pair = Pair(shapes, {k: v for k, v in options.items() if k != "eps"}, torch.float64, eps=1e-8)
    params = [torch.nn.Parameter(w.clone()) for w in pair.start]
    adamw = torch.optim.AdamW(params, lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for grads in anisotropic_gradients(shapes, seed=1):
        pair.step(grads)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        adamw.step()
    for p, q in zip(params, pair.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_negative_shampoo_beta_means_the_second_adam_beta() -> None:
    run([SHAPES["2-D wide"]], base_options(shampoo_beta=-1.0, betas=(0.8, 0.97)), torch.float64)


@pytest.mark.parametrize("path", ["qr", "eigh"])
@pytest.mark.parametrize("refresh", ["rank", "kronecker"])
def test_the_default_eps_equals_the_oracle_where_the_factors_have_full_rank(path: str, refresh: str) -> None:
    # a warm-up until every factor has full rank: no null space in which eps would be all there is
    shapes = [SHAPES["2-D tall"], SHAPES["3-D"]]
    options = base_options(adam_warmup_steps=4, use_eigh=path == "eigh", second_moment_refresh=refresh)
    pair = Pair(shapes, options, torch.float64, eps=1e-8)
    for grads in anisotropic_gradients(shapes, seed=2):
        pair.step(grads)
    assert pair.oracle.events["adopted"] == 0


@pytest.mark.parametrize("path", ["qr", "eigh"])
@pytest.mark.parametrize("refresh", ["rank", "kronecker"])
@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_state_that_is_rounded_equals_the_oracle_that_rounds(
    path: str, refresh: str, frequency: int, state_dtype: torch.dtype
) -> None:
    # Float64 arithmetic, so that nothing but an exact tie is rounded otherwise; no short decimal for a beta, which
    # makes ties of float32 gradients; full rank as above, so that every basis is the oracle's own.
    shapes = [SHAPES["2-D tall"], SHAPES["2-D tall"], SHAPES["3-D"], SHAPES["1-D"]]
    options = base_options(
        adam_warmup_steps=4,
        precondition_frequency=frequency,
        use_eigh=path == "eigh",
        second_moment_refresh=refresh,
        betas=(math.pi / 3.5, 0.95),
    )
    pair = Pair(shapes, options | {"state_dtype": state_dtype, "use_nesterov": True}, torch.float64)
    exact = Pair(shapes, options | {"use_nesterov": True}, torch.float64)
    for grads in anisotropic_gradients(shapes, seed=8):
        pair.step(grads)
        exact.step(grads)
    assert pair.oracle.events["adopted"] == 0
    for rounded, other, start in zip(pair.params, exact.params, starting_weights(shapes), strict=True):
        moved = (other.detach() - start).norm()
        assert 1e-9 < (rounded.detach() - other.detach()).norm() / moved < 0.1


@pytest.mark.parametrize("path", ["qr", "eigh"])
@pytest.mark.parametrize("use_kl_shampoo", [False, True], ids=["plain", "kl"])
def test_a_gradient_that_depends_on_the_weights_equals_the_oracle(path: str, use_kl_shampoo: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(d, d, generator=generator, dtype=torch.float64) for d in (4, 10))
    a, b = left @ left.T / 4, right @ right.T / 10
    options = base_options(use_eigh=path == "eigh", use_kl_shampoo=use_kl_shampoo, precondition_frequency=4)
    pair = Pair([(4, 10)], options, torch.float64)
    for _ in range(STEPS):  # each side follows the gradient at its own weights
        w_soap, w_oracle = pair.params[0], pair.oracle.weights[0]
        w_soap.grad = a @ w_soap.detach() @ b
        pair.soap.step()
        pair.oracle.step([a @ w_oracle @ b])
        pair.compare(0)


@pytest.mark.parametrize("options", [{}, {"stagger_updates": True}, {"use_adaptive_criteria": True}], ids=str)
@pytest.mark.parametrize("use_eigh", [False, True], ids=["qr", "eigh"])
def test_a_frequency_that_comes_and_goes_from_one_equals_the_oracle(use_eigh: bool, options: dict) -> None:
    shapes = [SHAPES["2-D tall"], SHAPES["2-D tall"], SHAPES["3-D"], SHAPES["1-D"]]

    def frequency(step: int) -> int:
        return 1 if step % 11 < 5 else 3

    case = base_options(adam_warmup_steps=2, precondition_frequency=frequency, use_eigh=use_eigh) | options
    pair = Pair(shapes, case, torch.float64)
    for t, grads in enumerate(anisotropic_gradients(shapes, seed=9)):
        pair.step([g if index != 1 or t % 4 else None for index, g in enumerate(grads)])


def test_a_learning_rate_schedule_equals_the_oracle() -> None:
    pair = Pair([SHAPES["2-D wide"]], base_options(), torch.float64)
    for t, grads in enumerate(anisotropic_gradients([SHAPES["2-D wide"]], seed=4)):
        pair.soap.param_groups[0]["lr"] = pair.oracle.lr = LR * (1 - t / STEPS)
        pair.step(grads)


def test_tensors_of_one_shape_that_miss_gradients_at_different_steps_equal_the_oracle() -> None:
    shapes = [SHAPES["2-D wide"]] * 3 + [SHAPES["1-D"]]
    pair = Pair(shapes, base_options(adam_warmup_steps=3, precondition_frequency=4), torch.float64)
    for t, grads in enumerate(anisotropic_gradients(shapes, seed=5)):
        kept = [g if (t + index) % (index + 2) or index == 0 else None for index, g in enumerate(grads)]
        pair.step(kept)
    assert len({s["t"] for s in pair.oracle.state}) > 1


@pytest.mark.parametrize("path", ["qr", "eigh"])
@pytest.mark.parametrize("use_kl_shampoo", [False, True], ids=["plain", "kl"])
def test_a_tensor_whose_first_gradients_are_zero_gets_its_basis_with_the_first_other_gradient(
    path: str, use_kl_shampoo: bool
) -> None:
    shapes = [SHAPES["2-D wide"], SHAPES["2-D wide"]]
    options = base_options(use_eigh=path == "eigh", use_kl_shampoo=use_kl_shampoo, precondition_frequency=10)
    pair = Pair(shapes, options, torch.float64)
    for t, grads in enumerate(anisotropic_gradients(shapes, seed=6)):
        pair.step([grads[0], torch.zeros_like(grads[1]) if t < 5 else grads[1]])
        assert pair.oracle.state[1]["refresh_step"] == (0 if t < 5 else 6 if t < 10 else 11 if t < 20 else 21)


def test_groups_with_different_options_equal_their_own_oracles() -> None:
    shapes = [SHAPES["2-D wide"], SHAPES["2-D wide"]]
    start = starting_weights(shapes)
    params = [torch.nn.Parameter(w.clone()) for w in start]
    ours = [
        base_options(adam_warmup_steps=5, eps=1e-4),
        base_options(adam_warmup_steps=4, eps=1e-4, use_kl_shampoo=True, use_nesterov=True, lr=0.02, use_eigh=True),
    ]
    soap = SOAP(
        [{"params": [p], **options} for p, options in zip(params, ours, strict=True)],
        lr=1.0,
        fp32_matmul_prec="highest",
        qr_fp32_matmul_prec="highest",
    )
    oracles = [OracleSOAP([w], **options) for w, options in zip(start, ours, strict=True)]
    for grads in anisotropic_gradients(shapes, seed=7):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        soap.step()
        for p, g, oracle in zip(params, grads, oracles, strict=True):
            oracle.step([g])
            torch.testing.assert_close(p.detach(), oracle.weights[0], rtol=0, atol=1e-9 * LR)


# --- the oracle's own geometry, by hand -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "limit", "folded"),
    [
        ((64, 3, 3, 3), 10000, [64, 27]),
        ((64, 3, 3, 3), 9, [64, 3, 9]),
        ((5, 3, 2, 2), 4, [5, 3, 4]),
        ((2, 2, 2), 10000, [2, 4]),
        ((2, 2), 10000, [2, 2]),
        ((7,), 10000, [7]),
        ((), 10000, []),
        ((3, 2, 2, 3, 2), 6, [3, 4, 6]),
        ((2, 2, 100, 2, 2), 8, [4, 100, 4]),
    ],
)
def test_folding_goes_from_the_last_axis_and_stops_at_two(
    shape: tuple[int, ...], limit: int, folded: list[int]
) -> None:
    assert working_shape(shape, True, limit) == folded
    assert working_shape(shape, False, limit) == list(shape)


def test_axes_beyond_the_limit_and_vectors_have_no_factor() -> None:
    assert preconditioned_axes([9, 4], False, 5) == [1]
    assert preconditioned_axes([4], False, 5) == []
    assert preconditioned_axes([4], True, 5) == [0]
    assert preconditioned_axes([], True, 5) == []
