"""Rounding of weights: torchao's codes, scales of least error, and GPTQ against its closed form."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.quiet import silence_libraries
from edgetune.quant.blocks import quantize_weight
from edgetune.quant.gptq import factor_hessian, gptq_codes
from edgetune.quant.rounding import (
    Codes,
    Grid,
    absmax_codes,
    codes_on_grid,
    dequantize,
    mse_codes,
    round_to_grid,
)

with silence_libraries():  # torchao warns on import
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

torch.set_num_threads(1)

GROUPS = (32, 64, None)
INT4, INT8 = torch.int4, torch.int8  # type: ignore[attr-defined]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, width: int, seed: int = 1) -> Tensor:
    """Inputs in a few directions, some of them large, as activations are."""
    directions = draw(width, width, seed=seed) * (torch.arange(1, width + 1) ** -0.7)
    return draw(tokens, width, seed=seed + 1) @ directions.t()


def values(codes: Codes, grid: Grid) -> Tensor:
    return (grid.split(codes.codes.float()) * codes.scales.float().unsqueeze(-1)).flatten(1)


def output_error(x: Tensor, weight: Tensor, codes: Codes, grid: Grid) -> float:
    return float((x @ (values(codes, grid) - weight).t()).norm() / (x @ weight.t()).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rounds_activations", [True, False])
def test_absmax_is_torchaos_to_the_bit(
    dtype: torch.dtype, group_size: int | None, bits: int, rounds_activations: bool
) -> None:
    layer = nn.Linear(128, 24, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(draw(24, 128))
        layer.weight[3] = 0.0
        layer.weight[5] *= 1e-3
    weight = layer.weight.detach().clone()
    grain = PerAxis(0) if group_size is None else PerGroup(group_size)
    scale_dtype = {4: torch.bfloat16, 8: torch.float32}[bits] if rounds_activations else None
    config: Any = IntxWeightOnlyConfig({4: INT4, 8: INT8}[bits], grain)
    if rounds_activations:
        config = Int8DynamicActivationIntxWeightConfig({4: INT4, 8: INT8}[bits], grain, weight_scale_dtype=scale_dtype)
    with silence_libraries():
        quantize_(layer, config, filter_fn=lambda *_: True)
    ours: Any = quantize_weight(weight, Grid(bits, group_size, scale_dtype), rounds_activations=rounds_activations)
    assert repr(ours) == repr(layer.weight)
    for part in ours.tensor_data_names:
        left, right = getattr(ours, part), getattr(layer.weight, part)
        assert left.dtype == right.dtype
        assert torch.equal(left, right), part


@pytest.mark.parametrize("group_size", GROUPS)
def test_mse_scales_have_less_error_than_absmax(group_size: int | None) -> None:
    grid, weight = Grid(4, group_size, torch.bfloat16), draw(48, 128)
    weight[7] = 0.0
    errors = [(values(rule(weight, grid), grid) - weight).square().sum(1) for rule in (mse_codes, absmax_codes)]
    assert (errors[0] <= errors[1] * 1.0001).all()
    assert errors[0].sum() < 0.95 * errors[1].sum()
    scales = mse_codes(weight, grid).scales
    assert scales.dtype == torch.bfloat16
    assert (scales.float() >= torch.finfo(torch.float32).smallest_normal).all(), "XNNPACK refuses smaller ones"


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_has_less_output_error_than_rounding(group_size: int | None, bits: int) -> None:
    x, other, weight = correlated(800, 192), correlated(800, 192)[::2] * 1.3, draw(64, 192, seed=9)
    grid, factor = Grid(bits, group_size, torch.bfloat16 if bits == 4 else None), factor_hessian(x.t() @ x, "layer")
    codes = gptq_codes(weight, grid, factor)
    assert codes.codes.dtype == torch.int8
    assert grid.lowest <= int(codes.codes.min()) < int(codes.codes.max()) <= grid.highest
    for inputs in (x, other):
        rounded = min(output_error(inputs, weight, rule(weight, grid), grid) for rule in (absmax_codes, mse_codes))
        assert output_error(inputs, weight, codes, grid) < 0.6 * rounded
    again = gptq_codes(weight, grid, factor_hessian(x.t() @ x, "layer"))
    assert torch.equal(codes.codes, again.codes)


def closed_form(weight: Tensor, hessian: Tensor, scales: Tensor, grid: Grid, order: list[int]) -> Tensor:
    """Equations 2 and 3 of the paper: the inverse of what remains of the Hessian, computed anew for each column."""
    weight, codes, left = weight.double(), torch.zeros_like(weight), list(order)
    for column in order:
        scale = scales[:, column // grid.inputs_per_scale(weight.shape[1])].double()
        codes[:, column] = grid.round(weight[:, column] / scale).float()
        inverse = torch.linalg.inv(hessian.double()[left][:, left])
        error = (weight[:, column] - codes[:, column] * scale) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0][None]
        left.remove(column)
    return codes


@pytest.mark.parametrize("group_size", [32, None])
def test_gptq_is_its_closed_form(group_size: int | None) -> None:
    x, weight, grid = correlated(400, 160), draw(12, 160), Grid(4, group_size)
    hessian = x.t() @ x
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(160)
    codes = gptq_codes(weight, grid, factor_hessian(hessian, "layer"))
    order = hessian.diagonal().argsort(descending=True).tolist()
    expected = closed_form(weight, damped, codes.scales, grid, order)
    assert (codes.codes == expected).float().mean() > 0.995, "but for ties that single precision rounds otherwise"


def test_inputs_that_are_independent_correct_nothing() -> None:
    weight, grid = draw(16, 64), Grid(4, 32, torch.bfloat16)
    rounded = mse_codes(weight, grid)
    for hessian in (torch.eye(64), torch.zeros(64, 64), torch.diag(torch.arange(64.0))):
        codes = gptq_codes(weight, grid, factor_hessian(hessian, "layer"))
        assert torch.equal(codes.codes, rounded.codes)
        assert torch.equal(codes.scales, rounded.scales)


@pytest.mark.parametrize("case", ["one token", "dead inputs", "a constant input", "tiny", "huge"])
def test_hessians_that_are_hardly_one(case: str) -> None:
    x, weight, grid = correlated(200, 64), draw(16, 64), Grid(4, 32, torch.bfloat16)
    x = {
        "one token": x[:1],
        "dead inputs": x * (torch.arange(64) % 3 > 0),
        "a constant input": torch.cat([torch.full((200, 1), 5.0), x[:, 1:]], 1),
        "tiny": x * 1e-12,
        "huge": x * 1e12,
    }[case]
    codes = gptq_codes(weight, grid, factor_hessian(x.t() @ x, "layer"))
    assert output_error(x, weight, codes, grid) < 0.8 * output_error(x, weight, mse_codes(weight, grid), grid)
    assert torch.isfinite(values(codes, grid)).all()
    assert (values(codes, grid) - weight).abs().max() < 1.5


def test_damping_grows_until_a_factor_exists() -> None:
    x = correlated(300, 64)
    hessian = x.t() @ x
    mean = hessian.diagonal().mean()
    almost = hessian - 0.05 * mean * torch.eye(64)  # its least eigenvalue is negative
    assert torch.isfinite(factor_hessian(almost, "layer").inverse).all()
    with pytest.raises(EdgetuneError, match=r"blocks\.3\.up: GPTQ cannot factor the Hessian of a layer[\s\S]*absmax"):
        factor_hessian(hessian - 30 * mean * torch.eye(64), "blocks.3.up")


def test_rows_are_rounded_alike_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.quant import blocks

    x, weight = correlated(300, 64), draw(50, 64)
    rule = partial(gptq_codes, factor=factor_hessian(x.t() @ x, "layer"))
    grid = Grid(4, 32, torch.bfloat16)
    whole: Any = quantize_weight(weight, grid, rule, rounds_activations=True)
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 7 * 64)
    parts: Any = quantize_weight(weight, grid, rule, rounds_activations=True)
    assert torch.equal(whole.scale, parts.scale)
    assert (whole.qdata == parts.qdata).float().mean() > 0.995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("bits", "scale_dtype"), [(4, torch.bfloat16), (8, torch.float32), (8, None), (4, None)])
def test_a_weight_on_the_grid_keeps_its_values_whatever_the_rule(
    dtype: torch.dtype, group_size: int | None, bits: int, scale_dtype: torch.dtype | None
) -> None:
    x, weight, grid = correlated(300, 128), draw(24, 128).to(dtype), Grid(bits, group_size, scale_dtype)
    weight[3], weight[5], weight[6, 1:] = 0.0, weight[5] * 1e-3, 0.0
    for rule in (absmax_codes, mse_codes, partial(gptq_codes, factor=factor_hessian(x.t() @ x, "layer"))):
        first = grid if bits == 4 else Grid(bits, group_size)  # a weight of 16 bits does not tell a finer scale
        once = dequantize(round_to_grid(weight, first, rule), first, dtype)
        once[:, 64:] *= once[:, 64:].abs() < once.abs().amax()  # the largest code of some groups is a lesser one
        again = round_to_grid(once, grid, rule)
        assert torch.equal(dequantize(again, grid, dtype), once)
        assert again.scales.dtype == (scale_dtype or dtype)
        assert (again.scales >= torch.finfo(again.scales.dtype).smallest_normal).all()
        changed = once.clone()
        changed[7, changed[7].abs().argmin()] += 1e-3
        assert codes_on_grid(changed, grid) is None
        assert all(map(torch.equal, round_to_grid(changed, grid, rule), rule(changed, grid)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_ordinary_weight_is_on_no_grid(dtype: torch.dtype, bits: int) -> None:
    weight = draw(24, 128).to(dtype)
    assert codes_on_grid(weight, Grid(bits, 32, torch.bfloat16)) is None
    weight[0] = 0.0
    assert codes_on_grid(weight, Grid(bits, 32, torch.bfloat16)) is None
    assert codes_on_grid(torch.full((2, 32), torch.nan), Grid(bits, 32)) is None
    constant = codes_on_grid(torch.full((2, 32), 0.37, dtype=torch.bfloat16), Grid(bits, 32))
    assert constant is not None
    assert torch.equal(dequantize(constant, Grid(bits, 32), torch.bfloat16), torch.full((2, 32), 0.37).bfloat16())
