"""Routing: every trainable parameter goes to one place, for a stated reason."""

import pytest
import torch
from torch import nn

from emerging_optimizers.routing import route_parameters
from emerging_optimizers.soap import SOAP


class Tied(nn.Module):
    """An embedding whose weight the head shares, a shared layer, a frozen one, a convolution and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.depthwise = nn.Parameter(torch.ones(7, 1, 1))
        self.mix = nn.Linear(4, 4)
        self.again = self.mix
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.tokens.weight


def routes(model: nn.Module, **options: object) -> dict[str, tuple[str, str]]:
    return {r.name: (r.optimizer, r.reason) for r in route_parameters(model, **options).routes}


def test_each_kind_of_parameter_goes_where_it_belongs() -> None:
    assert routes(Tied()) == {
        "depthwise": ("adamw", "fewer than 2 axes"),
        "scale": ("adamw", "fewer than 2 axes"),
        "tokens.weight": ("adamw", "embedding"),
        "conv.weight": ("soap", "3 axes"),
        "conv.bias": ("adamw", "fewer than 2 axes"),
        "mix.weight": ("soap", "matrix"),
        "mix.bias": ("adamw", "fewer than 2 axes"),
        "frozen.weight": ("frozen", "requires_grad is off"),
        "frozen.bias": ("frozen", "requires_grad is off"),
    }


def test_no_trainable_parameter_is_dropped_or_doubled() -> None:
    model = Tied()
    groups = route_parameters(model).param_groups(soap={"precondition_frequency": 5}, adamw={"lr": 1e-3})
    ids = [id(p) for group in groups for _, p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = SOAP(groups, lr=1e-2)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 1e-3]
    assert [g["precondition_frequency"] for g in optimizer.param_groups] == [5, 1]
    assert [g["max_precond_dim"] for g in optimizer.param_groups] == [10000, 0]
    assert optimizer.param_groups[0]["param_names"] == ["conv.weight", "mix.weight"]


def test_groups_of_others_keep_their_options_and_are_divided() -> None:
    model = Tied()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [(name, p) for name, p in model.named_parameters() if p.ndim < 2]
    others = [
        {"params": decayed, "weight_decay": 0.1, "lr_scale": 0.5},
        {"params": rest, "weight_decay": 0.0, "lr": 1e-3, "param_names": ["torch's", "own"]},
    ]
    optimizer = SOAP(route_parameters(model).split(others), lr=1e-2)
    keys = ("weight_decay", "lr", "max_precond_dim", "lr_scale", "param_names")
    assert [[group.get(key) for key in keys] for group in optimizer.param_groups] == [
        [0.1, 1e-2, 10000, 0.5, ["conv.weight", "mix.weight"]],
        [0.1, 1e-2, 0, 0.5, ["depthwise", "tokens.weight"]],
        [0.0, 1e-3, 0, None, ["scale", "conv.bias", "mix.bias"]],
    ]
    assert others[0]["params"] is decayed, "what was given is not changed"
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_group_of_one_tensor_or_a_generator_is_divided() -> None:
    model = Tied()
    groups = [{"params": model.mix.weight}, {"params": (p for p in [model.mix.bias, model.frozen.bias])}]
    matrices, vectors = route_parameters(model).split(groups)
    assert matrices == {"params": [("mix.weight", model.mix.weight)]}
    assert vectors == {"params": [("mix.bias", model.mix.bias)], "max_precond_dim": 0}


def test_a_group_with_another_models_parameter_is_refused() -> None:
    groups = [{"params": [Tied().mix.weight]}]
    with pytest.raises(ValueError, match=r"parameter group 0 has a parameter of shape \(4, 4\) that is not the routed"):
        route_parameters(Tied()).split(groups)


def test_the_last_linear_is_the_head_unless_another_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3))
    assert routes(model)["2.weight"] == ("adamw", "output head")
    assert routes(model, head="0")["0.weight"] == ("adamw", "output head")
    assert routes(model, head="0")["2.weight"] == ("soap", "matrix")
    assert routes(model, head=None)["2.weight"] == ("soap", "matrix")
    assert routes(nn.Sequential(nn.Linear(4, 5)))["0.weight"] == ("soap", "matrix"), "a lone layer is no head"


def test_names_overrule_the_rules() -> None:
    assert routes(Tied(), adamw=["conv"])["conv.weight"] == ("adamw", "as asked")
    assert routes(Tied(), soap="head")["tokens.weight"] == ("soap", "as asked"), "the shared weight's other name"
    assert routes(Tied(), soap=["tokens.weight"])["tokens.weight"] == ("soap", "as asked")


def test_a_kind_without_parameters_makes_no_group() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    (group,) = route_parameters(model).param_groups()
    assert group["max_precond_dim"] == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"adamw": ["mux"]}, ValueError, "adamw names 'mux', which is neither a parameter nor a module"),
        ({"soap": ["mix."]}, ValueError, "soap names 'mix.'"),
        ({"head": "lm_head"}, ValueError, "head names 'lm_head'"),
        ({"soap": ["mix"], "adamw": ["mix.weight"]}, ValueError, "'mix.weight' is asked for in adamw and in soap"),
    ],
)
def test_a_wrong_name_is_said(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        route_parameters(Tied(), **options)


def test_a_list_of_parameters_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        route_parameters([])


def test_the_table_has_a_line_per_parameter_and_the_totals() -> None:
    lines = str(route_parameters(Tied())).splitlines()
    assert len(lines) == 9 + 3
    assert lines[-3:] == [
        "soap: 2 tensors, 64 parameters",
        "adamw: 5 tensors, 52 parameters",
        "frozen: 2 tensors, 20 parameters",
    ]
