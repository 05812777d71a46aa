"""State that is kept small: packed factors, and first moment and bases in another dtype than the arithmetic's."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks.common import PARAMETER_SETS
from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.state import meta_state, unpack
from tests.algorithm.test_soap import COUNTERS, MODES, new_model, train
from tests.algorithm.test_stacks import new_parameters, set_gradients
from tests.state.test_checkpoint import through_a_file, trained

COMPACT = {"pack_factors": True, "state_dtype": torch.bfloat16}


def dtypes_of(optimizer: SOAP) -> dict[str, set[torch.dtype]]:
    found: dict[str, set[torch.dtype]] = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            if key not in COUNTERS:
                found.setdefault(key.split("_")[0] if key[-1].isdigit() else key, set()).add(value.dtype)
    return found


# --- how much it takes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PARAMETER_SETS if name.startswith("gpt")])
def test_a_gpt_takes_at_most_24_bytes_per_parameter_where_it_took_38(name: str) -> None:
    def bytes_per_parameter(**options: object) -> float:
        group = SOAP([nn.Parameter(torch.zeros(2))], lr=0.1, **options).param_groups[0]
        total, count = 0, 0
        for shape in PARAMETER_SETS[name]:
            parameter = torch.empty(shape, device="meta")
            state = meta_state(parameter, group)
            total += sum(value.numel() * value.element_size() for value in state.values())
            count += parameter.numel()
        return total / count

    assert bytes_per_parameter() > 38
    assert bytes_per_parameter(**COMPACT) <= 24


def test_the_state_of_a_step_is_what_was_counted() -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((192, 64), (64, 64), (256, 64), (64, 256))]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = SOAP(parameters, lr=0.1, **COMPACT)
    optimizer.step()
    storages = {
        v.untyped_storage().data_ptr(): v.untyped_storage() for s in optimizer.state.values() for v in s.values()
    }
    assert sum(storage.nbytes() for storage in storages.values()) <= 24 * sum(p.numel() for p in parameters)


# --- what it does to the results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_packed_factors_give_the_results_of_unpacked_ones(mode: str) -> None:
    options = {"lr": 0.01, **MODES[mode], "eps": 1e-4}
    plain, packed = new_parameters(torch.float64), new_parameters(torch.float64)
    optimizers = [
        SOAP(plain, **{**options, "pack_factors": False}),
        SOAP(packed, **{**options, "pack_factors": True}),
    ]
    for step in range(14):
        for parameters, optimizer in zip((plain, packed), optimizers, strict=True):
            set_gradients(parameters, step, lambda i, t=step: i == 3 and t < 3)
            if step in (0, 6) and options.get("nonfinite", "skip") == "skip":
                parameters[9].grad[0, 0] = float("nan")
            optimizer.step()
    for p, q in zip(plain, packed, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-11)
        ours, theirs = (optimizer.state[parameter] for optimizer, parameter in zip(optimizers, (p, q), strict=True))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if key.startswith("GG_"):
                assert theirs[key].shape == (len(value) * (len(value) + 1) // 2,)
                torch.testing.assert_close(unpack(theirs[key][None], len(value))[0], value, rtol=1e-9, atol=1e-11)


def test_packed_factors_decomposed_by_eigh_give_the_same_bits() -> None:
    # eigh reads the lower triangle, which is the one that is kept.
    trajectories = []
    for pack_factors in (False, True):
        model = new_model()
        optimizer = SOAP(model.parameters(), lr=1e-2, use_eigh=True, pack_factors=pack_factors)
        train(optimizer, model, 12)
        trajectories.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*trajectories, strict=True))


@pytest.mark.parametrize("mode", ["default", "frequency 10", "eigh", "kronecker", "adaptive", "nesterov", "staggered"])
def test_training_with_bfloat16_state_ends_where_it_does_with_float32(mode: str) -> None:
    ends = []
    for options in ({}, COMPACT):
        model = new_model()
        ends.append(sum(train(SOAP(model.parameters(), lr=1e-2, **{**MODES[mode], **options}), model, 150)[-20:]) / 20)
    assert ends[1] == pytest.approx(ends[0], rel=0.15)


def test_a_float64_gradient_that_a_bfloat16_moment_cannot_hold_is_left_out() -> None:
    parameter = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    optimizer = SOAP([parameter], lr=0.1, **COMPACT)
    for step, size in enumerate((1.0, 1e60, 1.0)):
        parameter.grad = size * torch.randn(3, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.step()
    assert int(optimizer.state[parameter]["skipped_steps"]) == 1
    assert parameter.isfinite().all()
    assert all(value.isfinite().all() for value in optimizer.state[parameter].values())


# --- that it stays so ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["default", "kl, 1-D, eigh", "warm-up", "merged", "adamw", "staggered"])
def test_the_states_dtype_is_the_same_before_and_after_refreshes_and_loading(
    mode: str, state_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    working = torch.float64 if dtype == torch.float64 else torch.float32
    kept = state_dtype or working
    wanted = {"exp_avg": {kept}, "exp_avg_sq": {working}}
    if mode != "adamw":
        wanted |= {"GG": {working}, "Q": {kept}}
    model = new_model().to(dtype)
    options = {"lr": 1e-2, **MODES[mode], "state_dtype": state_dtype, "pack_factors": True}
    optimizer = SOAP(model.parameters(), **options)
    for steps in (1, 12):
        train(optimizer, model, steps)
        assert dtypes_of(optimizer) == wanted
    resumed = SOAP(model.parameters(), lr=1.0)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert dtypes_of(resumed) == wanted
    train(resumed, model, 3)
    assert dtypes_of(resumed) == wanted


def test_the_state_dtype_may_change_between_steps_and_the_state_is_converted() -> None:
    model, optimizer = trained()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    for state_dtype, kept in ((torch.bfloat16, torch.bfloat16), (None, torch.float32)):
        optimizer.param_groups[0]["state_dtype"] = state_dtype
        for p in model.parameters():
            p.grad = None
        optimizer.step()  # no parameter moves, but its state does
        assert dtypes_of(optimizer)["exp_avg"] == dtypes_of(optimizer)["Q"] == {kept}
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(before[i][k].bfloat16().float(), v) for k, v in state.items() if k[0] == "Q")
        assert all(torch.equal(before[i][k], v) for k, v in state.items() if k.startswith(("exp_avg_sq", "GG")))
    train(optimizer, model, 2)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def older(saved: dict) -> dict:
    """As it was before there were such options."""
    for group in saved["param_groups"]:
        del group["pack_factors"], group["state_dtype"]
    return saved


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_a_checkpoint_from_before_the_options_loads_into_an_optimizer_with_them(
    state_dtype: torch.dtype | None,
) -> None:
    model, optimizer = trained(precondition_1d=True)
    saved = through_a_file(older(copy.deepcopy(optimizer.state_dict())))
    resumed = SOAP(model.parameters(), lr=1e-2, state_dtype=state_dtype)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["state_dtype"] == state_dtype
    for p, state in resumed.state.items():
        for key, old in optimizer.state[p].items():
            new, rounded = state[key], key == "exp_avg" or key.startswith("Q_")
            assert torch.equal(new.to(old.dtype), old.to(state_dtype or old.dtype).to(old.dtype) if rounded else old)
    train(resumed, model, 3)


@pytest.mark.parametrize(("saved", "live"), list(itertools.product([{}, COMPACT], repeat=2)))
def test_the_saved_options_decide_how_a_loaded_state_is_kept(saved: dict, live: dict) -> None:
    model, optimizer = trained(**saved)
    resumed = SOAP(model.parameters(), lr=1e-2, **live)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert resumed.param_groups[0]["state_dtype"] == saved.get("state_dtype")
    for p, state in resumed.state.items():
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
            k: (v.shape, v.dtype) for k, v in optimizer.state[p].items()
        }
    other = new_model()
    other.load_state_dict(model.state_dict())
    again = SOAP(other.parameters(), lr=1e-2, **live)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert train(again, other, 6, start=5) == train(optimizer, model, 6, start=5)


def claims_to_be_packed(saved: dict) -> None:
    saved["param_groups"][0]["pack_factors"] = True


def claims_not_to_be(saved: dict) -> None:
    saved["param_groups"][0]["pack_factors"] = False


@pytest.mark.parametrize(
    ("options", "spoil", "message"),
    [
        ({}, claims_to_be_packed, r"'GG_0' of parameter 'conv.weight' must have shape \(10,\), got \(4, 4\)"),
        (COMPACT, claims_not_to_be, r"'GG_0' of parameter 'conv.weight' must have shape \(4, 4\), got \(10,\)"),
    ],
)
def test_factors_of_the_wrong_shape_for_the_options_are_refused_whole(
    options: dict, spoil: Callable[[dict], object], message: str
) -> None:
    model, optimizer = trained(named=True, max_precond_dim=10, **options)
    twin_model, twin = copy.deepcopy((model, optimizer))
    saved = copy.deepcopy(trained(steps=9, named=True, max_precond_dim=10, **options)[1].state_dict())
    saved["state"] = {i: state for i, state in saved["state"].items() if "GG_0" in state}
    spoil(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert train(optimizer, model, 3, start=5) == train(twin, twin_model, 3, start=5)
