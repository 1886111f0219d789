"""Conditions on sizes are read, not executed."""

from __future__ import annotations

import pytest
import torch

from fastkv.kernels.size_conditions import read_condition

TENSORS = [torch.empty(2, 3), torch.empty(1, 4, 10, 8)[:, :, :5]]  # strides 3, 1 and 320, 80, 8, 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, True),
        ("L['t0'].size()[1] == 3", True),
        ("L['t1'].stride()[1] == 80 and L['t1'].size()[2] <= 5", True),
        ("L['t1'].stride()[1] == 80 and L['t1'].size()[2] < 5", False),
        ("L['t1'].stride()[1] != (8*L['t1'].size()[2])", True),
        ("L['t1'].stride()[0] == 4*L['t1'].stride()[1] and 2 <= L['t0'].size()[0]", True),
        ("(L['t1'].size()[2] % 2) == 1 or L['t0'].size()[0] > 7", True),
        ("not ((L['t1'].size()[2] // 2) - 1 + 3 >= 5)", True),
    ],
)
def test_a_condition_is_that_of_python(text: str | None, expected: bool) -> None:
    assert read_condition(text)(TENSORS) is expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "print('x')",
        "__import__('os').getcwd() == 'x'",
        "L['t0'].storage_offset() == 0",
        "L['t0'].data_ptr()[0] == 0",
        "L['x'].size()[0] == 0",
        "M['t0'].size()[0] == 0",
        "1 < 2 < 3",
        "L['t0'].size()[0] == 'a'",
        "2**9 == L['t0'].size()[0]",
    ],
)
def test_nothing_else_is_understood(text: str) -> None:
    with pytest.raises(ValueError, match="not understood"):
        read_condition(text)
