"""WeightDecayMixin as another optimizer would use it."""

import pytest
import torch
from torch import nn

from emerging_optimizers.mixin import WeightDecayMixin

ROUNDING = 4 * torch.finfo(torch.float64).eps  # one of each operation


class SGD(WeightDecayMixin, torch.optim.Optimizer):
    """The least optimizer with all three methods."""

    def __init__(self, params: object, lr: float, weight_decay: float, weight_decay_method: str) -> None:
        self.validate_weight_decay(weight_decay, weight_decay_method)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "weight_decay_method": weight_decay_method})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                grad = self.regularized_grad(p.grad, p, group)
                self.decay_weight_(p, group)
                p.sub_(group["lr"] * grad)


@pytest.mark.parametrize(
    ("method", "expected"),
    [("decoupled", 2 - 0.5 * 0.1 * 2 - 0.5), ("independent", 2 - 0.1 * 2 - 0.5), ("l2", 2 - 0.6)],
)
@pytest.mark.parametrize("lr", [0.5, torch.tensor([0.5], dtype=torch.float64)])
def test_each_method_follows_its_formula(method: str, expected: float, lr: float) -> None:
    p = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    p.grad = torch.ones(1, dtype=torch.float64)
    SGD([p], lr, 0.1, method).step()
    assert p.item() == pytest.approx(expected, rel=ROUNDING)
    assert p.grad.item() == 1.0


@pytest.mark.parametrize("finite", [True, False])
def test_a_mask_holds_the_decay_back(finite: bool) -> None:
    group = {"lr": 1.0, "weight_decay": 0.1, "weight_decay_method": "decoupled"}
    weight = torch.ones(2, dtype=torch.float64)
    WeightDecayMixin.decay_weight_(weight, group, torch.tensor(finite))
    assert weight.tolist() == pytest.approx([0.9 if finite else 1.0] * 2, rel=ROUNDING)


@pytest.mark.parametrize("lr", [0.003, torch.tensor(0.003)])
def test_a_low_precision_weight_is_decayed_in_float32(lr: float) -> None:
    weight = torch.linspace(1, 2, 100).to(torch.bfloat16)
    expected = (weight.float() * (1 - 0.003)).to(torch.bfloat16)
    WeightDecayMixin.decay_weight_(weight, {"lr": lr, "weight_decay": 1.0, "weight_decay_method": "decoupled"})
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_a_learning_rate_of_zero_decays_nothing(lr: float) -> None:
    for method in ("decoupled", "independent", "l2"):
        weight = torch.ones(2)
        WeightDecayMixin.decay_weight_(weight, {"lr": lr, "weight_decay": 0.1, "weight_decay_method": method})
        assert weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("value", "method", "error"),
    [
        (-1.0, "l2", ValueError),
        (float("inf"), "l2", ValueError),
        ("x", "l2", TypeError),
        (torch.tensor(0.1), "l2", TypeError),
        (0.1, "L2", ValueError),
    ],
)
def test_bad_options_are_named(value: object, method: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="Invalid weight_decay"):
        SGD([nn.Parameter(torch.ones(1))], 0.1, value, method)
