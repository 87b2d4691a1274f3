"""Locked tuning: one tower of a pair stays, the other learns with the contrastive loss, in little memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, call, logits_of
from edgetune.lean.saved import saved_bytes
from edgetune.train.loop import train
from support.laws import bert, mlp
from support.towers import clip, pairs

torch.set_num_threads(1)

TEXT_LORA = et.LoRA(rank=4, targets=("text_model.*_proj",), also_train=("text_projection",))


class Pairs:
    """Pairs of a data set, for `train`: the label of a pair is its place in the batch."""

    lengths = None

    def __init__(self, count: int) -> None:
        self.inputs: Any = pairs(count)

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])

    def batch(self, indices: Sequence[int]) -> tuple[Inputs, Tensor]:
        rows = list(indices)
        return {name: value[rows] for name, value in self.inputs.items()}, torch.arange(len(rows))


def loss_of(output: Any) -> Tensor:
    return et.contrastive_loss(logits_of(output))


def loss(model: nn.Module) -> float:
    with torch.no_grad():
        return loss_of(call(model.eval(), pairs(24))).item()


@pytest.mark.parametrize("techniques", [[et.Lock()], [et.Lock(), TEXT_LORA]], ids=["alone", "with LoRA"])
def test_the_loss_falls_and_the_locked_tower_stays(techniques: Any) -> None:
    plain, model = clip(), et.apply(clip(), techniques)
    images: Any = {"pixel_values": pairs()["pixel_values"]}  # type: ignore[index, call-overload]
    expected, before = et.locked_features(plain, images), loss(model)
    settings = et.Train(epochs=8, batch_size=12, learning_rate=5e-3)
    train(model, settings, Pairs(24), et.contrastive_loss, seed=0)
    assert loss(model) < 0.7 * before
    assert torch.equal(et.locked_features(model, images), expected)
    moved = []
    model = et.finalize(model)
    for (name, value), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert value.requires_grad
        if not torch.equal(value, other):
            moved.append(name)
    assert moved
    assert not any(name.startswith(("vision_model", "visual_projection")) for name in moved)


def test_the_locked_tower_draws_nothing_and_the_other_one_runs_again() -> None:
    model: Any = et.apply(clip(), et.Lock()).train()
    towers: dict[str, list[Tensor]] = {"vision_model": [], "text_model": []}
    for name, outputs in towers.items():
        model.get_submodule(name).register_forward_hook(lambda _, __, output, to=outputs: to.append(output[0]))
    for _ in range(2):
        call(model, pairs())
    assert torch.equal(*towers["vision_model"])  # no dropout
    assert not torch.equal(*towers["text_model"])
    assert not towers["vision_model"][0].requires_grad
    assert model.vision_model.training
    kept = {
        name: saved_bytes(et.apply(clip(), technique) if technique else clip(), pairs(), loss_of)
        for name, technique in {
            "all": None, "locked": et.Lock(checkpointing=False), "again": et.Lock(),
            "lora": et.LoRA(rank=4, targets=("text_model.*_proj",)), "both": [et.Lock(), TEXT_LORA],
        }.items()
    }  # fmt: skip
    assert kept["again"] < 0.5 * kept["locked"] < 0.5 * kept["all"]
    assert kept["both"] < 0.5 * kept["lora"]


def test_gradients_through_blocks_that_run_again_are_the_same() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = et.apply(clip(), [et.Lock(checkpointing=checkpointing), TEXT_LORA])
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.01)
        torch.manual_seed(0)
        loss_of(call(model.train(), pairs())).backward()  # type: ignore[no-untyped-call]
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_features_are_computed_once_and_give_the_same_loss() -> None:
    model: Any = et.apply(clip(), et.Lock())
    inputs: Any = pairs()
    with torch.no_grad():
        output = model(**inputs)
    features = et.locked_features(model, {"pixel_values": inputs["pixel_values"]})
    torch.testing.assert_close(features, output.image_embeds)
    similarities = model.logit_scale.exp() * output.text_embeds @ features.T
    torch.testing.assert_close(et.contrastive_loss(similarities), et.contrastive_loss(output.logits_per_image))
    text = et.locked_features(model, {name: inputs[name] for name in ("input_ids", "attention_mask")}, "text")
    torch.testing.assert_close(text, output.text_embeds)


def test_the_loss_is_that_of_transformers() -> None:
    with torch.no_grad():
        output = clip()(**pairs(), return_loss=True)  # type: ignore[arg-type]
    torch.testing.assert_close(et.contrastive_loss(output.logits_per_image), output.loss)
    order = torch.tensor([2, 0, 1, 4, 5, 3])
    shuffled = output.logits_per_image[:, order.argsort()]
    torch.testing.assert_close(et.contrastive_loss(shuffled, order), output.loss)
    with pytest.raises(EdgetuneError, match=r"as many rows as columns: got \(6, 4\)"):
        et.contrastive_loss(output.logits_per_image[:, :4])


def test_other_models_of_two_towers() -> None:
    from transformers import SiglipConfig, SiglipModel

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**shape, "vocab_size": 48, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**shape, "image_size": 16, "patch_size": 8}
    model = et.apply(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), et.Lock())
    loss_of(call(model.train(), pairs())).backward()  # type: ignore[no-untyped-call]
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"text_model", "logit_scale", "logit_bias"}


def test_what_does_not_fit_is_refused() -> None:
    for model, name in ((mlp(), "Mlp"), (bert(), "BertForSequenceClassification")):
        with pytest.raises(EdgetuneError, match=f"{name} has no two towers"):
            et.apply(model, et.Lock())
        with pytest.raises(EdgetuneError, match=f"{name} has no two towers"):
            et.locked_features(model, torch.zeros(1))
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(EdgetuneError, match=r"CLIPModel has no such tower: got 'audio'"):
        et.apply(clip(), et.Lock(tower="audio"))
    both = et.apply(clip(), [et.Lock(), et.LoRA(rank=2, targets=("*.q_proj",))])
    with pytest.raises(EdgetuneError, match="something in the locked tower trains"):
        call(both.train(), pairs())
    other: Any = nn.Module()
    other.text_model, other.vision_model = nn.Linear(4, 4), nn.Linear(4, 4)
    with pytest.raises(EdgetuneError, match="cannot run its blocks again"):
        et.apply(other, et.Lock())
    et.apply(other, et.Lock(checkpointing=False))
