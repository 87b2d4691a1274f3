"""outliers: linears split by the range of their inputs, before they are quantized."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgetune as et
from edgetune.adapt.lora import LoRA
from edgetune.core.apply import apply
from edgetune.core.errors import EdgetuneError
from edgetune.core.technique import Sample, Technique
from edgetune.export import export
from edgetune.quant.int4 import Int4
from edgetune.quant.int8_dynamic import Int8Dynamic
from edgetune.quant.outliers import Outliers
from edgetune.quant.quik import Quik
from edgetune.quant.size import parameter_count, weight_bits
from edgetune.quant.smooth import Smooth
from edgetune.quant.split import SmallPart, SplitLinear
from support.laws import llama, logits, tokens

torch.set_num_threads(1)
LOUD = (5, 40)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 96), nn.Linear(96, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x).relu())
        return y


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def rows(count: int = 60, seed: int = 1) -> Tensor:
    """Two inputs are fifty times as loud as the others."""
    x = torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))
    x[:, LOUD] *= 50
    return x


def error(model: nn.Module) -> float:
    unseen = rows(seed=2)
    with torch.no_grad():
        return float((model(unseen) - net()(unseen)).norm() / net()(unseen).norm())


def bits_of(model: nn.Module) -> dict[str, int | None]:
    return {name: weight_bits(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def test_the_loudest_inputs_go_apart_and_the_outputs_stay() -> None:
    model = apply(net(), Outliers(share=0.03, targets=("first",)), Sample.of(rows()))
    first: Any = model.first
    assert type(first) is SplitLinear
    assert tuple(first.columns.tolist()) == LOUD
    assert torch.equal(first.weight, net().first.weight)
    assert type(model.last) is nn.Linear
    torch.testing.assert_close(model(rows()), net()(rows()), rtol=1e-4, atol=1e-3)
    assert parameter_count(model) == parameter_count(net())


@pytest.mark.parametrize(
    "technique", [Int4(), Int4(int8_linears=("*.outlier",)), Int4(group_size="channel"), Int8Dynamic()], ids=str
)
def test_quantization_loses_less_and_the_program_computes_the_same(technique: Technique, tmp_path: Path) -> None:
    plain = apply(net(), technique if isinstance(technique, Int8Dynamic) else Int4(), Sample.of(rows()))
    model = apply(net(), [Outliers(share=0.03), technique], Sample.of(rows()))
    assert error(model) < 0.6 * error(plain)
    first: Any = model.first
    assert not first.weight.qdata[:, LOUD].any()
    narrow = 8 if isinstance(technique, Int8Dynamic) else 4
    wide = None if isinstance(technique, Int4) and not technique.int8_linears else 8
    assert bits_of(model) == {"first": narrow, "first.outlier": wide, "last": narrow, "last.outlier": wide}
    artifact = export(model, rows(1), tmp_path / "model.pte", check_inputs=[rows()], one_row=True)
    parity = artifact.manifest.main.parity
    assert parity is not None
    assert parity.max_relative_difference is not None
    assert parity.max_relative_difference < 0.02, "ties of rounding activations"


def test_a_split_model_is_rebuilt() -> None:
    steps: list[Technique] = [Outliers(share=0.05), Int4()]
    model, rebuilt = apply(net(), steps, Sample.of(rows())), net()
    state = copy.deepcopy(model.state_dict())
    for step in steps:
        rebuilt = step.rebuild(rebuilt, state)  # type: ignore[assignment]
    rebuilt.load_state_dict(state, assign=True)
    assert torch.equal(rebuilt(rows()), model(rows()))


def test_patterns_name_the_layers_as_before() -> None:
    model = apply(llama(), Outliers(skip=("lm_head",)), Sample.of(tokens()))
    torch.testing.assert_close(logits(model, tokens()), logits(llama(), tokens()), rtol=1e-4, atol=1e-5)
    apply(model, Int4(targets=("*.q_proj", "*.down_proj"), skip=("*.0.*",)))
    names = [name for name, bits in bits_of(model).items() if bits == 4]
    assert names == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


class Idle(Net):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(8, 8)


def test_a_layer_that_no_batch_reaches_stays_whole_and_is_named() -> None:
    with pytest.warns(UserWarning, match=r"outliers: idle: no calibration batch.*stay whole.*skip:") as caught:
        model = apply(Idle().eval(), Outliers(), Sample.of(rows()))
    assert caught[0].filename == __file__
    assert type(model.idle) is nn.Linear
    assert sum(isinstance(module, SmallPart) for module in model.modules()) == 2


def test_a_layer_that_shares_its_weight_stays_whole_and_is_named() -> None:
    model = net()
    model.table = nn.Embedding(96, 64)
    model.table.weight = model.first.weight
    with pytest.warns(UserWarning, match=r"outliers: first: other layers share the weights of.*stay whole.*skip:"):
        apply(model, Outliers(), Sample.of(rows()))
    assert [type(layer) for layer in (model.first, model.last)] == [nn.Linear, SplitLinear]


def test_a_layer_of_few_inputs_stays_whole_and_is_named() -> None:
    model = nn.Sequential(nn.Linear(64, 2), nn.Linear(2, 40)).eval()
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"outliers: 1: these layers have 2 inputs or fewer, so they stay whole"):
        apply(model, Outliers(), Sample.of(rows()))
    assert [type(layer) for layer in model] == [SplitLinear, nn.Linear]
    assert bits_of(apply(plain, Quik(), Sample.of(rows()))) == {"0": 8, "1": 8}  # the first narrows


def infinite() -> Net:
    model = net()
    model.last.weight.data[0, 0] = torch.inf
    return model


@pytest.mark.parametrize(
    ("build", "steps", "data", "message"),
    [
        (net, [Outliers(), Outliers()], rows(), "occurs twice"),
        (net, [Outliers(), Quik()], rows(), "leaves split linears\n  next: keep one of outliers and quik"),
        (net, [Outliers(), Smooth()], rows(), "leaves split linears\n  next: put smooth before outliers"),
        (net, [Outliers(), LoRA(targets=("first",))], rows(), "next: put lora before outliers"),
        (net, [Int4(), Outliers()], rows(), "cannot follow int4, which leaves integer weights"),
        (infinite, [Outliers()], rows(), "last: a weight is NaN or infinite"),
        (net, [Outliers()], rows()[:, :5], "the model does not run on its calibration batches"),
        (net, [Quik()], rows()[:, :5], "the model does not run on its calibration batches"),
        (net, [Outliers(targets=("nothing",))], rows(), "targets: the pattern matches no layer"),
        (net, [Outliers()], rows()[:0], "no calibration batches, or they have no rows"),
        (net, [Outliers()], rows() * torch.nan, "not finite on the calibration batches: first"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(build: Any, steps: list[Technique], data: Tensor, message: str) -> None:
    model = build().eval()
    with pytest.raises(EdgetuneError, match=message):
        apply(model, steps, Sample.of(data))


@pytest.mark.parametrize("later", [LoRA(targets=("first",)), et.QAT(), et.SparseUpdate(scheme={"first": 0.5})], ids=str)
def test_split_linears_are_not_forgotten_by_finalize(later: Technique) -> None:
    model = et.finalize(apply(net(), Outliers(), Sample.of(rows())))
    with pytest.raises(EdgetuneError, match=f"{later.name}: cannot follow outliers, which leaves split linears"):
        apply(model, later, Sample.of(rows()))
    assert bits_of(apply(et.finalize(model), Int4(), Sample.of(rows())))["first"] == 4


def test_the_same_settings_split_the_same_inputs() -> None:
    first, again = (apply(net(), Outliers(share=0.1), Sample.of(rows())) for _ in range(2))
    assert torch.equal(first.last.columns, again.last.columns)
    assert len(first.last.columns) == 10


def test_quik_splits_what_does_not_narrow_and_loses_less_than_int4() -> None:
    model = apply(net(), Quik(share=0.03), Sample.of(rows()))
    assert bits_of(model) == {"first": 4, "first.outlier": 8, "last": 8}
    assert error(model) < 0.6 * error(apply(net(), Int4(group_size="channel"), Sample.of(rows())))
    rebuilt = Quik(share=0.03).rebuild(net(), model.state_dict())
    rebuilt.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(rebuilt(rows()), model(rows()))


def test_quik_keeps_whole_what_is_written_or_shared() -> None:
    model = apply(llama(tied=True), Quik(int8_linears=("*.q_proj",)), Sample.of(tokens()))
    bits = bits_of(model)
    assert bits["lm_head"] == bits["model.layers.0.self_attn.q_proj"] == 8
    assert "lm_head.outlier" not in bits
    assert bits["model.layers.0.self_attn.v_proj"] == 4


def test_quik_leaves_the_model_if_its_calibration_fails() -> None:
    model, x = net(), rows()
    batches = iter([[x], [x * torch.nan]])
    with pytest.raises(EdgetuneError, match="not finite on the calibration batches"):
        apply(model, Quik(), Sample(x, lambda: iter(next(batches))))
    assert [type(module) for module in model.modules()] == [type(module) for module in net().modules()]
    assert torch.equal(model(x), net()(x))
