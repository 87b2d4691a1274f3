"""LLaMA-Adapter against peft's own: trained, saved, loaded, and in programs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.lean.saved import saved_bytes
from support.decoders import export_decoder
from support.decoders import llama as decoder
from support.laws import bert, fit, llama, logits, loss_of, mlp, tokens

torch.set_num_threads(1)


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(4)
    config = MistralConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=48, max_position_embeddings=32, use_cache=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def by_peft(model: nn.Module, folder: Path) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def trained(make: Any = llama, **settings: Any) -> nn.Module:
    model = et.apply(make(), et.AdaptionPrompt(tokens=3, **settings))
    torch.testing.assert_close(logits(model, tokens()), logits(make(), tokens()), atol=0, rtol=0)
    fit(model, tokens(), steps=20)
    assert (logits(model, tokens()) - logits(make(), tokens())).abs().max() > 1e-3
    return model


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize("depth", [None, "last-1"])
def test_plain_peft_computes_the_same_and_edgetune_loads_it(make: Any, depth: str | None, tmp_path: Path) -> None:
    model = trained(make, depth=depth)
    expected = logits(model, tokens())
    et.save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(by_peft(make(), tmp_path), tokens()), expected, atol=1e-5, rtol=1e-5)
    other = et.load_adapter(make(), tmp_path)
    torch.testing.assert_close(logits(other, tokens()), expected, atol=1e-6, rtol=0)
    names = {name for name, p in other.named_parameters() if p.requires_grad}
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    fit(other, tokens())
    assert not torch.equal(logits(other, tokens()), expected)
    plain = et.finalize(model)
    torch.testing.assert_close(logits(plain, tokens()), expected, atol=1e-6, rtol=1e-5)
    constants = {name for name, _ in plain.named_buffers() if ".adaption." in name}
    assert len(constants) == 2 * (1 if depth else 2)


def test_backward_ends_at_the_first_block_with_tokens() -> None:
    whole, last = (et.apply(llama(), et.AdaptionPrompt(tokens=3, depth=depth)) for depth in (None, "last-1"))
    assert 0 < saved_bytes(last, tokens(), loss_of) < 0.7 * saved_bytes(whole, tokens(), loss_of)


def test_a_program_and_a_text_generation_program(tmp_path: Path) -> None:
    model = et.finalize(trained())
    artifact = et.export(model, tokens(), tmp_path / "model.pte", one_row=True, target="xnnpack")
    assert artifact.manifest.main.parity.same_prediction_pct == 100  # type: ignore[union-attr]
    writer = et.apply(decoder(), et.AdaptionPrompt(tokens=3))
    for name, parameter in writer.named_parameters():
        if name.endswith("adaption.gate"):
            parameter.data.fill_(0.7)
    writer = et.finalize(writer)
    program = export_decoder(writer, tmp_path)
    assert program.manifest.main.parity.same_prediction_pct == 100  # type: ignore[union-attr]


def test_a_finished_model_opens_with_its_tokens() -> None:
    technique = et.AdaptionPrompt(tokens=3, depth="last-1")
    model = et.finalize(trained(depth="last-1"))
    other = technique.rebuild(llama(), model.state_dict())
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(other, tokens()), logits(model, tokens()), atol=0, rtol=0)


def test_16_bits() -> None:
    model = et.apply(llama().bfloat16(), et.AdaptionPrompt(tokens=3))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    fit(model, tokens())
    trained = logits(model, tokens())
    torch.testing.assert_close(logits(et.finalize(model), tokens()), trained, atol=1e-2, rtol=1e-2)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    for model in (bert(), mlp()):
        with pytest.raises(EdgetuneError, match=r"attention as in these models of transformers.*llama, mistral"):
            et.apply(model, et.AdaptionPrompt())
    with pytest.raises(EdgetuneError, match="the model has 2 blocks"):
        et.apply(llama(), et.AdaptionPrompt(depth="last-3"))
    model = et.finalize(et.apply(llama(), et.AdaptionPrompt(tokens=2)))
    with pytest.raises(EdgetuneError, match="has an adaption prompt already"):
        et.apply(model, et.AdaptionPrompt())
    et.save_adapter(et.apply(llama(), et.AdaptionPrompt(tokens=2)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    save_file({key: value for key, value in state.items() if "layers.0" not in key}, file)
    plain = llama()
    with pytest.raises(EdgetuneError, match=r"the tokens do not fit this model: got .*layers\.0"):
        et.load_adapter(plain, tmp_path)
    assert all(parameter.requires_grad for parameter in plain.parameters())
