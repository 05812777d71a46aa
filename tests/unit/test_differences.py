"""What the tests of exact resuming compare states with."""

from pathlib import Path

import pytest
import torch

from tests.differences import differences, file_differences


def test_a_difference_of_one_bit_a_dtype_or_a_key_is_seen() -> None:
    tensor = torch.tensor([0.0, 1.0])
    assert differences({"a": [tensor, 1.5]}, {"a": [tensor.clone(), 1.5]}) == []
    assert differences({"a": [tensor]}, {"a": [torch.tensor([-0.0, 1.0])]}) == ["/a/0: 1 bytes"]
    assert differences([tensor], [tensor.double()]) == ["/0: torch.float32 (2,) and torch.float64 (2,)"]
    assert differences({"a": 1}, {"b": 1}) == [": keys ['a'] and ['b']"]
    assert differences({"a": 1.0}, {"a": 1.0 + 2**-52}) == ["/a: 1.0 and 1.0000000000000002"]
    assert differences([1], [1, 2]) == [": 1 and 2 entries"]
    assert differences([1], [1.0]) == ["/0: int and float"]


def test_files_are_compared_by_what_is_in_them(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "same", "other", "empty")]
    for path, value in zip(paths, ({"a": 1}, {"a": 1}, {"a": 2}, {}), strict=True):
        torch.save(value, path)
    one, same, other, empty = paths
    assert file_differences(one, same) == []
    assert file_differences(one, other) == ["/a: 1 and 2"]
    with pytest.raises(AssertionError, match="nothing is saved"):
        file_differences(empty, empty)
