"""Wide depthwise convolutions as sums of narrow ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgetune.capture.repairs.depthwise import rows_around_the_centre
from edgetune.core.technique import Sample
from edgetune.export import export
from edgetune.program.operators import Operator
from edgetune.quant.int8 import Int8


def windows(operators: tuple[Operator, ...]) -> list[int]:
    return [operator.window for operator in operators if operator.kind == "depthwise-conv"]


def network(kernel: int | tuple[int, int], **settings: object) -> nn.Module:
    torch.manual_seed(0)
    depthwise = nn.Conv2d(16, 16, kernel, groups=16, **settings)  # type: ignore[arg-type]
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), depthwise, nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()


@given(st.integers(1, 40), st.integers(1, 12))
def test_the_sets_hold_every_row_once_and_lie_around_the_centre(count: int, most: int) -> None:
    sets = rows_around_the_centre(count, most)
    if sets:
        assert sorted(row for rows in sets for row in rows) == list(range(count))
        assert all(rows[0] + rows[-1] == count - 1 and len(rows) <= most for rows in sets)
    else:
        assert most == 1 < count


@pytest.mark.parametrize(
    ("kernel", "settings", "expected"),
    [
        (7, {"padding": 3}, [21, 14, 14]),
        (7, {"padding": 3, "stride": 2, "bias": False}, [21, 14, 14]),
        (7, {"padding": 6, "dilation": 2}, [21, 14, 14]),
        (9, {"padding": 4}, [18, 18, 18, 18, 9]),
        (6, {"padding": 3}, [12, 24]),
        ((1, 31), {"padding": (0, 15)}, [16, 15]),
        ((31, 1), {"padding": (15, 0)}, [16, 15]),
        (7, {"padding": 0}, [49]),  # its parts would need to read less than all of the picture
        (5, {"padding": 2}, [25]),
    ],
)
def test_a_program_of_narrow_windows_equals_eager_mode(
    kernel: int | tuple[int, int], settings: dict[str, object], expected: list[int], tmp_path: Path
) -> None:
    model = network(kernel, **settings)
    call = export(model, torch.randn(2, 3, 33, 34), tmp_path / "model.pte", one_row=True).manifest.main
    assert windows(call.executed) == expected
    assert call.delegated_operators_pct == 100
    assert call.parity is not None
    assert call.parity.max_relative_difference is not None
    assert call.parity.max_relative_difference < 1e-5


def test_in_8_bits_the_sums_are_rounded_as_xnnpack_rounds_them(tmp_path: Path) -> None:
    """By training rows' ranges, partial sums included; the error stays that of one rounding more."""
    model, rows = network(7, padding=3), torch.randn(32, 3, 24, 24)
    expected = model(rows)
    quantized = Int8().apply(model, Sample(rows[:1], lambda: iter([rows])))
    call = export(quantized, rows, tmp_path / "model.pte", one_row=True).manifest.main
    assert windows(call.executed) == [21, 14, 14]
    assert call.parity is not None
    assert call.parity.max_abs_difference == 0
    noise = (quantized(rows) - expected).square().mean() / expected.square().mean()
    assert noise < 10**-2.5  # 25 dB
