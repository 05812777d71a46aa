"""The precision of float32 products, and that the setting never leaks."""

import pytest
import torch

from emerging_optimizers.soap.precision import fp32_matmul_precision


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
