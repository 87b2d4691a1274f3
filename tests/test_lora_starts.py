"""Where a LoRA starts: EVA, CorDA and LoftQ against their definitions, and in plain peft afterwards."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.core.packed_layers import nf4_weight
from edgetune.core.peft_layers import base_of, is_tuner
from support.laws import ATTENTION, BLOCKS, bert, cnn, dense, fit, llama, logits, mlp, pictures, tokens, vectors

torch.set_num_threads(1)


def adapted(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if is_tuner(module)}


def inputs_of(make: Any, name: str, batches: list[Any]) -> Tensor:
    """What reaches a layer, `(tokens, in)`."""
    model, reached = make(), []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: reached.append(args[0].flatten(0, -2)))
    for batch in batches:
        logits(model, batch)
    return torch.cat(reached).double()


def padded() -> dict[str, Tensor]:
    batch = dict(tokens())  # type: ignore[call-overload]
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][:, 6:] = 0
    return batch


def test_eva_starts_in_the_main_directions_of_the_inputs() -> None:
    batches = [tokens(), {name: value.flip(0) for name, value in tokens().items()}]  # type: ignore[union-attr]
    sample = et.Sample(tokens(), lambda: iter(batches))
    model = et.apply(bert(), et.LoRA(rank=3, targets=ATTENTION, init="eva"), sample)
    for name, layer in adapted(model).items():
        _, _, v = torch.linalg.svd(inputs_of(bert, name, batches), full_matrices=False)
        a = layer.lora_A["default"].weight.double()
        torch.testing.assert_close((a @ v[:3].T).abs(), torch.eye(3).double(), atol=1e-4, rtol=0)
        assert not layer.lora_B["default"].weight.any()
    torch.testing.assert_close(logits(model, tokens()), logits(bert(), tokens()), atol=0, rtol=0)


def test_padding_does_not_count() -> None:
    def factors(batch: Any) -> list[Tensor]:
        model = et.apply(bert(), et.LoRA(rank=2, targets=ATTENTION, init="eva"), et.Sample.of(batch))
        return [layer.lora_A["default"].weight.abs() for layer in adapted(model).values()]

    other = padded()
    other["input_ids"] = other["input_ids"].clone()
    other["input_ids"][:, 6:] = 1
    for one, same in zip(factors(padded()), factors(other), strict=True):
        torch.testing.assert_close(one, same, atol=1e-4, rtol=1e-3)


def test_corda_trains_the_principal_part_on_these_inputs() -> None:
    name, weights = "blocks.1.up", {n: dense(m) for n, m in mlp().named_modules() if n.endswith((".up", ".down"))}
    model = et.apply(mlp(), et.LoRA(rank=4, targets=BLOCKS, init="corda"), et.Sample.of(vectors()))
    layer = adapted(model)[name]
    part = 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha is 16
    torch.testing.assert_close(base_of(layer).weight + part, weights[name], atol=1e-6, rtol=1e-5)
    x = inputs_of(mlp, name, [vectors()])
    c = x.T @ x / (x.T @ x).diagonal().mean()
    damped = c + 0.01 * c.diagonal().mean() * torch.eye(32)
    u, s, v = torch.linalg.svd(weights[name].double() @ damped, full_matrices=False)
    expected = u[:, :4] * s[:4] @ (v[:4] @ torch.linalg.inv(damped))
    torch.testing.assert_close(part.double(), expected, atol=1e-4, rtol=1e-3)
    pissa = et.apply(mlp(), et.LoRA(rank=4, targets=BLOCKS, init="pissa"))
    other = adapted(pissa)[name]
    principal = 4 * other.lora_B["default"].weight @ other.lora_A["default"].weight
    assert (part - principal).norm() > 0.1 * principal.norm()
    left = [((weights[name] - p).double() @ x.T).norm() for p in (part, principal)]  # of the outputs
    assert left[0] < left[1]


def test_loftq_starts_at_the_nearest_product_to_what_was_rounded_off() -> None:
    nf4, lora = et.NF4(block_size=32), et.LoRA(rank=4, alpha=4, targets=BLOCKS, init="loftq")
    model = et.apply(mlp(), [nf4, lora])
    for name, layer in adapted(model).items():
        lost = mlp().get_submodule(name).weight - nf4_weight(base_of(layer))
        s = torch.linalg.svdvals(lost)
        left = mlp().get_submodule(name).weight - dense(layer)
        torch.testing.assert_close(left.norm(), s[4:].norm(), atol=1e-4, rtol=1e-3)
        assert left.norm() < 0.9 * lost.norm()
    fit(model, vectors())
    trained = logits(model, vectors())
    torch.testing.assert_close(logits(et.finalize(model), vectors()), trained, atol=2e-5, rtol=1e-4)


def test_loftq_merged_onto_the_original_weights_adds_what_training_changed() -> None:
    steps = [et.NF4(block_size=32, merge_base="fp"), et.LoRA(rank=4, targets=BLOCKS, init="loftq")]
    untrained = et.finalize(et.apply(mlp(), steps))
    for name, value in mlp().state_dict().items():
        if ".up." in name or ".down." in name:
            torch.testing.assert_close(untrained.state_dict()[name], value, atol=1e-6, rtol=1e-5)
    model = et.apply(mlp(), steps)
    before = {name: dense(layer) for name, layer in adapted(model).items()}
    fit(model, vectors())
    change = {name: dense(layer) - before[name] for name, layer in adapted(model).items()}
    merged = et.finalize(model)
    for name, moved in change.items():
        expected = mlp().get_submodule(name).weight + moved
        torch.testing.assert_close(merged.get_submodule(name).weight, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_the_file_is_a_plain_lora(init: Any, tmp_path: Path) -> None:
    import peft

    model = et.apply(bert(), et.LoRA(rank=2, targets=ATTENTION, init=init), et.Sample.of(tokens()))
    fit(model, tokens(), steps=5)
    expected = logits(model, tokens())
    assert (expected - logits(bert(), tokens())).abs().max() > 1e-4
    et.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        theirs = peft.PeftModel.from_pretrained(bert(), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs, tokens()), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(logits(et.finalize(model), tokens()), expected, atol=2e-5, rtol=1e-4)


def test_loftq_in_plain_peft_over_the_same_base(tmp_path: Path) -> None:
    import peft

    nf4 = et.NF4(block_size=32)
    model = et.apply(mlp(), [nf4, et.LoRA(rank=2, targets=BLOCKS, init="loftq")])
    fit(model, vectors())
    et.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(et.apply(mlp(), nf4), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs, vectors()), logits(model, vectors()), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("make", "settings", "problem"),
    [
        (mlp, {"init": "loftq"}, "init loftq cannot start on a Linear but on a 4-bit weight of nf4"),
        (mlp, {"init": "eva", "rank": 33}, "the rank is above the layer's width"),
        (cnn, {"init": "corda", "targets": ("stem",)}, "init corda cannot start on a Conv2d"),
        (llama, {"init": "corda", "targets": ("*.embed_tokens",)}, "init corda cannot start on a Embedding"),
    ],
)
def test_where_it_cannot_start(make: Any, settings: dict[str, Any], problem: str) -> None:
    sample = et.Sample.of({mlp: vectors, cnn: pictures, llama: tokens}[make]())
    with pytest.raises(EdgetuneError, match=problem):
        et.apply(make(), et.LoRA(**{"rank": 2, "targets": BLOCKS, **settings}), sample)


def test_what_is_missing_is_named_and_the_model_stays() -> None:
    with pytest.raises(EdgetuneError, match="lora needs example inputs"):
        et.apply(mlp(), et.LoRA(rank=2, targets=BLOCKS, init="eva"))
    packed = et.apply(mlp(), et.NF4(block_size=32))
    with pytest.raises(EdgetuneError, match="reads the weight before packing, which was not kept"):
        et.apply(packed, et.LoRA(rank=2, targets=BLOCKS, init="loftq"))
    assert not adapted(packed)
    kept = et.apply(mlp(), et.NF4(block_size=32, keep_original=True))
    assert adapted(et.apply(kept, et.LoRA(rank=2, targets=BLOCKS, init="loftq")))
    with pytest.raises(EdgetuneError, match="works without dora"):
        et.LoRA(targets=BLOCKS, init="loftq", dora=True)

    with pytest.raises(EdgetuneError, match="inputs are all 0 on the calibration batches"):
        et.apply(mlp(), et.LoRA(rank=2, targets=("stem",), init="corda"), et.Sample.of(torch.zeros(2, 32)))

    model = mlp()
    model.add_module("idle", nn.Linear(4, 4))
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    with pytest.raises(EdgetuneError, match="no calibration batch reaches idle"):
        et.apply(model, et.LoRA(rank=2, targets=(*BLOCKS, "idle"), init="corda"), et.Sample.of(vectors()))
    assert not adapted(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
