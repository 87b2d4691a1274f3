"""The lint: what it finds in models that each have one thing wrong, and that it finds nothing in one that has not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetune.adapt.lora import LoRA
from edgetune.core.inputs import Inputs
from edgetune.export.lint import Finding, lint
from edgetune.export.targets import TARGETS
from edgetune.runtime.remedies import remedy
from support.laws import bert, cnn, pictures, tokens

torch.set_num_threads(1)


def found(model: nn.Module, inputs: Inputs, target: str = "xnnpack") -> tuple[Finding, ...]:
    return lint(model, inputs, TARGETS[target])


class Inner(nn.Module):
    """One operator in a module with a name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "nonzero":
            return x[x > 0].sum() + x
        if self.kind == "random":
            return F.dropout(x, 0.5, training=True)
        if self.kind == "sort":
            return x.sort(-1).values
        if self.kind == "branch":
            return x * 2 if x.sum() > 0 else x
        if self.kind == "whole numbers":
            return x * (torch.arange(8) + x.argmax())
        if self.kind == "product":
            return torch.nn.functional.conv2d(x[None, None], x[None, None, :2, :2])[0, 0]
        return x + 1


class Outer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"odd": Inner(kind)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["odd"](self.first(x))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def test_nothing_is_found_where_all_is_well() -> None:
    assert found(Outer("none").eval(), X) == ()
    model = cnn()
    before = copy.deepcopy(model.state_dict())
    assert found(model.eval(), pictures()[:1]) == ()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "severity", "operator", "reason", "remedy"),
    [
        ("random", "error", "aten.native_dropout", "random numbers", "if self.training"),
        ("sort", "note", "aten.topk", "does not have this operator", "rank outside"),
        ("whole numbers", "note", "aten.argmax", "int64", ""),
        ("product", "warning", "aten.convolution", "static param", "constant weights"),
    ],
)
def test_an_operator_is_named_with_its_module(
    kind: str, severity: str, operator: str, reason: str, remedy: str
) -> None:
    findings = [f for f in found(Outer(kind).eval(), X) if f.operator.startswith(operator)]
    assert findings, found(Outer(kind).eval(), X)
    first = findings[0]
    assert (first.severity, first.module) == (severity, "inner.odd")
    assert reason in first.reason
    assert remedy in first.remedy
    assert (first.macs_pct > 0) == (severity == "warning")
    assert str(first).startswith(f"{severity}: {first.operator} in inner.odd")


def test_a_shape_that_depends_on_values_is_an_error() -> None:
    findings = found(Outer("nonzero").eval(), X)
    assert findings[0].severity == "error"
    assert findings[0].module == "inner.odd"
    assert "mask" in findings[0].remedy


def test_a_model_that_cannot_be_captured_is_one_finding() -> None:
    (finding,) = found(Outer("branch").eval(), X)
    assert (finding.severity, finding.module) == ("error", "inner.odd")
    assert "decides by the values" in finding.reason
    assert "torch.where" in finding.remedy


def test_inputs_out_of_memory_order_and_of_refused_types() -> None:
    findings = found(Outer("none").eval(), X.t().contiguous().t())
    assert [f.severity for f in findings] == ["error"]
    assert "input_0 is not contiguous" in str(findings[0])
    findings = found(Outer("none").double().eval(), X.double())
    assert {(f.severity, f.module) for f in findings if "fp64" in f.reason and not f.operator} == {
        ("warning", ""),
        ("warning", "first"),
    }
    assert any(f.operator == "aten.addmm.default" and "fp64" in f.reason and f.macs_pct == 100 for f in findings)


def test_wrapped_layers_and_dropout_in_training_mode() -> None:
    model = LoRA(rank=2, targets=["*query"]).apply(bert()).train()
    findings = found(model, tokens())
    wrapped = [f for f in findings if "has an adapter or slices" in f.reason]
    assert len(wrapped) == sum(name.endswith("query") for name, _ in bert().named_modules())
    assert all(f.severity == "error" and "finalize" in f.remedy for f in wrapped)
    assert any("dropout in training mode" in f.reason for f in findings)
    assert all(module.training for module in model.modules() if isinstance(module, nn.Dropout)), "put back"


def test_a_text_encoder_leaves_only_small_operators() -> None:
    findings = found(bert(), tokens())
    assert {f.severity for f in findings} == {"note"}
    norms = [f for f in findings if "layer_norm" in f.operator]
    assert {f.module.rpartition(".")[2] for f in norms} == {"LayerNorm"}
    assert all(f.reason and f.remedy for f in norms)


def test_plain_kernels_take_everything() -> None:
    assert found(Outer("sort").eval(), X, "portable") == ()


@pytest.mark.parametrize("name", ["transformers::grouped_mm_fallback", "transformers.grouped_mm_fallback.default"])
def test_a_remedy_is_found_by_any_form_of_the_name(name: str) -> None:
    assert "batched_mm" in remedy(name)
    assert remedy("aten.no_such_thing.default") == ""
