"""What the compilers make anew for each model is shared: the same graphs, and torch as it was afterwards."""

from __future__ import annotations

import contextlib
import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from edgetune.core.quiet import silence_libraries
from edgetune.export import lower
from edgetune.export.language.cached import CachedDecoder
from edgetune.export.pass_cache import fast_decompositions, fast_lowering
from edgetune.export.replayed_values import keep_values
from edgetune.export.shape_rules import infer_shapes
from edgetune.export.targets import TARGETS
from edgetune.quant import pt2e
from edgetune.quant.int4 import Int4
from support.decoders import llama


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return self.head(F.scaled_dot_product_attention(x, x, x)).softmax(-1)


def decompose(preserved: list[Any]) -> str:
    torch.manual_seed(0)
    with silence_libraries():
        program = torch.export.export(Mixed().eval(), (torch.randn(1, 3, 6, 6),), strict=False)
        table = torch.export.default_decompositions()
        for operator in preserved:
            table.pop(operator)
        return str(program.run_decompositions(table).graph_module.code)


def python_kernels() -> dict[str, dict[Any, Any]]:
    packets = [getattr(torch.ops.aten, name) for name in torch.ops.aten]
    operators = [getattr(packet, overload) for packet in packets for overload in packet.overloads()]
    return {str(operator): dict(operator.py_kernels) for operator in operators}


def test_the_graphs_are_those_that_torch_makes_alone() -> None:
    aten = torch.ops.aten
    wishes = [[], [aten.linear.default, aten.scaled_dot_product_attention.default], [aten.silu.default], []]
    stock = [decompose(preserved) for preserved in wishes]
    assert len(set(stock)) == 3, "what is preserved must show"
    before = python_kernels()
    assert len(before) > 100
    with fast_decompositions():
        first = [decompose(preserved) for preserved in wishes]
        with fast_decompositions():
            again = [decompose(preserved) for preserved in wishes]
    assert first == stock
    assert again == stock
    assert python_kernels() == before


def test_a_decomposition_that_would_change_nothing_is_left_out() -> None:
    with silence_libraries():
        program = torch.export.export(Mixed().eval(), (torch.randn(1, 3, 6, 6),), strict=False)
        table = torch.export.default_decompositions()
        silu = table.pop(torch.ops.aten.silu.default)
        program = program.run_decompositions(table)
        with fast_lowering():
            assert program.run_decompositions({}) is program
            first = program.run_decompositions(table)
            assert first is not program, "the caller may change it"
            assert first.run_decompositions(table) is first
            whole = first.run_decompositions({**table, torch.ops.aten.silu.default: silu})
    assert "silu" in first.graph_module.code
    assert "silu" not in whole.graph_module.code


def test_a_graph_is_compiled_when_it_is_called_or_its_code_is_read() -> None:
    x = torch.randn(2, 3)
    module = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Sigmoid()))
    expected, code = module(x), module.code
    sigmoid = next(node for node in module.graph.nodes if node.name == "_2")
    with silence_libraries(), fast_lowering():
        module.recompile()
        assert "_code" not in vars(module)
        assert torch.equal(module(x), expected)
        sigmoid.replace_all_uses_with(sigmoid.args[0])
        module.graph.erase_node(sigmoid)
        module.recompile()
    assert module.code != code
    assert torch.equal(module(x).sigmoid(), expected)


def test_an_operator_registered_meanwhile_is_seen() -> None:
    from torch.export import exported_program

    with fast_decompositions():
        before = exported_program._collect_all_valid_cia_ops()
        with torch.library._scoped_library("edgetune_test_speed", "DEF") as library:
            library.define("twice(Tensor x) -> Tensor")
            library.impl("twice", lambda x: x * 2, "CompositeImplicitAutograd")
            added = exported_program._collect_all_valid_cia_ops() - before
    assert {str(operator) for operator in added} == {"edgetune_test_speed.twice.default"}


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).flatten(1))


def test_the_quantizer_annotates_what_it_does_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, pixels = Normalized().eval(), torch.randn(4, 3, 6, 6)

    def quantize() -> fx.GraphModule:
        return pt2e.quantize_static(copy.deepcopy(model), pixels, [pixels], per_channel=True)[0]

    fast = quantize()
    monkeypatch.setattr(pt2e, "fast_annotation", contextlib.nullcontext)
    stock = quantize()
    assert fast.code == stock.code
    assert "dequantize_per_channel" in fast.code
    assert torch.equal(fast(pixels), stock(pixels))


@pytest.mark.parametrize(
    ("shape", "block"), [((2, 3, 8), [1, 1, 8]), ((6, 64), [1, 32]), ((6, 64), [1, 64]), ((5,), [5])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keepdim", [False, True])
def test_shapes_of_quantized_operators_are_those_that_torchao_computes(
    shape: tuple[int, ...], block: list[int], dtype: torch.dtype, keepdim: bool
) -> None:
    with silence_libraries():
        importlib.import_module("torchao.quantization")  # registers the operators
    torchao = torch.ops.torchao

    def shapes() -> list[Any]:
        with FakeTensorMode():
            values, results = torch.empty(shape, dtype=dtype), []
            for mapping in ("SYMMETRIC", "ASYMMETRIC"):
                for zeros in (None, torch.int8):
                    settings = (mapping, block, torch.int8, -128, 127, None, None, zeros, keepdim)
                    scale, zero_point = torchao.choose_qparams_affine(values, *settings)
                    integers = torchao.quantize_affine(values, block, scale, zero_point, torch.int8, -128, 127)
                    back = torchao.dequantize_affine(integers, block, scale, zero_point, torch.int8, output_dtype=dtype)
                    results += [scale, zero_point, integers, back]
            results.append(torchao.quantize_affine(values, block, scale, zero_point, torch.uint4))
        return [(type(result), result.shape, result.dtype, result.stride()) for result in results]

    computed = shapes()
    with infer_shapes(), Calls() as calls:
        assert shapes() == computed
        assert set(calls.names) <= {"aten.empty.memory_format", "aten.new_empty.default"}
        values = torch.randn(4, 32)  # values are computed
        inside = torchao.choose_qparams_affine(values, "SYMMETRIC", [1, 32], torch.int8)
        traced = make_fx(lambda x: torchao.choose_qparams_affine(x, "SYMMETRIC", [1, 32], torch.int8))(values)
    outside = torchao.choose_qparams_affine(values, "SYMMETRIC", [1, 32], torch.int8)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    assert "amax" in traced.code, "what is recorded is computed"


class Calls(TorchDispatchMode):
    """The operators that were called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


def test_a_pass_runs_only_the_operators_that_it_changes() -> None:
    with silence_libraries():
        from executorch.exir.pass_base import ExportPass

    class Rewritten(ExportPass):
        def call_operator(self, op: Any, args: Any, kwargs: Any, meta: Any) -> Any:
            return super().call_operator(torch.ops.aten.tanh.default if "silu" in str(op) else op, args, kwargs, meta)

    class Narrowed(ExportPass):
        def call_operator(self, op: Any, args: Any, kwargs: Any, meta: Any) -> Any:
            if "silu" in str(op):
                args = (super().call_operator(torch.ops.aten.to.dtype, (args[0], torch.float16), {}, meta),)
            return super().call_operator(op, args, kwargs, meta)

    class Shortened(ExportPass):
        """Changes the arguments of a node before it replays the graph."""

        def call(self, graph_module: fx.GraphModule) -> Any:
            graph_module = copy.deepcopy(graph_module)
            (joined,) = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
            joined.args = (joined.args[0][:2], *joined.args[1:])
            return super().call(graph_module)

    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = (F.silu(x.sin()).cos() + 1.5).relu()
            return torch.cat((y, y, x), 1)

    with silence_libraries():
        sizes = {"x": {0: torch.export.Dim("rows", min=2, max=9)}}
        program = torch.export.export(Steps(), (torch.randn(4, 3),), dynamic_shapes=sizes, strict=False)
        kinds = (Rewritten, Narrowed, Shortened)
        stock = {kind: kind()(program.graph_module).graph_module for kind in kinds}
        with keep_values():
            first = ExportPass()(program.graph_module).graph_module
            with Calls() as calls:
                again = ExportPass()(first).graph_module
                assert calls.names == []
                kept = {Rewritten: Rewritten()(again).graph_module}
                assert calls.names == ["aten.tanh.default"]
            kept |= {kind: kind()(again).graph_module for kind in kinds[1:]}
    for kind in kinds:
        assert kept[kind].code == stock[kind].code
        pairs = zip(kept[kind].graph.nodes, stock[kind].graph.nodes, strict=True)
        assert all(str(a.meta.get("val")) == str(b.meta.get("val")) for a, b in pairs)
    assert torch.float16 in {node.meta["val"].dtype for node in kept[Narrowed].graph.find_nodes(
        op="call_function", target=torch.ops.aten.relu.default)}  # fmt: skip
    assert kept[Shortened].graph.output_node().args[0][0].meta["val"].shape[1] == 6


@pytest.mark.slow
def test_the_fast_lowering_of_a_decoder_gives_the_bytes_of_the_stock_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lowering = importlib.import_module("edgetune.export.language.lower")
    model = Int4().apply(llama())

    def data() -> bytes:
        with silence_libraries():
            return lowering.lower(CachedDecoder(model, 40).eval(), 32, TARGETS["xnnpack"], {})["token"].data

    fast = data()
    monkeypatch.setattr(lower, "fast_lowering", contextlib.nullcontext)
    monkeypatch.setattr(lowering, "fast_decompositions", contextlib.nullcontext)
    assert data() == fast
