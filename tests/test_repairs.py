"""Every repair against eager, in the delegated program; and that it is delegated."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgetune as et
from edgetune.capture import repairs
from edgetune.capture.graph import capture, prepare
from edgetune.capture.positional import Positional
from edgetune.capture.repairs.attention import attention
from edgetune.core.quiet import silence_libraries
from edgetune.export.lower import lower, tag_delegated
from edgetune.export.targets import TARGETS
from edgetune.program.operator_kinds import is_free, plain_name
from edgetune.runtime.run import run_in_child
from support.nets import Call

torch.set_num_threads(1)

with silence_libraries():  # it warns on import
    from transformers import MixtralConfig, MixtralForCausalLM

XNNPACK = TARGETS["xnnpack"]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


def repaired(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    with silence_libraries(), torch.no_grad():
        program = capture(Positional(model.eval(), inputs).eval(), inputs, "xnnpack")
        prepare(program)
    return program


def left_over(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[str]:
    """The operators that XNNPACK does not take."""
    with silence_libraries(), torch.no_grad():
        edge = tag_delegated(repaired(model, inputs), XNNPACK)
    names = [
        plain_name(str(n.target))
        for n in edge.graph.nodes
        if n.op == "call_function" and "delegation_tag" not in n.meta and "getitem" not in str(n.target)
    ]
    return [name for name in names if not is_free(name)]


X = randn(1, 6, 8, 10)
ROW = randn(1, 5, 12)
OTHER = randn(1, 7, 12)
SCALE, SHIFT = randn(6), randn(6) * 2
VARIANCE = randn(6).abs() + 0.1
WIDE = randn(12)
KERNEL = randn(4, 6, 1, 1)

FORMS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), (ROW,)),
    "gelu, quick": (lambda x: x * torch.sigmoid(1.702 * x), (ROW,)),
    "gelu_new": (lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3.0)))), (ROW,)),
    "elu": (lambda x: F.elu(x, 0.7), (X,)),
    "selu": (F.selu, (X,)),
    "celu": (lambda x: F.celu(x, 0.5), (X,)),
    "softplus": (lambda x: F.softplus(x, 2.0), (X,)),
    "mish": (F.mish, (X,)),
    "logsigmoid": (F.logsigmoid, (X,)),
    "silu": (F.silu, (X,)),
    "hardswish": (F.hardswish, (X,)),
    "hardsigmoid": (F.hardsigmoid, (X,)),
    "relu6": (F.relu6, (X,)),
    "cube": (lambda x: x**3, (X,)),
    "fourth": (lambda x: x**4.0, (X,)),
    "root": (lambda x: x.abs() ** 0.5, (X,)),
    "inverse root": (lambda x: (x.abs() + 1) ** -0.5, (X,)),
    "mean, last dim": (lambda x: x.mean(-1, keepdim=True), (ROW,)),
    "mean, tokens": (lambda x: x.mean(1), (ROW,)),
    "mean, picture": (lambda x: x.mean((2, 3)), (X,)),
    "mean, channels": (lambda x: x.mean(1, keepdim=True), (X,)),
    "mean, rows": (lambda x: x.mean(2), (X,)),
    "mean, all": (lambda x: x.mean() + x, (X,)),
    "sum": (lambda x: x.sum((1, 3)), (X,)),
    "variance": (lambda x: x.var(-1) + x.var(-1, correction=0), (X,)),
    "norm": (lambda x: F.normalize(x, dim=-1), (ROW,)),
    "norm, 1": (lambda x: torch.linalg.vector_norm(x, 1, -1), (ROW,)),
    "split": (lambda x: torch.cat(x.split([1, 4, 1], 1)[::-1], 1), (X,)),
    "chunk": (lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1], (X,)),
    "select": (lambda x: x[:, -1] * 2, (X,)),
    "unbind": (lambda x: x.unbind(1)[3] + x.unbind(1)[0], (X,)),
    "roll": (lambda x: torch.roll(x, (-3, 2), (2, 3)) + x, (X,)),
    "expand": (lambda x: x[:, :, None].expand(-1, -1, 3, -1, -1).reshape(1, 18, 8, 10) * 2, (X,)),
    "repeat": (lambda x: x.repeat(1, 2, 1) + 1, (ROW,)),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1) + 1, (X,)),
    "reflection": (lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect") * 2, (X,)),
    "replication": (lambda x: F.pad(x, (1, 2, 3, 0), mode="replicate") * 2, (X,)),
    "avg_pool": (lambda x: F.avg_pool2d(x, 2), (X,)),
    "avg_pool, padded": (lambda x: F.avg_pool2d(x, 3, 2, 1), (X,)),
    "adaptive pool": (lambda x: F.adaptive_avg_pool2d(x, (4, 5)), (X,)),
    "adaptive pool, 1": (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1) * 2, (X,)),
    "global max": (lambda x: x.amax((2, 3)), (X,)),
    "softmax behind a convolution": (lambda x: torch.softmax(F.conv2d(x, KERNEL), -1), (X,)),
    "softmax of channels": (lambda x: torch.softmax(F.conv2d(x, KERNEL), 1), (X,)),
    "softmax": (lambda x: torch.softmax(x, 1), (X,)),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2) + 1, (X,)),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (X,)),
    "product": (lambda x, y: x[0] @ y[0].T, (ROW, OTHER)),
    "product, three dims": (lambda x, y: x @ y[0].T, (ROW, OTHER)),
    "group norm": (lambda x: F.group_norm(x, 3, SCALE, SHIFT), (X,)),
    "batch norm": (lambda x: F.batch_norm(x, SCALE, VARIANCE, None, SHIFT), (X,)),
    "batch norm of a batch norm": (
        lambda x: F.batch_norm(F.batch_norm(x, SCALE, VARIANCE, SHIFT, SCALE), SHIFT, VARIANCE, None, SCALE),
        (X,),
    ),
    "rms norm": (lambda x: F.rms_norm(x, (12,), WIDE, 1e-6), (ROW,)),
}


FORM_OF = [name for name, (function, inputs) in FORMS.items() for _ in range(min(function(*inputs).numel(), 12))]


class All(nn.Module):
    """Every form in one program, each in a module of its own; the first values of each are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.forms = nn.ModuleList([Call(function) for function, _ in FORMS.values()])

    def forward(self, x: Tensor, row: Tensor, other: Tensor) -> Tensor:
        found = []
        for form, (_, inputs) in zip(self.forms, FORMS.values(), strict=True):
            given = [{X.shape: x, ROW.shape: row, OTHER.shape: other}[t.shape] for t in inputs]
            found.append(form(*given).reshape(1, -1)[:, :12])
        return torch.cat(found, 1)


def test_every_form_is_taken_whole_and_equals_eager(tmp_path: Path) -> None:
    rows = [(X, ROW, OTHER), (X * 4, ROW * 3, OTHER), (X * 30, ROW, OTHER * 2)]
    lowered = lower(Positional(All(), rows[0]).eval(), rows[0], XNNPACK)
    left = {list(FORMS)[int(found.module.split(".")[1])]: found.operator for found in lowered.undelegated}
    assert (left, lowered.delegates) == ({}, 1)
    (tmp_path / "all.pte").write_bytes(lowered.data)
    for inputs, (found,) in zip(rows, run_in_child(tmp_path / "all.pte", rows), strict=True):
        wanted = All()(*inputs)
        assert found.shape == wanted.shape
        apart = ((found - wanted).abs() / (1 + wanted.abs())).reshape(-1)
        assert apart.max() < 2e-5, FORM_OF[int(apart.argmax())]


class Sloped(nn.Module):
    """Linears, one PReLU after both."""

    def __init__(self, slopes: int) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(16, 8), nn.Linear(8, 8), nn.PReLU(slopes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.down(self.act(self.up(x))))
        return y


@pytest.mark.parametrize("rounded", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize(("shape", "slopes"), [((4, 16), 1), ((4, 16), 8), ((4, 5, 16), 5)])
def test_a_prelu_of_vectors_can_be_lowered(shape: tuple[int, ...], slopes: int, rounded: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: nn.Module = Sloped(slopes).eval()
    nn.init.uniform_(model.act.weight, -0.5, 0.9)  # type: ignore[union-attr, arg-type]
    x = randn(*shape)
    if rounded:
        model = et.apply(model, et.Int8(), et.Sample.of(x))
    artifact = et.export(model, x, tmp_path / "model.pte", target="xnnpack")
    assert artifact.manifest.main.parity.max_abs_difference < 1e-5
    assert not artifact.program().undelegated


def test_a_maximum_of_four_dims_can_be_lowered() -> None:
    """XNNPACK's partitioner takes it and its compiler then refuses it."""
    inputs = (X,)
    model = Call(lambda x: x.max(-1).values * 2)
    lowered = lower(Positional(model, inputs).eval(), inputs, XNNPACK)
    assert [left.operator for left in lowered.undelegated] == ["aten.amax.out"]


def test_the_tanh_form_is_not_run_as_the_exact_one() -> None:
    x = torch.linspace(-4, 4, 401)
    ours = repairs.XNNPACK[torch.ops.aten.gelu.default](x, approximate="tanh")
    assert torch.allclose(ours, F.gelu(x, approximate="tanh"), atol=1e-6)
    assert (ours - F.gelu(x)).abs().max() > 1e-4, "else the repair would not be needed"


class Grouped(nn.Module):
    """Keys and values of two heads for eight queries, repeated as transformers does."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        def repeated(t: Tensor) -> Tensor:
            batch, heads, length, width = t.shape
            return t[:, :, None, :, :].expand(batch, heads, 4, length, width).reshape(batch, heads * 4, length, width)

        return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask)


def grouped() -> tuple[Tensor, ...]:
    return randn(1, 8, 5, 16), randn(1, 2, 7, 16), randn(1, 2, 7, 16) * 2, randn(1, 1, 5, 7)


def test_grouped_attention_copies_no_keys() -> None:
    program = repaired(Grouped(), grouped())
    names = [str(n.target) for n in program.graph.nodes]
    assert not any("expand" in name or "cat" in name for name in names)
    assert torch.allclose(program.module()(*grouped()), Grouped()(*grouped()), atol=1e-6)
    assert left_over(Grouped(), grouped()) == []


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", ["none", "bool", "float"])
def test_grouped_attention_equals_eager(causal: bool, masked: str) -> None:
    q, k, v, mask = grouped()
    given = {"none": None, "bool": mask > -2, "float": mask}[masked]
    if causal and given is not None:
        return
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=given, is_causal=causal, enable_gqa=True)
    found = attention(q, k, v, given, is_causal=causal, enable_gqa=True)
    if causal:  # the stock one aligns to the first key, as does this one
        k, v = k[:, :, :5], v[:, :, :5]
        wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        found = attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_experts_are_captured_by_operators_of_fixed_shape() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, use_cache=False,
    )  # fmt: skip
    model, ids = MixtralForCausalLM(config).eval(), {"input_ids": torch.arange(6)[None]}
    before = model.config._experts_implementation
    with silence_libraries(), torch.no_grad():
        program = capture(Positional(model, ids).eval(), tuple(ids.values()), "xnnpack")
    names = {str(n.target) for n in program.graph.nodes}
    assert not any("grouped_mm" in name for name in names)
    assert "aten.bmm.default" in names or "aten.matmul.default" in names
    assert model.config._experts_implementation == before != "batched_mm"
    with torch.no_grad():
        assert torch.allclose(program.module()(*ids.values()), model(**ids).logits, atol=1e-5)


class Standardized(nn.Module):
    """A weight that the forward pass computes, and a bias from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.table = nn.Embedding(9, 6)
        self.down, self.up = nn.Parameter(randn(2, 27)), nn.Parameter(randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight.flatten(1) + self.up @ self.down
        weight = (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)
        bias = self.table(torch.arange(4)).mean(0)
        return F.conv2d(x, weight.reshape(self.conv.weight.shape), bias)


def test_computed_weights_become_constants() -> None:
    inputs = (randn(1, 3, 8, 8),)
    model = Standardized().eval()
    program = repaired(model, inputs)
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == ["aten.conv2d.default"]
    with torch.no_grad():
        assert torch.allclose(program.module()(*inputs), model(*inputs), atol=1e-5)
    assert left_over(model, inputs) == []


class Growing(nn.Module):
    """A constant of 4 MiB computed from nothing, and a random one."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(2**20).reshape(1, -1) * 0.5


def test_no_large_constant_is_made() -> None:
    program = repaired(Growing(), (randn(1, 1),))
    assert any("arange" in str(n.target) or "mul" in str(n.target) for n in program.graph.nodes)


def test_aliases_and_dropout_go() -> None:
    def function(x: Tensor) -> Tensor:
        return F.dropout(torch.ops.aten.alias(x.detach()) * 2, 0.5, False) + 1

    program = repaired(Call(function), (X,))
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == [
        "aten.mul.Tensor",
        "aten.add.Tensor",
    ]


def test_a_model_that_returns_an_alias_still_returns_it() -> None:
    program = repaired(Call(lambda x: (x * 2).detach()), (X,))
    assert torch.equal(program.module()(X), X * 2)


def test_other_targets_keep_the_operators_that_they_have() -> None:
    inputs = (ROW,)
    with silence_libraries(), torch.no_grad():
        program = capture(Positional(Call(lambda x: F.rms_norm(x, (12,))), inputs).eval(), inputs, "coreml")
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == ["aten.rms_norm.default"]


class Parts(nn.Module):
    """Weights in the memory of a larger one, cut in the forward pass or before; a bias that is read by its value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        nn.init.normal_(self.attention.in_proj_bias)
        self.first, self.second = (nn.Linear(8, 8) for _ in range(2))
        both = torch.randn(16, 8)
        self.first.weight, self.second.weight = nn.Parameter(both[:8]), nn.Parameter(both[8:])

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        attended = self.attention(x, y, y, need_weights=False)[0]
        return attended, self.first(x), self.second(x), torch.relu(x * 2) * self.second.bias


def test_parts_of_a_weight_have_their_own_values_and_one_read_twice_is_there_twice(tmp_path: Path) -> None:
    """Cut weights had the values of the first part; a packed bias was gone when the second reader came."""
    inputs = (randn(2, 3, 8), randn(2, 5, 8))
    model = Positional(Parts().eval(), inputs).eval()
    (tmp_path / "m.pte").write_bytes(lower(model, inputs, XNNPACK).data)
    (found,) = run_in_child(tmp_path / "m.pte", [inputs])
    with torch.no_grad():
        wanted = model(*inputs)
    assert len(found) == len(wanted) == 4
    for got, expected in zip(found, wanted, strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("form", ["none", "bool", "float", "causal", "grouped"])
def test_attention_written_out_equals_the_fused_one(form: str) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 6, 8) for _ in range(3))
    hidden = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    hidden[1, :, :, 4:] = True
    masks = {"bool": ~hidden, "float": torch.zeros(2, 1, 6, 6).masked_fill(hidden, float("-inf"))}
    grouped = form == "grouped"
    if grouped:
        key, value = key[:, :2], value[:, :2]
    settings = {"attn_mask": masks.get(form), "is_causal": form == "causal", "enable_gqa": grouped}
    expected = F.scaled_dot_product_attention(query, key, value, **settings)  # type: ignore[arg-type]
    assert torch.allclose(attention(query, key, value, **settings), expected, atol=1e-6)  # type: ignore[arg-type]
