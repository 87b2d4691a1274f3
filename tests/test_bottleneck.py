from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune.adapt.bottleneck import AdaptedModule
from edgetune.core.errors import EdgetuneError
from edgetune.core.modes import preserve_state
from support.laws import bert, cnn, fit, llama, logits, mlp, tokens, vectors

torch.set_num_threads(1)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_serial_reads_the_output_and_parallel_the_input() -> None:
    x = torch.randn(2, 32)
    for form in ("serial", "parallel"):
        model = et.apply(mlp(), et.Bottleneck(targets=["stem"], form=form, width=4, scale=0.1))
        fit(model, vectors())
        layer, adapter = model.get_submodule("stem.base"), model.get_submodule("stem.adapter")
        y = layer(x)
        hidden = torch.relu(adapter.down(y if form == "serial" else x))
        expected = y + 0.1 * (hidden @ adapter.up.weight.T + adapter.up.bias)
        torch.testing.assert_close(model.get_submodule("stem")(x), expected)
        assert not torch.equal(expected, y)
        torch.testing.assert_close(et.finalize(model).get_submodule("stem")(x), expected)  # the scale is folded


def test_only_the_adapters_train_and_what_was_chosen_before() -> None:
    model = et.apply(mlp(), et.Bottleneck(targets=["stem"]))
    adapter = {f"stem.adapter.{part}.{key}" for part in ("down", "up") for key in ("weight", "bias")}
    assert trained(model) == adapter
    head = et.SparseUpdate(scheme={"*": "frozen", "classifier": "full"})
    model = et.apply(mlp(), [head, et.Bottleneck(targets=["stem"])])
    assert trained(model) == adapter | {"classifier.weight", "classifier.bias"}
    assert trained(et.finalize(model)) >= {"stem.base.weight", "stem.base.bias", "blocks.0.up.weight"}


def test_an_mlp_as_a_whole_needs_inputs_for_its_widths() -> None:
    technique = et.Bottleneck(targets=["*.mlp"], form="parallel", width=4)
    with pytest.raises(EdgetuneError, match="example inputs are needed to read the widths"):
        et.apply(llama(), technique)
    model = et.apply(llama(), technique, et.Sample.of(tokens()))
    assert model.get_submodule("model.layers.1.mlp.adapter.down").in_features == 32
    before = logits(model, tokens())
    fit(model, tokens())
    trained = logits(model, tokens())
    assert not torch.equal(trained, before)
    torch.testing.assert_close(logits(et.finalize(model), tokens()), trained, atol=1e-6, rtol=1e-5)


def test_a_finalized_model_takes_the_next_techniques() -> None:
    model = et.apply(bert(), et.Bottleneck(targets=["*.output.dense"], width=32))
    fit(model, tokens())
    model = et.finalize(model)
    trained = logits(model, tokens())
    for technique in (et.LoRA(rank=2, targets=["*.adapter.down", "*.query"]), et.Int4(), et.Prune(ratio=0.5)):
        other = et.apply(copy.deepcopy(model), technique, et.Sample.of(tokens()))
        if technique.exact:
            torch.testing.assert_close(logits(other, tokens()), trained)
        else:
            assert 0 < (logits(other, tokens()) - trained).norm() < 0.5 * trained.norm()
        et.finalize(other)


def test_a_16_bit_model_trains_its_adapters_in_float32() -> None:
    model = et.apply(mlp().bfloat16(), et.Bottleneck(targets=["stem"]))
    assert model.get_parameter("stem.adapter.down.weight").dtype == torch.float32
    with preserve_state(model):
        assert model(vectors().bfloat16()).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in et.finalize(model).parameters()} == {torch.bfloat16}


def test_a_4_bit_base_stays_under_the_adapter_until_the_end() -> None:
    model = et.apply(mlp(), [et.NF4(block_size=32), et.Bottleneck(targets=["*.up"], width=4)])
    fit(model, vectors())
    trained = logits(model, vectors())
    model = et.finalize(model)
    torch.testing.assert_close(logits(model, vectors()), trained, atol=1e-5, rtol=1e-5)
    assert {type(module) for module in model.modules() if "Linear" in type(module).__name__} == {nn.Linear}


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (cnn, ("blocks.0",), "blocks.0: an adapter is for modules over .*Conv2d"),
        (bert, ("*.word_embeddings",), "an adapter is for modules over"),
        (mlp, ("blocks.0", "blocks.0.up"), "blocks.0.up is inside blocks.0, which is a target too"),
        (bert, ("bert.encoder",), "never run, or do not take and return a tensor"),
    ],
)
def test_what_gets_no_adapter_is_refused_before_anything_changes(model, targets, message) -> None:  # type: ignore[no-untyped-def]
    plain = model()
    before = list(plain.state_dict())
    with pytest.raises(EdgetuneError, match=message):
        et.apply(plain, et.Bottleneck(targets=targets), et.Sample.of(tokens()))
    assert list(plain.state_dict()) == before
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_a_second_one_on_the_same_module_is_refused() -> None:
    model = et.finalize(et.apply(mlp(), et.Bottleneck(targets=["stem"])))
    for target in ("stem", "stem.base", "stem.adapter.up"):
        with pytest.raises(EdgetuneError, match="has a bottleneck already"):
            et.apply(model, et.Bottleneck(targets=[target]))
    assert sum(isinstance(module, AdaptedModule) for module in model.modules()) == 1
