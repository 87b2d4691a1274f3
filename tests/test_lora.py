from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgetune import SparseUpdate  # the public name
from edgetune.adapt.files import save_adapter
from edgetune.adapt.loading import load_adapter
from edgetune.adapt.lora import LoRA
from edgetune.core.apply import apply, finalize
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import call
from edgetune.core.peft_layers import is_peft
from edgetune.quant.nf4 import NF4
from support.laws import bert, cnn, dense, fit, llama, logits, loss_of, mlp, pictures, tokens, vectors

torch.set_num_threads(1)

QUERY = ("*.query",)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def plain_peft(model: nn.Module, **settings: Any) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()


def test_alone_it_freezes_the_base_and_trains_what_was_asked() -> None:
    model = LoRA(rank=2, targets=("blocks.*.up",), also_train=("classifier",)).apply(mlp())
    names = trained(model)
    assert {n for n in names if ".lora_" not in n} == {"classifier.weight", "classifier.bias"}
    assert len([n for n in names if ".lora_" in n]) == 6


def test_after_sparse_update_it_leaves_what_trains() -> None:
    model = apply(bert(), SparseUpdate(scheme="last-1"))
    before = trained(model)
    apply(model, LoRA(rank=2, targets=("bert.encoder.layer.0.*.query",)))
    assert {n for n in trained(model) if ".lora_" not in n} == before
    assert any(".lora_" in n for n in trained(model))


def test_gradients_are_those_of_the_dense_weight() -> None:
    model = LoRA(rank=2, alpha=6, targets=("blocks.1.up",)).apply(mlp())
    layer = model.get_submodule("blocks.1.up")
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    plain = mlp()
    with torch.no_grad():
        plain.get_submodule("blocks.1.up").weight.copy_(dense(layer))
    loss_of(call(model, vectors())).backward()
    loss_of(call(plain, vectors())).backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    whole = plain.get_submodule("blocks.1.up").weight.grad
    torch.testing.assert_close(a.grad, 3 * b.T @ whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(b.grad, 3 * whole @ a.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("also_train", [(), ("classifier",)])
def test_plain_peft_loads_ours(tmp_path: Path, also_train: tuple[str, ...]) -> None:
    import peft

    model = LoRA(rank=2, targets=QUERY, also_train=also_train).apply(bert())
    fit(model, tokens(), steps=20)
    folder = save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        theirs = peft.PeftModel.from_pretrained(bert(), str(folder)).eval()
    assert (logits(model, tokens()) - logits(bert(), tokens())).abs().max() > 1e-4
    torch.testing.assert_close(logits(theirs, tokens()), logits(model, tokens()), atol=1e-6, rtol=0)
    assert not list(folder.glob("*.bin"))


@pytest.mark.parametrize("modules_to_save", [None, ["classifier"]])
def test_ours_loads_plain_pefts(tmp_path: Path, modules_to_save: list[str] | None) -> None:
    theirs = plain_peft(bert(), r=3, lora_alpha=5, target_modules=["query", "value"], modules_to_save=modules_to_save)
    fit(theirs, tokens())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not find a config file")
        theirs.save_pretrained(str(tmp_path))
    model = load_adapter(bert(), tmp_path)
    torch.testing.assert_close(logits(model, tokens()), logits(theirs, tokens()), atol=1e-6, rtol=0)
    assert ("classifier.weight" in trained(model)) == bool(modules_to_save)
    merged = finalize(model)
    assert not any(is_peft(module) for module in merged.modules())
    torch.testing.assert_close(logits(merged, tokens()), logits(theirs, tokens()), atol=1e-6, rtol=0)


def test_what_sparse_update_trained_is_saved_with_the_adapter(tmp_path: Path) -> None:
    model = apply(bert(), [SparseUpdate(scheme="last-1"), LoRA(rank=2, targets=("bert.encoder.layer.0.*.query",))])
    fit(model, tokens())
    config = json.loads((save_adapter(model, tmp_path) / "adapter_config.json").read_text())
    assert "bert.encoder.layer.1.output.LayerNorm" in config["modules_to_save"]
    torch.testing.assert_close(
        logits(load_adapter(bert(), tmp_path), tokens()), logits(model, tokens()), atol=1e-6, rtol=0
    )


def test_an_adapter_file_that_would_lose_something_raises(tmp_path: Path) -> None:
    model = apply(bert(), [SparseUpdate(scheme="last-1"), LoRA(rank=2, targets=("bert.encoder.layer.1.*.query",))])
    with pytest.raises(EdgetuneError, match="trains and has an adapter"):
        save_adapter(model, tmp_path)
    with pytest.raises(EdgetuneError, match="has no adapter"):
        save_adapter(bert(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_does_not_fit_raises(tmp_path: Path) -> None:
    folder = save_adapter(LoRA(rank=2, targets=QUERY).apply(bert()), tmp_path)
    with pytest.raises(EdgetuneError, match="no such layers"):
        load_adapter(mlp(), folder)
    with pytest.raises(EdgetuneError, match="already has an adapter"):
        load_adapter(LoRA(rank=2, targets=QUERY).apply(bert()), folder)
    state = load_file(folder / "adapter_model.safetensors")
    first = sorted(state)[0]
    save_file({k: v for k, v in state.items() if k != first}, folder / "adapter_model.safetensors")
    with pytest.raises(EdgetuneError, match="does not fit"):
        load_adapter(bert(), folder)
    save_file({**state, "base_model.model.classifier.scale": torch.ones(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(EdgetuneError, match="does not belong to any layer"):
        load_adapter(bert(), folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(EdgetuneError, match=r"holds no adapter_model\.safetensors"):
        load_adapter(bert(), folder)


def test_another_kind_of_adapter_raises(tmp_path: Path) -> None:
    theirs = plain_peft(bert(), r=2, target_modules=["query"], lora_bias=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Adapter 'default': \d LoRA tensor\(s\) have invalid shape")
        theirs.save_pretrained(str(tmp_path))
    with pytest.raises(EdgetuneError, match="more than LoRA"):
        load_adapter(bert(), tmp_path)


def test_names_that_are_suffixes_of_others_adapt_nothing_else() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)
            self.inner = nn.ModuleDict({"up": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["up"](self.up(x))

    model = LoRA(rank=2, targets=("up",), skip=()).apply(Twice())
    assert [name for name, module in model.named_modules() if is_peft(module)] == ["up"]


@pytest.mark.parametrize(
    ("model", "settings", "what"),
    [
        (bert, {"targets": ("*.qury",)}, "matches no layer"),
        (bert, {"targets": ("*.LayerNorm",)}, "matches no layer"),
        (lambda: llama(tied=True), {"targets": ("lm_head",)}, "shares its weight"),
        (lambda: llama(tied=True), {"targets": ("*.embed_tokens",)}, "shares its weight"),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), {"targets": ("*.out_proj",)}, "reads its weight directly"),
        (mlp, {"targets": ("classifier",), "also_train": ("classifier",)}, "both targets and also_train"),
        (mlp, {"targets": ("stem",), "also_train": ("*.nothing",)}, "matches no layer"),
        (lambda: llama(tied=True), {"targets": ("*.q_proj",), "also_train": ("lm_head",)}, "shares its weight"),
    ],
)
def test_what_cannot_be_done_raises_before_anything_changed(model: Any, settings: dict[str, Any], what: str) -> None:
    net = model()
    before = trained(net)
    with pytest.raises(EdgetuneError, match=what):
        apply(net, LoRA(rank=2, **settings))
    assert trained(net) == before
    assert not any(is_peft(module) for module in net.modules())
    assert not [name for name in vars(net) if name.startswith("edgetune")]


def test_twice_raises() -> None:
    with pytest.raises(EdgetuneError, match="lora: cannot follow lora, which leaves adapters"):
        apply(mlp(), [LoRA(rank=2, targets=("stem",)), LoRA(rank=2, targets=("classifier",))])


@pytest.mark.parametrize("settings", [{"rank": 0}, {"dropout": 1.0}, {"targets": "*.query"}, {"rang": 3}, {"alpha": 0}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(EdgetuneError):
        LoRA(**{"targets": ("*",), **settings})


def test_frozen_batch_norms_keep_their_statistics() -> None:
    model = LoRA(rank=2, targets=("*.pointwise",)).apply(cnn())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fit(model, pictures())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    plain = finalize(apply(cnn(), LoRA(rank=2, targets=("*.pointwise",))))
    call(plain.train(), pictures())
    assert not torch.equal(plain.norm.running_mean, before["norm.running_mean"])


def test_embeddings_and_convolutions_merge() -> None:
    model = LoRA(rank=2, targets=("*.embed_tokens", "*.q_proj")).apply(llama())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    before, base = logits(model, tokens()), logits(llama(), tokens())
    assert (before - base).abs().max() > 1e-2
    torch.testing.assert_close(logits(LoRA(targets=("*",)).finalize(model), tokens()), before, atol=1e-3, rtol=1e-3)


def test_on_a_4_bit_base_the_merged_layer_is_plain_fp32() -> None:
    model = apply(bert(), [NF4(block_size=32), LoRA(rank=2, targets=QUERY)])
    fit(model, tokens())
    model = finalize(model)
    layer = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert type(layer) is nn.Linear
    assert layer.weight.dtype == torch.float32
