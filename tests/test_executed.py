"""What the runtime executes, read from the program: real models, lowered here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edgetune.capture.positional import Positional
from edgetune.core.errors import EdgetuneError
from edgetune.core.quiet import silence_libraries
from edgetune.core.technique import Sample
from edgetune.export import Artifact, export
from edgetune.export.lower import Lowered, lower, lower_methods
from edgetune.export.targets import find
from edgetune.profile import cost, device, terms
from edgetune.program.executed import executed_operators
from edgetune.program.operators import Operator
from edgetune.quant.int4 import Int4
from edgetune.quant.int8 import Int8
from support.target_models import IDS, IMAGE, Cnn, Transformer, needs


def lowered(model: nn.Module, x: torch.Tensor, target: str = "xnnpack") -> Lowered:
    return lower(Positional(model.eval(), x).eval(), (x,), find(target))


def names(operators: tuple[Operator, ...]) -> list[str]:
    return [operator.operator.removeprefix("xnnpack.") for operator in operators]


def macs_of(model: nn.Module, x: torch.Tensor) -> int:
    # the counter knows attention by its two products, not by the CPU's fused kernel
    with FlopCounterMode(display=False) as counted, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(x)
    return counted.get_total_flops() // 2


@pytest.fixture(scope="module")
def cnn() -> Lowered:
    return lowered(Cnn(), IMAGE)


@pytest.fixture(scope="module")
def transformer() -> Lowered:
    return lowered(Transformer(), IDS)


@pytest.fixture(scope="module")
def int8() -> Lowered:
    with silence_libraries():
        return lowered(Int8().apply(Cnn().eval(), Sample.of(IMAGE)), IMAGE)


@pytest.fixture(scope="module")
def int4() -> Lowered:
    return lowered(Int4().apply(Transformer().eval()), IDS)


def test_norm_and_clamp_are_in_the_convolution_and_a_transpose_is_before_it(cnn: Lowered) -> None:
    assert names(cnn.executed) == [
        "static-transpose", "conv2d", "depthwise-conv2d", "conv2d", "hardswish", "global-avg-pooling2d",
        "static-transpose", "static-reshape", "fully-connected",
    ]  # fmt: skip
    assert any("relu" in operator.operator for operator in cnn.operators)
    assert all(operator.delegated for operator in cnn.executed)


def test_sizes_are_those_of_the_layers(cnn: Lowered) -> None:
    stem, depth, point = (operator for operator in cnn.executed if "conv" in operator.kind)
    assert (stem.kind, stem.output_shape, stem.window, stem.columns, stem.groups) == ("conv", (1, 8, 8, 16), 9, 16, 1)
    assert (stem.macs, stem.weight_bytes) == (8 * 8 * 16 * 9 * 3, 4 * (16 * 9 * 3 + 16))
    assert stem.activation_bytes == 4 * (16 * 16 * 3 + 8 * 8 * 16)
    assert (depth.kind, depth.macs, depth.window) == ("depthwise-conv", 8 * 8 * 16 * 9, 9)
    assert (point.kind, point.columns, point.window) == ("pointwise-conv", 32, 1)
    pool, head = cnn.executed[5], cnn.executed[-1]
    assert (pool.kind, pool.window) == ("reduction", 64)
    assert (head.kind, head.output_shape, head.weight_bytes) == ("linear", (1, 4), 4 * (4 * 32 + 4))


def test_layers_keep_the_names_of_the_users_modules(cnn: Lowered, transformer: Lowered) -> None:
    assert [operator.module for operator in cnn.executed if operator.macs] == ["body.0", "body.3", "body.5", "head"]
    layers = [operator.module for operator in transformer.executed if operator.kind == "linear"]
    assert layers == ["qkv", "out", "up", "down", "head"]
    assert {operator.module for operator in transformer.executed if not operator.delegated} == {"table", "norm"}


@pytest.mark.parametrize("form", ["cnn", "transformer", "int8", "int4"])
def test_multiplications_are_those_that_torch_counts(form: str, request: pytest.FixtureRequest) -> None:
    found: Lowered = request.getfixturevalue(form)
    model, x = (Cnn(), IMAGE) if form in ("cnn", "int8") else (Transformer(), IDS)
    assert sum(operator.macs for operator in found.executed) == macs_of(model.eval(), x)


class Upward(nn.Module):
    """Convolutions that are counted in ways of their own: transposed, and in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.grouped(self.up(x))


@pytest.mark.parametrize("target", ["xnnpack", "portable"])
def test_transposed_and_grouped_convolutions_are_counted(target: str) -> None:
    x = torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    found = lowered(Upward(), x, target).executed
    layers = {operator.module: operator for operator in found if operator.macs}
    assert set(layers) == {"up", "grouped"}
    assert sum(operator.macs for operator in found) == macs_of(Upward(), x)
    if target == "xnnpack":
        assert (layers["grouped"].groups, layers["grouped"].columns, layers["grouped"].window) == (2, 3, 9)


def test_conversions_stand_around_what_is_in_eight_bits(int8: Lowered) -> None:
    found = names(int8.executed)
    assert found[0] == "convert-fp32-qint8"
    assert found[-1] == "convert-qint8-fp32"
    # hardswish has no 8-bit form: out of it and in again, which XNNPACK makes one lookup
    assert "hardswish" not in found
    lookup = int8.executed[found.index("lookup")]
    assert (lookup.module, lookup.dtype, lookup.kind) == ("body.6", "int8", "elementwise")
    assert lookup.activation_bytes == 2 * 8 * 8 * 32
    layers = [operator for operator in int8.executed if operator.macs]
    assert {operator.dtype for operator in layers} == {"int8"}
    stem = layers[0]
    assert stem.weight_bytes == 16 * 9 * 3 + 4 * 16 + 2 * 4 * 16  # a byte each, biases, a scale of both by channel
    assert stem.activation_bytes == 16 * 16 * 3 + 8 * 8 * 16


def test_a_conversion_stands_before_each_layer_in_four_bits(int4: Lowered) -> None:
    found = names(int4.executed)
    layers = [place for place, operator in enumerate(int4.executed) if operator.kind == "linear"]
    assert len(layers) == 5
    for place in layers:
        assert found[place - 1] == "convert-fp32-qdint8"
        assert int4.executed[place].dtype == "8da4w"
    query = int4.executed[layers[0]]
    assert query.weight_bytes == 96 * 32 // 2 + 2 * 96 + 4 * 96  # half a byte each, a group of 32 by row, biases
    table = int4.executed[0]
    assert (table.operator, table.kind) == ("quantized_decomposed.embedding_byte.out", "embedding")
    assert not table.delegated


def test_attention_is_two_products_for_each_head(transformer: Lowered) -> None:
    scores, values = (operator for operator in transformer.executed if operator.kind == "matmul")
    assert (scores.output_shape, scores.groups, scores.macs, scores.weight_bytes) == ((2, 8, 8), 2, 2 * 8 * 8 * 16, 0)
    assert (values.output_shape, values.groups, values.macs) == ((2, 8, 16), 2, 2 * 8 * 8 * 16)
    turned = [operator for operator in transformer.executed if operator.operator == "xnnpack.static-transpose"]
    assert sorted((operator.columns, operator.window) for operator in turned) == [(8, 16), (16, 1), (16, 1)]


class Copies(nn.Module):
    """Values that change places, with an operator after each so that none is folded into the next."""

    def __init__(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.copy = copy

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Copy, then compute."""
        return self.copy(x).abs()


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 3, 1, 2), (3, 1, 0, 2), (1, 0, 2, 3), (0, 1, 3, 2)])
def test_a_transpose_tells_the_values_that_lie_side_by_side_before_and_after(order: tuple[int, ...]) -> None:
    x = torch.arange(2.0 * 3 * 1 * 5).reshape(2, 3, 1, 5)
    (found, *_) = lowered(Copies(lambda x: x.permute(order).clone()), x).executed
    places = x.permute(order).flatten().diff()  # how far apart neighbours lay
    run = int((places != places[0]).nonzero()[0]) + 1 if bool((places != places[0]).any()) else x.numel()
    back = torch.empty(x.numel()).scatter(0, x.permute(order).flatten().long(), torch.arange(x.numel() * 1.0)).diff()
    before = int((back != back[0]).nonzero()[0]) + 1 if bool((back != back[0]).any()) else x.numel()
    assert found.operator == "xnnpack.static-transpose"
    assert (found.columns, found.window) == (run, 1 if places[0] == 1 else before)


@pytest.mark.parametrize(("axis", "together"), [(1, 3 * 4), (2, 4)])
def test_a_concatenation_tells_the_values_of_one_piece(axis: int, together: int) -> None:
    x = torch.ones(2, 3, 4)
    found = lowered(Copies(lambda x: torch.cat((x.exp(), x.neg(), x.sqrt()), axis)), x).executed
    (joined,) = (operator for operator in found if operator.operator == "xnnpack.concatenate")
    assert (joined.kind, joined.columns) == ("data-movement", together)


def test_tables_count_the_rows_that_are_read(transformer: Lowered) -> None:
    table, norm = transformer.executed[:2]
    assert (table.kind, table.weight_bytes, table.delegated) == ("embedding", 8 * 32 * 4, False)
    assert (norm.operator, norm.weight_bytes) == ("aten.native_layer_norm.out", 2 * 32 * 4)


def test_portable_kernels_alone() -> None:
    found = lowered(Transformer(), IDS, "portable").executed
    assert not any(operator.delegated for operator in found)
    assert sum(operator.macs for operator in found) == macs_of(Transformer().eval(), IDS)
    assert "aten.bmm.out" in names(found)
    assert not any("view" in name or "alloc" in name for name in names(found))


class Cut(nn.Module):
    """Parts for the backend with a kernel between them that it does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cumsum(layer(x), -1)
        return x


def test_every_delegate_is_read() -> None:
    found = lowered(Cut(), torch.randn(2, 8))
    assert found.delegates == 3
    assert terms.delegate_calls_of(found.executed) == 3
    assert Counter(names(found.executed)) == {"fully-connected": 3, "aten.cumsum.out": 3}
    assert [operator.module for operator in found.executed if operator.delegated] == [f"layers.{n}" for n in range(3)]


def test_the_file_alone_says_the_same_without_names(cnn: Lowered) -> None:
    read = executed_operators(cnn.data)
    assert {operator.module for operator in read} == {""}
    assert read == tuple(operator.model_copy(update={"module": ""}) for operator in cnn.executed)


def test_a_method_is_taken_by_its_name() -> None:
    x = torch.randn(1, 8)
    methods = {
        name: (Positional(model.eval(), x).eval(), (x,), ())
        for name, model in (("encode", nn.Linear(8, 8)), ("decode", Cut()))
    }
    data = lower_methods(methods, find("xnnpack"))["encode"].data
    assert names(executed_operators(data, "encode")) == ["fully-connected"]
    assert len(executed_operators(data, "decode")) == 6
    with pytest.raises(EdgetuneError, match="no such method: got 'forward'; allowed: "):
        executed_operators(data)


def test_a_backend_that_tells_nothing_is_one_operator() -> None:
    needs("vulkan")
    found = lowered(Cnn(), IMAGE, "vulkan")
    (one,) = found.executed
    assert (one.operator, one.kind, one.delegated, one.output_shape) == ("VulkanBackend", "other", True, (1, 4))
    assert one.weight_bytes > 1000
    assert one.activation_bytes == 4 * (3 * 16 * 16 + 4)
    predicted = cost.predict(found.executed, device.load("pixel-8"))
    assert math.isfinite(predicted.latency_ms)
    assert predicted.latency_ms > 0


def test_the_manifest_holds_it(tmp_path: Path) -> None:
    artifact = export(Cut(), torch.randn(1, 8), tmp_path / "cut.pte", target="xnnpack")
    call = Artifact.load(artifact.path).manifest.main
    assert len(call.executed) == 6
    assert call.executed == artifact.manifest.main.executed
    assert [operator.module for operator in call.executed if operator.delegated] == [f"layers.{n}" for n in range(3)]


@pytest.mark.parametrize("data", [b"", b"\0" * 256, b"no program at all" * 20])
def test_what_is_no_program_is_refused(data: bytes) -> None:
    with pytest.raises(EdgetuneError, match="program"):
        executed_operators(data)
