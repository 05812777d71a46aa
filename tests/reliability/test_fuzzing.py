"""Random options, wrong options, corrupted checkpoints and wrong arguments: what is promised, or an error that helps.

An error is a ValueError or a TypeError whose message names what is wrong, and it leaves everything as it was. The
examples are derived from the tests' names and are the same in every run; SOAP_FUZZ_EXAMPLES multiplies their number and
draws them at random.
"""

import copy
import functools
import inspect
import io
import math
import os
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from emerging_optimizers.schedules import LinearFrequency
from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.soap import (
    init_kronecker_factors,
    precondition,
    update_eigenbasis_and_momentum,
    update_kronecker_factors,
    update_kronecker_factors_kl_shampoo,
)
from emerging_optimizers.soap.soap_utils import get_eigenbasis_eigh, get_eigenbasis_qr

MORE = int(os.environ.get("SOAP_FUZZ_EXAMPLES", "0"))


def profile(examples: int) -> settings:
    return settings(
        max_examples=examples * max(MORE, 1),
        derandomize=not MORE,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


seeds = st.integers(0, 10_000)


# --- valid options ------------------------------------------------------------------------------------------------

decays = st.floats(0.0, 1.0, exclude_max=True)
choices = {
    "weight_decay_method": ["decoupled", "independent", "l2"],
    "fp32_matmul_prec": ["highest", "high", "medium"],
    "qr_fp32_matmul_prec": ["highest", "high", "medium"],
    "second_moment_refresh": ["rank", "kronecker"],
    "nonfinite": ["skip", "raise", "propagate"],
}
flags = ["use_nesterov", "precondition_1d", "correct_bias", "use_eigh", "use_adaptive_criteria", "use_kl_shampoo"]
flags += ["maximize", "merge_dims", "stagger_updates", "pack_factors"]
OPTIONS: dict[str, st.SearchStrategy] = {
    "lr": st.one_of(
        st.floats(0.0, 1.0),
        st.sampled_from([0, 1]),
        st.builds(torch.tensor, st.floats(0.0, 1.0)),
        st.builds(lambda x: torch.tensor([x], dtype=torch.float64), st.floats(0.0, 1.0)),
    ),
    "betas": st.one_of(st.tuples(decays, decays), st.lists(decays, min_size=2, max_size=2), st.just((0, 0))),
    "shampoo_beta": st.one_of(decays, st.floats(max_value=-1e-9, allow_nan=False)),
    "eps": st.one_of(st.floats(1e-10, 1.0), st.sampled_from([0, 0.0, 1e-46, 1e-30, 1])),
    "weight_decay": st.one_of(st.floats(0.0, 2.0), st.sampled_from([0, 1])),
    "precondition_frequency": st.one_of(st.integers(1, 4), st.sampled_from([10**30, LinearFrequency(1, 3, 4)])),
    "adam_warmup_steps": st.one_of(st.integers(0, 4), st.just(10**30)),
    "adaptive_update_tolerance": st.floats(0.0, 1.0),
    "power_iter_steps": st.integers(1, 3),
    "max_update_rms": st.one_of(st.floats(0.0, 10.0), st.just(1)),
    "correct_shampoo_beta_bias": st.sampled_from([None, False, True]),
    "max_precond_dim": st.one_of(st.integers(0, 12), st.just(10**30)),
    "state_dtype": st.sampled_from([None, torch.float32, torch.bfloat16]),
    **{name: st.sampled_from(values) for name, values in choices.items()},
    **{name: st.booleans() for name in flags},
}


def is_possible(options: dict[str, Any]) -> bool:
    return not (options.get("use_kl_shampoo") and options.get("eps") == 0)


valid_options = st.fixed_dictionaries({}, optional=OPTIONS).filter(is_possible)
all_options = st.fixed_dictionaries(OPTIONS).filter(is_possible)
shapes = st.lists(st.lists(st.sampled_from([0, 1, 1, 2, 3, 4]), max_size=4).map(tuple), min_size=1, max_size=3)


class Run:
    """Tensors and a SOAP for them; gradients are a function of seed and step."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, seed: int, options: dict) -> None:
        self.seed, self.dtype = seed, dtype
        generator = torch.Generator().manual_seed(seed)
        self.parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
        self.optimizer = SOAP(self.parameters, **{"lr": 0.01, **copy.deepcopy(options)})

    def train(self, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(1000 * self.seed + step)
            for i, parameter in enumerate(self.parameters):
                scale = 10.0 ** (int(torch.randint(-3, 4, (), generator=generator)))
                grad = scale * torch.randn(parameter.shape, generator=generator)
                kind = int(torch.randint(0, 8, (), generator=generator))
                if kind == 0:
                    grad.zero_()
                elif kind == 1:
                    grad *= torch.randint(0, 2, grad.shape, generator=generator)
                elif kind == 2 and self.optimizer.param_groups[0]["nonfinite"] == "skip" and grad.numel():
                    grad.view(-1)[-1] = [math.nan, math.inf, -math.inf][step % 3]
                parameter.grad = None if kind == 3 and i else grad.to(self.dtype)
            self.optimizer.step()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for i, parameter in enumerate(self.parameters):
            yield f"weight {i}", parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{key} {i}", value


def assert_same(first: Run, second: Run) -> None:
    ours, theirs = dict(first.tensors()), dict(second.tensors())
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.allclose(value, theirs[name], rtol=0, atol=0, equal_nan=True), name


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@profile(150)
@given(
    options=st.one_of(valid_options, all_options),
    shapes=shapes,
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=seeds,
)
def test_any_valid_options_train_finitely_deterministically_and_resume_bit_for_bit(
    options: dict, shapes: list, dtype: torch.dtype, seed: int
) -> None:
    run, again = Run(shapes, dtype, seed, options), Run(shapes, dtype, seed, options)
    for each in (run, again):
        each.train(range(5))
    assert_same(run, again)
    # eps = 0, or what rounds to it, makes 0 / 0 of an entry that never had a gradient: Adam's arithmetic, as in torch.
    if options.get("eps", 1e-8) >= 1e-30:
        for name, value in run.tensors():
            assert value.isfinite().all(), name
            assert not name.startswith("exp_avg_sq") or (value >= 0).all(), name

    saved = through_a_file({"weights": [p.detach() for p in run.parameters], "optimizer": run.optimizer.state_dict()})
    resumed = Run(shapes, dtype, seed, options)
    with torch.no_grad():
        for parameter, weight in zip(resumed.parameters, saved["weights"], strict=True):
            parameter.copy_(weight)
    resumed.optimizer.load_state_dict(saved["optimizer"])
    assert_same(run, resumed)
    for each in (run, resumed):
        each.train(range(5, 8))
    assert_same(run, resumed)


@pytest.mark.parametrize("beta1", [1e-170, 5e-324, 1 - 2**-53])
@pytest.mark.parametrize("beta2", [5e-324, 1e-310, 0.5, 1 - 2**-53])
def test_betas_at_the_ends_of_their_range_train_finitely(beta1: float, beta2: float) -> None:
    run = Run([(3, 4), (2,)], torch.float32, 0, {"betas": (beta1, beta2), "shampoo_beta": beta2})
    run.train(range(8))
    assert all(value.isfinite().all() for _, value in run.tensors())


# --- invalid options ----------------------------------------------------------------------------------------------


class AlwaysEqual:
    """Equal to everything, as ``unittest.mock.ANY``; and an array's ``==`` has no truth value."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


THING = object()
HUGE = 10**400  # no float holds it
#: NumPy's scalars are not among them: they mean a number.
NOT_NUMBERS = [None, "0.1", "", [], [0.1], {}, {"a": 1}, (0.1,), 1j, True, False, THING, b"1", np.array(0.5), dict, len]
ARRAYS = [np.array([0.1, 0.2]), torch.tensor([0.1, 0.2])]
TENSORS = [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(True), torch.tensor(1)]
NUMBERS = [math.nan, math.inf, -math.inf, -1, -1.0, HUGE, -HUGE]
not_numbers = [*NOT_NUMBERS, *ARRAYS, *TENSORS]
CHOICE_VALUES = [*not_numbers, *NUMBERS, "Skip", "high ", 0, unittest.mock.ANY, AlwaysEqual()]
FLAG_VALUES = [value for value in not_numbers if not isinstance(value, bool)] + [*NUMBERS, 0, 1, 0.0, 1.0, "True"]
INTEGER_VALUES = [*not_numbers, math.nan, math.inf, -math.inf, 1.0, 2.5, -1, -HUGE]
BAD_LR_TENSORS = [torch.tensor(value) for value in ([], math.nan, math.inf, [-1.0], 0.1 + 0j, True)]
BAD_LR_TENSORS.append(torch.tensor([0.1]).to_sparse())
SPOILED: dict[str, list[Any]] = {
    "lr": [*NOT_NUMBERS, *ARRAYS, *NUMBERS, *BAD_LR_TENSORS, np.float64("nan")],
    "betas": [
        *NOT_NUMBERS,
        *TENSORS,
        *(0.9, "ab", {0.9, 0.95}, {0: 0.9, 1: 0.95}, (0.9, 0.9, 0.9)),
        *[(value, 0.95) for value in [*not_numbers, *NUMBERS, 1, 1.0]],
        *[[0.9, value] for value in [*not_numbers, *NUMBERS, 1, 1.0]],
    ],
    "shampoo_beta": [*not_numbers, math.nan, math.inf, HUGE, 1, 1.0, np.float64("nan")],
    "eps": [*not_numbers, *NUMBERS, np.float64("nan"), 1e39, 1e300],  # no float32 holds the last two
    "weight_decay": [*not_numbers, *NUMBERS, np.float64("nan")],
    "precondition_frequency": [v for v in INTEGER_VALUES if not callable(v)] + [0],
    "adam_warmup_steps": INTEGER_VALUES,
    "adaptive_update_tolerance": [*not_numbers, *NUMBERS, 1.5],
    "power_iter_steps": [*INTEGER_VALUES, 0],
    "max_update_rms": [*not_numbers, *NUMBERS],
    "correct_shampoo_beta_bias": [value for value in FLAG_VALUES if value is not None],
    "max_precond_dim": INTEGER_VALUES,
    "state_dtype": [v for v in CHOICE_VALUES if v is not None] + [torch.float16, torch.float64, torch.int8, "bfloat16"],
    **dict.fromkeys(flags, FLAG_VALUES),
    **dict.fromkeys(choices, CHOICE_VALUES),
}
CALLED = {"lr": ("learning rate", "Tensor lr"), "betas": ("beta parameter at index", "Invalid betas")}
CALLED["eps"] = ("Invalid epsilon value",)


def assert_refused(option: str, call: Callable[[], object]) -> None:
    """``call`` raises a ValueError or TypeError that names the option; anything else comes through as it is."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert any(name in str(caught.value) for name in CALLED.get(option, (f"Invalid {option}",))), caught.value


ALL_SPOILED = [(option, value) for option, values in SPOILED.items() for value in values]


def check_refused_everywhere(option: str, bad: Any, options: dict) -> None:
    options = {"lr": 0.1} | {name: value for name, value in options.items() if name != option}
    assert_refused(option, lambda: SOAP([nn.Parameter(torch.ones(2, 3))], **options | {option: bad}))
    good, other = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))
    groups = [{"params": [good]}, {"params": [other], option: bad}]
    assert_refused(option, lambda: SOAP(groups, **options))

    optimizer = SOAP([good], **options)
    before = [dict(group) for group in optimizer.param_groups]
    assert_refused(option, lambda: optimizer.add_param_group({"params": [other], option: bad}))
    assert len(optimizer.param_groups) == len(before)
    assert list(optimizer.param_groups[0]) == list(before[0])
    assert all(optimizer.param_groups[0][key] is value for key, value in before[0].items())

    optimizer.add_param_group({"params": [other]})
    for parameter in (good, other):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    weights, state = copy.deepcopy([good.detach(), other.detach()]), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[1][option] = bad
    assert_refused(option, optimizer.step)
    assert torch.equal(good, weights[0])
    assert torch.equal(other, weights[1])
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(now[i][key], value) for i in state for key, value in state[i].items())


@pytest.mark.parametrize("option", SPOILED)
def test_every_wrong_value_of_an_option_is_refused_by_name_wherever_it_can_be_given(option: str) -> None:
    wrong = []
    for value in SPOILED[option]:
        try:
            check_refused_everywhere(option, value, {})
        except BaseException as error:  # collected, so that one failure shows all of them
            wrong.append(f"{str(value)[:60]}: {type(error).__name__}: {str(error)[:200]}")
    assert not wrong, "\n".join(wrong)


def test_every_option_is_spoiled() -> None:
    optimizer = SOAP([nn.Parameter(torch.ones(2))], lr=0.1)
    assert set(SPOILED) == set(OPTIONS) == set(optimizer.defaults) - {"differentiable"}


@profile(60)
@given(options=all_options, spoiled=st.sampled_from(ALL_SPOILED))
def test_one_wrong_value_among_any_valid_options_is_refused(options: dict, spoiled: tuple[str, Any]) -> None:
    option, bad = spoiled
    if option in ("eps", "use_kl_shampoo"):
        options |= {"use_kl_shampoo": False}
    check_refused_everywhere(option, bad, {**options, "eps": 1e-8})


class Text(str):
    __slots__ = ()


def test_subclasses_of_float_and_str_are_accepted_and_the_state_still_loads_with_weights_only() -> None:
    # A sweep over numpy.logspace gives such learning rates.
    options = {name: np.float64(value) for name, value in {"lr": 0.1, "eps": 1e-8, "max_update_rms": 1.0}.items()}
    options |= {"betas": (np.float64(0.9), np.float64(0.95))}
    options |= {"nonfinite": Text("skip"), "weight_decay_method": Text("l2")}
    parameter = nn.Parameter(torch.ones(2, 3))
    parameter.grad = torch.ones(2, 3)
    optimizer = SOAP([parameter], **options)
    optimizer.step()
    SOAP([nn.Parameter(torch.ones(2, 3))], lr=0.1).load_state_dict(through_a_file(optimizer.state_dict()))


# --- corrupted checkpoints ----------------------------------------------------------------------------------------

CHECKPOINT_SHAPES = [(3, 4), (5,), (), (2, 3, 2), (3, 4), (0, 2)]
CHECKPOINT_MODES: dict[str, dict] = {
    "default": {},
    "kl, eigh, 1-D": {"use_kl_shampoo": True, "use_eigh": True, "precondition_1d": True},
    "warm-up": {"adam_warmup_steps": 20},
    "schedule, merged": {"precondition_frequency": LinearFrequency(1, 3, 4), "merge_dims": True},
    "adamw": {"max_precond_dim": 0},
    "packed, bfloat16": {"pack_factors": True, "state_dtype": torch.bfloat16},
}


class Pair:
    """A trained optimizer of two named groups, its twin, and the state of a third that was trained further."""

    def __init__(self, mode: str) -> None:
        def new() -> Run:
            run = Run(CHECKPOINT_SHAPES, torch.float32, 3, {})
            named = [(f"p{i}", p) for i, p in enumerate(run.parameters)]
            groups = [{"params": named[:3]}, {"params": named[3:], "weight_decay": 0.1}]
            run.optimizer = SOAP(groups, lr=0.01, **CHECKPOINT_MODES[mode])
            return run

        self.victim, self.twin, further = new(), new(), new()
        self.victim.train(range(4))
        self.twin.train(range(4))
        further.train(range(7))
        self.saved = copy.deepcopy(further.optimizer.state_dict())

    def assert_untouched(self) -> None:
        ours, theirs = self.victim.optimizer.state_dict(), self.twin.optimizer.state_dict()
        assert ours["param_groups"] == theirs["param_groups"]
        assert list(ours["state"]) == list(theirs["state"])
        assert_same(self.victim, self.twin)
        for each in (self.victim, self.twin):
            each.train(range(20, 23))
        assert_same(self.victim, self.twin)


made_once = functools.cache(Pair)  # and copied, which is faster


def paths(value: Any, here: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, child in items:
        yield (*here, key)
        yield from paths(child, (*here, key))


def like(old: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.ones(old.shape if isinstance(old, Tensor) else (), dtype=dtype)


JUNK: dict[str, Callable[[Any], Any]] = {
    "None": lambda old: None,
    "a string": lambda old: "junk",
    "an empty string": lambda old: "",
    "an empty list": lambda old: [],
    "a list": lambda old: [1.0, 2.0],
    "a list of dicts": lambda old: [{}, {}],
    "a list of keys": lambda old: list(old) if isinstance(old, dict) else ["step"],
    "an empty dict": lambda old: {},
    "a dict": lambda old: {"a": 1},
    "a nested dict": lambda old: {"step": {"step": torch.zeros(())}},
    "a dict of mixed keys": lambda old: {**old, 7: 1, None: 2} if isinstance(old, dict) else {1: 2, "a": 3},
    "an empty tuple": lambda old: (),
    "wrapped": lambda old: [old],
    "items": lambda old: list(old.items()) if isinstance(old, dict) else old,
    "a long list": lambda old: list(old) * 2 if isinstance(old, list | tuple) else [old, old],
    "reversed": lambda old: old[::-1] if isinstance(old, list | tuple) else old,
    "an integer": lambda old: 5,
    "minus one": lambda old: -1,
    "a fraction": lambda old: 2.5,
    "nan": lambda old: math.nan,
    "inf": lambda old: math.inf,
    "true": lambda old: True,
    "complex": lambda old: 1j,
    "huge": lambda old: HUGE,
    "bytes": lambda old: b"ab",
    "object": lambda old: THING,
    "type": lambda old: dict,
    "callable": lambda old: lambda step: 2,
    "array": lambda old: np.ones(2),
    "wrong shape": lambda old: torch.ones(7, 7),
    "empty tensor": lambda old: torch.zeros(0),
    "scalar tensor": lambda old: torch.tensor(1.0),
    "nan tensor": lambda old: like(old) * math.nan,
    "inf tensor": lambda old: like(old) * math.inf,
    "negative tensor": lambda old: -like(old),
    "fractional tensor": lambda old: 2.5 * like(old),
    "huge tensor": lambda old: 1e30 * like(old),
    "zero tensor": lambda old: 0 * like(old),
    "complex tensor": lambda old: like(old, torch.complex64),
    "bool tensor": lambda old: like(old, torch.bool),
    "int tensor": lambda old: like(old, torch.int32),
    "bfloat16 tensor": lambda old: like(old, torch.bfloat16),
    "sparse tensor": lambda old: like(old).to_sparse(),
    "meta tensor": lambda old: like(old).to("meta"),
    "quantized tensor": lambda old: torch.zeros(like(old).shape, dtype=torch.uint8),
    "parameter": lambda old: nn.Parameter(like(old)),
    "flattened tensor": lambda old: like(old).flatten(),
    "transposed": lambda old: old.T.contiguous() if isinstance(old, Tensor) and old.dim() == 2 else like(old),
    "expanded": lambda old: torch.zeros(()).expand(like(old).shape),
}
DELETE = "delete"
RENAME = "rename"
COPY = "copy of a sibling"


def corrupt(root: dict, path: tuple, how: str, number: int) -> None:
    parent = root
    for key in path[:-1]:
        if isinstance(parent[key], tuple):  # betas
            parent[key] = list(parent[key])
        parent = parent[key]
    key = path[-1]
    if how == DELETE:
        del parent[key]
    elif how == RENAME and isinstance(parent, dict):
        parent[[99, "other", None, (1, 2), 1.5][number % 5]] = parent.pop(key)
    elif how in (RENAME, COPY):
        others = list(parent) if isinstance(parent, dict) else range(len(parent))
        parent[key] = copy.deepcopy(parent[list(others)[number % len(others)]])
    elif not (key == "power_iter_steps" and how == "huge"):  # a number of steps that would take for ever
        parent[key] = JUNK[how](parent[key])


corruptions = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from([*JUNK, DELETE, DELETE, RENAME, COPY]), st.integers(0, 100)),
    min_size=1,
    max_size=3,
)


def check_corrupted(mode: str, corruptions: Sequence[tuple[tuple | int, str, int]]) -> str:
    """Loads a corrupted state; "loaded" or "refused"."""
    both = copy.deepcopy(made_once(mode))
    for place, how, number in corruptions:
        every = list(paths(both.saved))
        if not every:
            break
        if isinstance(place, tuple):
            path = place
        else:  # every level as often as every other
            by_level = [[p for p in every if len(p) == level] for level in range(1, 1 + max(map(len, every)))]
            level = by_level[place % len(by_level)]
            path = level[place // len(by_level) % len(level)]
        corrupt(both.saved, path, how, number)
    try:
        both.victim.optimizer.load_state_dict(both.saved)
    except (ValueError, TypeError) as error:
        refusal = str(error)
    else:
        both.victim.train(range(30, 33))
        both.victim.optimizer.load_state_dict(both.victim.optimizer.state_dict())
        both.victim.train(range(33, 34))
        return "loaded"
    assert refusal
    both.assert_untouched()
    return "refused"


@profile(250)
@given(mode=st.sampled_from(list(CHECKPOINT_MODES)), corruptions=corruptions)
def test_a_corrupted_state_is_refused_whole_or_trains(mode: str, corruptions: list) -> None:
    check_corrupted(mode, corruptions)


STEP = ("state", 0, "step")
REFRESH_STEP = ("state", 0, "refresh_step")
MUST_BE_REFUSED: dict[str, tuple[tuple, str]] = {
    **{f"{path[-1]} {how}": (path, how) for path in (STEP, REFRESH_STEP, ("state", 0, "skipped_steps")) for how in [
        "nan", "inf", "minus one", "a fraction", "nan tensor", "inf tensor", "negative tensor", "fractional tensor",
        "complex tensor", "meta tensor", "sparse tensor", "true", "huge", "huge tensor"]},
    "refresh_step after step": (REFRESH_STEP, "a thousand"),
    **{f"{key} {how}": (("state", 0, key), how) for key in ("exp_avg", "exp_avg_sq", "GG_0", "Q_1") for how in [
        "None", "complex tensor", "meta tensor", "sparse tensor", "transposed list", "wrong shape", DELETE, RENAME]},
    **{f"a state {how}": (("state", 0), how) for how in [
        "a string", "a list", "a list of keys", "an integer", "scalar tensor", "items", "an empty string", "true"]},
    **{f"the states {how}": (("state",), how) for how in ["None", "a list", "items", "a string", "scalar tensor"]},
    **{f"a group {how}": (("param_groups", 0), how) for how in [
        "None", "a list", "items", "a string", "scalar tensor"]},
    **{f"the groups {how}": (("param_groups",), how) for how in [
        "None", "a dict", "a long list", "a string", "scalar tensor", "an integer", "a list of dicts"]},
    **{f"params {how}": (("param_groups", 0, "params"), how) for how in [
        "None", "an integer", "a long list", "a string", "scalar tensor", DELETE, RENAME]},
    **{f"param_names {how}": (("param_groups", 0, "param_names"), how) for how in [
        "None", "an integer", "a long list", "an empty list", "scalar tensor"]},
    "an id twice": (("param_groups", 0, "params", 1), COPY),
    "an id that is a list": (("param_groups", 0, "params", 1), "a list"),
    "an id of the other group": (("param_groups", 1, "params"), "int list"),
}  # fmt: skip
JUNK["a thousand"] = lambda old: torch.tensor(1000.0)
JUNK["transposed list"] = lambda old: old.tolist()
JUNK["int list"] = lambda old: [0, *old[1:]]


@pytest.mark.parametrize("case", MUST_BE_REFUSED)
def test_a_state_that_cannot_be_is_refused(case: str) -> None:
    path, how = MUST_BE_REFUSED[case]
    assert check_corrupted("default", [(path, how, 0)]) == "refused"


@pytest.mark.parametrize(
    "whole", [None, [], ["state", "param_groups"], {}, 5, "state", {"state": {}}, {"param_groups": []}, ("state",)]
)
def test_what_is_no_state_dict_is_refused(whole: Any) -> None:
    both = copy.deepcopy(made_once("default"))
    with pytest.raises((ValueError, TypeError), match="."):
        both.victim.optimizer.load_state_dict(whole)
    both.assert_untouched()


# --- documented functions -----------------------------------------------------------------------------------------


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def square(size: int) -> Tensor:
    root = tensor(size, size)
    return root @ root.T


def basis(size: int) -> Tensor:
    return torch.linalg.qr(tensor(size, size, seed=1)).Q


def arguments_of(function: Callable, shape: tuple[int, ...], without: bool) -> dict[str, Any]:
    """Valid arguments; with ``without`` the first axis has no factor."""
    axes = [None if without and k == 0 else d for k, d in enumerate(shape)]
    everything = {
        "grad": tensor(*shape),
        "momentum": tensor(*shape),
        "exp_avg_sq": tensor(*shape).square(),
        "kronecker_factor_list": [torch.empty(0) if d is None else square(d) for d in axes],
        "eigenbasis_list": [torch.empty(0) if d is None else basis(d) for d in axes],
        "dims": [[0], [0]],
        "shampoo_beta": 0.9,
        "eps": 1e-7,
        "eigval_exp": -1.0,
        "adaptive_update_tolerance": 1e-3,
        "power_iter_steps": 2,
        **dict.fromkeys(("precondition_1d", "use_adaptive_criteria", "convert_to_float"), True),
        "use_eigh": False,
    }
    return {name: everything[name] for name in inspect.signature(function).parameters}


FUNCTIONS = [
    precondition,
    init_kronecker_factors,
    update_kronecker_factors,
    update_kronecker_factors_kl_shampoo,
    update_eigenbasis_and_momentum,
    get_eigenbasis_eigh,
    get_eigenbasis_qr,
]
NO_TENSORS = [5, 0.5, "x", {}, THING, 1j, [1.0], np.ones((2, 3)), torch.ones(2, 3, dtype=torch.int64)]
NO_TENSORS += [torch.ones(2, 3, dtype=torch.complex64), torch.ones(2, 3).to_sparse(), torch.ones(2, 3) > 0]
NO_NUMBERS = ["x", [], {}, THING, 1j, True, math.nan, -1.0, HUGE, torch.tensor(0.5)]
BAD_ARGUMENTS: dict[str, list[Any]] = {
    "grad": [*NO_TENSORS, None],
    "exp_avg_sq": [*NO_TENSORS, None, torch.ones(5, 5, 5), torch.ones(())],
    "momentum": [*NO_TENSORS, None, torch.ones(5, 5, 5), torch.ones(())],
    "shampoo_beta": [*NO_NUMBERS, None, 1.5, math.inf],
    "eigval_exp": [value for value in NO_NUMBERS if not isinstance(value, float) or math.isnan(value)] + [math.inf],
    "eps": [*NO_NUMBERS, math.inf],
    "dims": [5, "x", {}, [], [[1], [0]], [[0]], THING, torch.zeros(2, 1), np.zeros((2, 1)), AlwaysEqual()],
    "adaptive_update_tolerance": [*NO_NUMBERS, None, 1.5, math.inf],
    "power_iter_steps": [None, 0, -1, 1.5, "x", [], True, math.nan, torch.tensor(1)],
}
lists_spoiled = st.one_of(
    st.sampled_from([5, "x", {}, THING, 1j, torch.eye(2), np.eye(2), {1, 2}, (m for m in ())]),
    st.tuples(
        st.integers(0, 3),
        st.sampled_from([*NO_TENSORS, None, torch.ones(3, 2), torch.ones(9, 9), torch.ones(4), torch.ones(1, 2, 2)]),
    ),
    st.sampled_from(["shorter", "longer", "empty"]),
)
RESIZED = {"shorter": lambda v: v[:-1], "longer": lambda v: [*v, torch.eye(2)], "empty": lambda v: []}


def spoil(value: list, how: Any) -> Any:
    if isinstance(how, str) and how in RESIZED:
        return RESIZED[how](value)
    if isinstance(how, tuple):
        index, element = how
        index %= len(value)
        return [*value[:index], element, *value[index + 1 :]]
    return how


def flat(arguments: dict[str, Any]) -> list[Tensor]:
    values = [value if isinstance(value, list) else [value] for value in arguments.values()]
    return [v for value in values for v in value if isinstance(v, Tensor) and v.layout == torch.strided]


@profile(250)
@given(
    function=st.sampled_from(FUNCTIONS),
    shape=st.lists(st.integers(1, 3), min_size=2, max_size=3).map(tuple),
    without=st.booleans(),
    data=st.data(),
)
def test_a_wrong_argument_of_a_documented_function_is_named_and_nothing_is_modified(
    function: Callable, shape: tuple[int, ...], without: bool, data: st.DataObject
) -> None:
    arguments = arguments_of(function, shape, without)
    function(**copy.deepcopy(arguments))
    name = data.draw(st.sampled_from([n for n in arguments if n in BAD_ARGUMENTS or n.endswith("_list")]), label="name")
    if name in BAD_ARGUMENTS:
        bad = data.draw(st.sampled_from(BAD_ARGUMENTS[name]), label="bad")
    else:
        bad = spoil(arguments[name], data.draw(lists_spoiled, label="bad"))
    arguments[name] = bad
    before = [value.clone() for value in flat(arguments)]
    with pytest.raises((ValueError, TypeError)) as caught:
        function(**arguments)
    message = str(caught.value)
    # A list that does not fit its tensor may be either's fault.
    assert name in message or (name in ("exp_avg_sq", "grad") and "_list" in message), message
    for value, old in zip(flat(arguments), before, strict=True):
        assert torch.equal(value, old)
