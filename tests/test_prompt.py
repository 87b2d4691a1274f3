from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import cache_argument, call
from edgetune.recipe.recipe import load
from edgetune.run.fold import Fold
from support.checkpoints import save_llama, save_rows
from support.laws import bert, fit, llama, logits, loss_of, mlp, tokens

torch.set_num_threads(1)

KINDS = {
    "prompt": et.Prompt(tokens=3),
    "p-tuning": et.Prompt(kind="p-tuning", tokens=3, encoder_width=8),
    "prefix": et.Prompt(kind="prefix", tokens=3),
    "projected prefix": et.Prompt(kind="prefix", tokens=3, encoder_width=8),
}


def by_peft(model: nn.Module, folder: Path) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModelForCausalLM.from_pretrained(model, str(folder)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_loads_what_was_trained_and_computes_the_same(kind: str, tmp_path: Path) -> None:
    technique = KINDS[kind]
    model = et.apply(llama(), technique)
    before = loss_of(call(model, tokens())).item()
    fit(model, tokens(), steps=5)
    assert loss_of(call(model, tokens())).item() < before
    trained = logits(model, tokens())
    technique.save(model, tmp_path)
    other = by_peft(llama(), tmp_path / "adapter")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`past_key_values` is deprecated")
        expected = other(**tokens()).logits[:, -10:]
    torch.testing.assert_close(trained, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(et.finalize(model), tokens()), expected, atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == {*llama().state_dict(), "prompt.vectors"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_trains_on(kind: str, tmp_path: Path) -> None:
    model = et.apply(llama(), KINDS[kind])
    fit(model, tokens(), steps=5)
    trained = logits(model, tokens())
    et.save_adapter(model, tmp_path / "first")
    other = et.load_adapter(llama(), tmp_path / "first")
    torch.testing.assert_close(logits(other, tokens()), trained, atol=1e-6, rtol=1e-5)
    assert [name for name, p in other.named_parameters() if p.requires_grad] == ["prompt.encoder.weight"]
    fit(other, tokens(), steps=5)
    further = logits(other, tokens())
    assert (further - trained).abs().max() > 1e-3
    et.save_adapter(other, tmp_path / "second")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`past_key_values` is deprecated")
        expected = by_peft(llama(), tmp_path / "second")(**tokens()).logits[:, -10:]
    torch.testing.assert_close(further, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(et.finalize(other), tokens()), further, atol=1e-5, rtol=1e-5)


def test_plain_pefts_prompt_is_loaded_and_one_that_does_not_fit_is_not(tmp_path: Path) -> None:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        theirs = peft.get_peft_model(llama(), config).eval()
        theirs.save_pretrained(str(tmp_path))
        with torch.no_grad():
            expected = theirs(**tokens()).logits[:, -10:]
    torch.testing.assert_close(logits(et.load_adapter(llama(), tmp_path), tokens()), expected, atol=1e-5, rtol=1e-5)
    file = tmp_path / "adapter_model.safetensors"
    wide = bert()
    for tensors in (
        {"prompt_embeddings": torch.zeros(3, 31)},
        {"prompt_embeddings": torch.zeros(3, 32), "x": torch.ones(1)},
    ):
        save_file(tensors, file)
        with pytest.raises(EdgetuneError, match="the vectors do not fit this model"):
            et.load_adapter(wide, tmp_path)
    assert not hasattr(wide, "prompt")
    assert all(parameter.requires_grad for parameter in wide.parameters())
    with pytest.raises(EdgetuneError, match="needs a model that states its embeddings"):
        et.load_adapter(mlp(), tmp_path)


def test_only_the_encoder_trains_and_the_text_keeps_its_length() -> None:
    model = et.apply(llama(), KINDS["p-tuning"])
    assert all(name.startswith("prompt.encoder.") for name, p in model.named_parameters() if p.requires_grad)
    assert logits(model, tokens()).shape == logits(llama(), tokens()).shape
    ids = tokens()["input_ids"]  # type: ignore[call-overload]
    torch.testing.assert_close(logits(model, ids), logits(model, tokens()))  # by place, without a mask
    with torch.no_grad():
        vectors = model.get_input_embeddings()(ids)  # type: ignore[operator]
    torch.testing.assert_close(logits(model, {"inputs_embeds": vectors}), logits(model, ids))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_positions_and_labels_are_those_of_the_text(kind: str) -> None:
    model = et.apply(llama(), KINDS[kind]).eval()
    ids = tokens()["input_ids"][:1]  # type: ignore[call-overload]
    mask = torch.tensor([[1] * 6 + [0] * 4])
    padded, short = logits(model, {"input_ids": ids, "attention_mask": mask}), logits(model, ids[:, :6])
    torch.testing.assert_close(padded[:, :6], short, atol=1e-5, rtol=1e-5)
    placed = logits(model, {"input_ids": ids, "position_ids": torch.arange(10)[None]})
    torch.testing.assert_close(placed, logits(model, ids), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    expected = nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:])
    if kind.endswith("prefix"):
        torch.testing.assert_close(output.loss, expected)
    else:  # the last virtual token predicts the first of the text as well
        assert torch.isfinite(output.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_vectors_through_frozen_blocks(kind: str) -> None:
    head = et.SparseUpdate(scheme={"*": "frozen", "lm_head": "full"})
    model, alone = et.apply(llama(), [head, KINDS[kind]]).train(), et.apply(llama(), KINDS[kind]).train()
    alone.load_state_dict(model.state_dict())
    for each in (model, alone):
        loss_of(call(each, tokens())).backward()
    for name, parameter in alone.get_submodule("prompt").named_parameters():
        gradient = model.get_submodule("prompt").get_parameter(name).grad
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-4)
    assert model.get_parameter("lm_head.weight").grad is not None


def test_an_encoder_gets_a_prompt_with_its_token_types() -> None:
    model = et.apply(bert(), KINDS["prompt"])
    inputs = {**tokens(), "token_type_ids": torch.zeros(4, 10, dtype=torch.long)}  # type: ignore[dict-item]
    torch.testing.assert_close(logits(model, inputs), logits(model, tokens()))
    assert logits(model, tokens()).shape == (4, 3)


def test_a_4_bit_base_and_4_bits_afterwards() -> None:
    model = et.apply(llama(), [et.NF4(block_size=32), KINDS["prefix"]])
    fit(model, tokens())
    trained = logits(model, tokens())
    model = et.finalize(model)
    torch.testing.assert_close(logits(model, tokens()), trained, atol=1e-5, rtol=1e-5)
    rounded = et.apply(model, et.Int8Dynamic(), et.Sample.of(tokens()))
    assert 0 < (logits(rounded, tokens()) - trained).norm() < 0.2 * trained.norm()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(EdgetuneError, match="needs a model that states its embeddings"):
        et.apply(mlp(), KINDS["prompt"])
    with pytest.raises(EdgetuneError, match="a prefix needs a decoder"):
        et.apply(bert(), KINDS["prefix"])
    with pytest.raises(EdgetuneError, match="only p-tuning and prefix have a network"):
        et.Prompt(encoder_width=8)
    model = et.finalize(et.apply(llama(), KINDS["prompt"]))
    with pytest.raises(EdgetuneError, match="the model has a prompt already"):
        et.apply(model, KINDS["prefix"])
    from transformers import DynamicCache

    with pytest.raises(EdgetuneError, match="this call continues a text"):
        model(**tokens(), **{cache_argument(model): DynamicCache()})  # type: ignore[arg-type]


def test_a_text_generation_program_is_refused_before_anything_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_llama(tmp_path / "writer")
    save_rows(tmp_path / "rows.csv")
    text = "model: {source: 'hf:writer', max_length: 8}\ndata: {source: 'csv:rows.csv', label: null}\n"
    steps = "steps: [{prompt: {tokens: 2}}, train]\nexport: {language: true, max_tokens: 16}"
    (tmp_path / "r.yaml").write_text(text + steps, encoding="utf-8")
    with pytest.raises(EdgetuneError, match=r"text-generation program continues one: got \['prompt'\]"):
        Fold(load(tmp_path / "r.yaml"), tmp_path / "run", resume=False, progress=lambda *_: None)
