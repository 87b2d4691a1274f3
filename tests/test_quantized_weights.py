"""Models that torchao quantized: computed as in eager mode, or refused by layer before anything is lowered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nn_table import load_libraries, tried_apart
from torch import nn

from edgetune.capture.positional import Positional
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.quiet import silence_libraries
from edgetune.export import quantized_weights
from edgetune.export.lint import lint
from edgetune.export.lower import lower
from edgetune.export.targets import find
from edgetune.quant.int4 import Int4

with silence_libraries():
    import torchao.quantization as ao
    from torchao.core.config import AOBaseConfig
    from torchao.quantization.granularity import PerAxis, PerGroup, PerTensor

torch.set_num_threads(1)
ASYMMETRIC = ao.MappingType.ASYMMETRIC
INT4, INT8 = torch.int4, torch.int8  # type: ignore[attr-defined]


def dynamic(dtype: torch.dtype, scale: torch.dtype | None, grain: Any, **given: Any) -> AOBaseConfig:
    return ao.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=dtype, weight_scale_dtype=scale, weight_granularity=grain, **given
    )


LINEARS: dict[str, tuple[Callable[[], AOBaseConfig], str]] = {  # the reason for which XNNPACK's are refused, or none
    "int8 alone": (ao.Int8WeightOnlyConfig, "only torchao runs"),
    "int8 alone, groups": (lambda: ao.Int8WeightOnlyConfig(granularity=PerGroup(32)), "only torchao runs"),
    "intx 8 alone": (lambda: ao.IntxWeightOnlyConfig(INT8, PerAxis(0)), "weights alone"),
    "intx 4 alone": (lambda: ao.IntxWeightOnlyConfig(INT4, PerGroup(32)), "weights alone"),
    "8da4w": (lambda: dynamic(INT4, torch.bfloat16, PerGroup(32)), ""),
    "8da4w, per channel": (lambda: dynamic(INT4, torch.bfloat16, PerAxis(0)), ""),
    "8da4w, fp32 scales": (lambda: dynamic(INT4, None, PerGroup(32)), "rounds to bf16"),
    "8da4w, fp32 per channel": (lambda: dynamic(INT4, None, PerAxis(0)), "rounds to bf16"),
    "8da4w, fp16 scales": (lambda: dynamic(INT4, torch.float16, PerGroup(32)), "rounds to bf16"),
    "8da4w, asymmetric": (
        lambda: dynamic(INT4, torch.bfloat16, PerGroup(32), weight_mapping_type=ASYMMETRIC), "zero points"
    ),
    "8da4w, groups of 16": (lambda: dynamic(INT4, torch.bfloat16, PerGroup(16)), "multiples of 32"),
    "8da8w": (lambda: dynamic(INT8, None, PerAxis(0)), ""),
    "8da8w, bf16 scales": (lambda: dynamic(INT8, torch.bfloat16, PerAxis(0)), "reads as fp32"),
    "8da8w, groups": (lambda: dynamic(INT8, None, PerGroup(32)), "in 4 bits only"),
    "8da8w, asymmetric": (lambda: dynamic(INT8, None, PerAxis(0), weight_mapping_type=ASYMMETRIC), "zero points"),
    "int8 both": (ao.Int8DynamicActivationInt8WeightConfig, "only torchao runs"),
    "int8 static": (
        lambda: ao.Int8StaticActivationInt8WeightConfig(
            act_quant_scale=torch.tensor([[0.02]]), granularity=PerTensor()
        ),
        "only torchao runs",
    ),
    "float8 alone": (ao.Float8WeightOnlyConfig, "only torchao runs"),
}  # fmt: skip
NOT_ON_CPU = {  # want a GPU or another package: no such checkpoint can be made or opened here
    "Int4WeightOnlyConfig", "Float8StaticActivationFloat8WeightConfig",
    "Float8DynamicActivationFloat8WeightConfig", "Float8DynamicActivationInt4WeightConfig",
}  # fmt: skip
OTHERS = {"FqnToConfig"}  # which only says which layer gets which of the others


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.head = nn.Embedding(40, 64), nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.first(self.table(ids)).relu())
        return y


IDS = torch.randint(0, 40, (1, 6), generator=torch.Generator().manual_seed(0))


def quantized(config: AOBaseConfig, kind: type[nn.Module] = nn.Linear) -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    ao.quantize_(model, config, filter_fn=lambda layer, name: isinstance(layer, kind) and name != "head")
    return model


def test_every_config_of_torchao_is_tried() -> None:
    names = {n for n in vars(ao) if n.endswith("Config") and n not in ("AOPerModuleConfig", "ModuleFqnToConfig")}
    kinds = {n for n in names if isinstance(getattr(ao, n), type) and issubclass(getattr(ao, n), AOBaseConfig)}
    tried = {type(make()).__name__ for make, _ in LINEARS.values()}
    assert kinds - tried - NOT_ON_CPU - OTHERS == set()


@pytest.mark.parametrize("name", LINEARS)
def test_a_form_that_xnnpack_computes_otherwise_is_refused_by_layer(name: str) -> None:
    make, reason = LINEARS[name]
    model = quantized(make())
    found = list(quantized_weights.unsupported_layers(model, find("xnnpack")))
    assert [one.module for one in found] == (["first"] if reason else [])
    assert all(reason in one.reason for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("target", ["xnnpack", "portable"])
def test_every_form_is_right_by_values_or_refused(name: str, target: str) -> None:
    load_libraries()
    row = tried_apart(lambda: (quantized(LINEARS[name][0]()), (IDS,)), target)
    refused = bool(LINEARS[name][1]) or target == "portable"
    assert row.state == ("refused" if refused else "right"), row


@pytest.mark.parametrize(("grain", "width"), [(PerAxis(0), 48), (PerGroup(16), 48), (PerAxis(0), 33)])
def test_four_bits_of_other_widths_are_refused(grain: Any, width: int) -> None:
    model = nn.Sequential(nn.Linear(width, 64))
    ao.quantize_(model, dynamic(INT4, torch.bfloat16, grain))
    (refused,) = quantized_weights.unsupported_layers(model, find("xnnpack"))
    assert "multiples of 32" in refused.reason


TABLES: dict[str, tuple[Callable[[], AOBaseConfig], str]] = {
    "8 bits": (lambda: ao.IntxWeightOnlyConfig(INT8, PerAxis(0)), ""),
    "4 bits": (lambda: ao.IntxWeightOnlyConfig(INT4, PerGroup(32)), ""),
    "8 bits, bf16 scales": (lambda: ao.IntxWeightOnlyConfig(INT8, PerAxis(0), scale_dtype=torch.bfloat16), "bfloat16"),
    "int8": (ao.Int8WeightOnlyConfig, "only torchao runs"),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("target", ["xnnpack", "portable"])
def test_tables_are_taken_as_int4_makes_them(name: str, target: str) -> None:
    make, reason = TABLES[name]
    found = list(quantized_weights.unsupported_layers(quantized(make(), nn.Embedding), find(target)))
    assert [one.module for one in found] == (["table"] if reason else [])
    assert all(reason in one.reason for one in found)


def test_the_error_names_the_layer_and_the_form_that_works() -> None:
    model = quantized(ao.IntxWeightOnlyConfig(INT4, PerGroup(32)))
    with pytest.raises(EdgetuneError, match=r"^first: target xnnpack .*weights alone") as caught:
        lower(Positional(model, IDS).eval(), (IDS,), find("xnnpack"))
    assert "et.Int4()" in caught.value.action
    assert "bfloat16" in caught.value.action
    assert caught.value.exit_code == Exit.EXPORT
    (finding, *_) = lint(model, IDS, find("xnnpack"))
    assert (finding.severity, finding.module) == ("error", "first")
    assert "weights alone" in finding.reason


def test_what_int4_makes_is_taken() -> None:
    model = Int4(int8_linears=("first",)).apply(Net().eval())
    assert list(quantized_weights.unsupported_layers(model, find("xnnpack"))) == []
    assert list(quantized_weights.unsupported_layers(Net(), find("xnnpack"))) == []
