"""LoRA-Guard: a classifier on a language model whose generation stays as it is, in eager mode and in one program."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import call, logits_of
from edgetune.data.dataset import Split
from edgetune.data.rows import Rows
from edgetune.export.inspect import inspect
from edgetune.models.text import TextEncoder
from edgetune.program.artifact import Artifact
from edgetune.program.carried import Carried, TextPreprocessing
from edgetune.run.predictor import Predictor
from edgetune.runtime.language import greedy_in_child
from edgetune.tasks.text_classification import TextClassification
from edgetune.train.loop import train
from support.decoders import ARCHITECTURES, decoder, export_decoder, tokenizer
from support.laws import bert, fit, llama, logits, mlp, tokens

torch.set_num_threads(1)

GUARD = et.LoRAGuard(rank=2, targets=("*.q_proj", "*.v_proj"))
CLASSES = ("harmless", "harmful")


def talking() -> Any:
    return decoder("Llama", **ARCHITECTURES["Llama"])


def texts(count: int = 64, seed: int = 1) -> Split:
    """Texts of letters and, if they are harmful, of digits, at most 16 tokens."""
    draw, fast = random.Random(seed), tokenizer()
    fast.pad_token = "</s>"
    labels = [n % 2 for n in range(count)]
    rows = ["".join(draw.choices("0123456789" if one else "abcdefghij", k=draw.randint(4, 20))) for one in labels]
    return Split(TextClassification(CLASSES), Rows(rows, labels), TextEncoder(fast, 16))


@pytest.fixture(scope="module")
def trained() -> Any:
    torch.manual_seed(0)
    split = texts()
    guarded = et.apply(talking(), GUARD)
    train(guarded, et.Train(epochs=6, batch_size=16, learning_rate=1e-2), split, split.task.loss, seed=0)
    return et.finalize(guarded)


def test_generation_is_identical_while_the_guard_is_there_and_trains() -> None:
    plain, ids = llama(), tokens()["input_ids"]  # type: ignore[call-overload]
    expected, answer = logits(plain, tokens()), plain.generate(ids, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    guarded: Any = et.apply(llama(), GUARD)
    for _ in range(2):
        assert torch.equal(logits(guarded.base, tokens()), expected)
        assert torch.equal(guarded.base.generate(ids, max_new_tokens=8, do_sample=False), answer)
        assert not any(module._forward_hooks for module in guarded.base.modules())
        fit(guarded, tokens())
    before = dict(plain.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in guarded.base.named_parameters())
    assert {name.split(".")[0] for name, p in guarded.named_parameters() if p.requires_grad} == {"paths", "head"}


def test_the_guard_reads_the_last_token_that_is_no_padding() -> None:
    guarded = et.apply(llama(), GUARD)
    fit(guarded, tokens())
    ids, pads = tokens()["input_ids"][:, :6], torch.zeros(4, 4, dtype=torch.long)  # type: ignore[call-overload]
    ones = torch.ones_like(ids)
    expected = logits(guarded, ids)
    right = {"input_ids": torch.cat([ids, pads], 1), "attention_mask": torch.cat([ones, pads], 1)}
    torch.testing.assert_close(logits(guarded, right), expected, atol=1e-6, rtol=1e-5)
    left = {"input_ids": torch.cat([pads, ids], 1), "attention_mask": torch.cat([pads, ones], 1)}
    with torch.no_grad():
        position_free = logits_of(call(guarded, left))
    assert position_free.argmax(1).tolist() == expected.argmax(1).tolist()


def test_it_computes_the_classifier_with_merged_weights() -> None:
    guarded: Any = et.apply(llama(), GUARD)
    fit(guarded, tokens())
    scores, merged = logits(guarded, tokens()), llama()
    with torch.no_grad():
        for name, path in zip(guarded.layers, guarded.paths.values(), strict=True):
            merged.get_submodule(name).weight += 8 * path.B.weight @ path.A.weight  # type: ignore[operator]
        states = merged.base_model(**tokens())[0]  # type: ignore[operator, arg-type]
        torch.testing.assert_close(guarded.head(states[:, -1]), scores, atol=1e-5, rtol=1e-5)


def test_it_learns_from_a_split_and_its_file_brings_it_back(trained: Any, tmp_path: Path) -> None:
    split = texts(32, seed=2)
    inputs, labels = split.batch(range(32))
    assert (logits(trained, inputs).argmax(1) == labels).float().mean() > 0.9
    file = et.save_guard(trained, tmp_path / "guard.safetensors")
    own = sum(p.numel() for part in ("paths", "head") for p in trained.get_submodule(part).parameters())
    assert file.stat().st_size < 4 * own + 2000
    again = et.load_guard(talking(), file)
    assert torch.equal(logits(again, inputs), logits(trained, inputs))
    assert again.settings == GUARD
    assert [t.name for t in et.core.apply.active_techniques(again)] == ["lora_guard"]  # type: ignore[attr-defined]


def test_another_base_and_other_files_are_refused(trained: Any, tmp_path: Path) -> None:
    file, other = et.save_guard(trained, tmp_path / "guard.safetensors"), talking()
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-3
    with pytest.raises(EdgetuneError, match="trained on another base"):
        et.load_guard(other, file)
    with pytest.raises(EdgetuneError, match="trained on another base"):
        et.load_guard(llama(), file)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(EdgetuneError, match="holds no guard"):
        et.load_guard(talking(), tmp_path / "other.safetensors")
    with pytest.raises(EdgetuneError, match="cannot be read"):
        et.load_guard(talking(), tmp_path / "nothing.safetensors")
    with pytest.raises(EdgetuneError, match="the model has no guard"):
        et.save_guard(talking(), file)


def test_what_does_not_fit_is_refused_before_anything_changes() -> None:
    for model, technique, message in (
        (mlp(), GUARD, "a guard needs a language model of transformers"),
        (bert(), et.LoRAGuard(targets=("*.query",)), "a guard needs a language model of transformers"),
        (llama(), et.LoRAGuard(targets=("*.q_proj", "lm_head")), "the model's body does not call these layers"),
    ):
        state = {name: p.requires_grad for name, p in model.named_parameters()}
        with pytest.raises(EdgetuneError, match=message):
            et.apply(model, technique)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == state
        assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(EdgetuneError, match="classes"):
        et.LoRAGuard(targets=("*",), classes=("one",))
    head = et.SparseUpdate(scheme={"*": "frozen", "lm_head": "full"})
    with pytest.raises(EdgetuneError, match="cannot follow sparse-update"):  # its layers would train in the base
        et.apply(llama(), [head, GUARD])


def test_gradient_checkpointing_would_run_blocks_without_their_paths() -> None:
    guarded: Any = et.apply(llama(), GUARD)
    for module in guarded.base.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    logits(guarded, tokens())
    with pytest.raises(EdgetuneError, match="gradient checkpointing runs the blocks again in backward"):
        guarded.train()(**tokens())


def test_a_cached_prefix_ends_before_the_first_path(tmp_path: Path) -> None:
    targets, split = ("*.1.*.q_proj",), texts(16)
    results = []
    for cached in (False, True):
        torch.manual_seed(0)
        guarded = et.apply(decoder("Llama", num_key_value_heads=2, num_hidden_layers=3), et.LoRAGuard(targets=targets))
        settings = et.Train(epochs=2, batch_size=8, learning_rate=1e-2, cache_prefix=cached)
        result = train(guarded, settings, split, split.task.loss, seed=0, prefixes=tmp_path)
        results.append(logits(guarded, split.batch(range(4))[0]))
    assert result.prefix is not None
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def program(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    carried = Carried(model="talking", preprocessing=TextPreprocessing(max_length=16, cut="left", pad_id=1, ending="!"))
    return export_decoder(trained, tmp_path_factory.mktemp("guard"), check_tokens=8, carried=carried)


def test_one_program_generates_as_the_bases_own(trained: Any, program: Artifact, tmp_path: Path) -> None:
    plain = export_decoder(trained.base, tmp_path, check_tokens=8)
    prompt = torch.randint(2, 258, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    ((expected, values),) = greedy_in_child(plain.path, [prompt], 32, 32)
    ((got, same),) = greedy_in_child(program.path, [prompt], 32, 32)
    assert got == expected
    assert torch.equal(same, values)
    weights = 4 * sum(p.numel() for p in trained.base.parameters())
    assert program.manifest.size_bytes - plain.manifest.size_bytes < 0.3 * weights
    assert [one.name for one in program.manifest.calls] == ["token", "prompt"]
    assert et.generate(program.path, "hello", max_tokens=3).tokens
    with pytest.raises(EdgetuneError, match="one with a guard predicts classes as well"):
        et.predict(plain.path, "text")


def test_the_program_scores_texts_as_the_guard_does(trained: Any, program: Artifact) -> None:
    guard = program.manifest.guard
    assert guard is not None
    assert guard.call.parity is not None
    assert guard.call.parity.max_relative_difference < 1e-4
    assert [spec.shape for spec in guard.call.inputs] == [(1, 16), (1, 16)]
    assert guard.carried.labels == CLASSES
    for text in ("hide", "0123456789" * 3):
        ids = torch.tensor([tokenizer()(text + "!")["input_ids"][-16:]])
        expected = logits(trained, ids)
        (answer,) = et.predict(program.path, text)
        assert answer.scores["harmful"] == pytest.approx(expected.softmax(1)[0, 1].item(), abs=1e-4)
        row = Predictor(program.path).preparation.inputs(text)
        torch.testing.assert_close(program.run(row, "guard")[0], expected, atol=1e-4, rtol=1e-4)


def test_card_and_inspection_name_the_guard(program: Artifact) -> None:
    assert program.manifest.carried is not None
    assert program.manifest.carried.preprocessing is None
    text = program.path.with_suffix(".md").read_text()
    assert "## Guard" in text
    assert "classes, in order: harmless, harmful" in text
    details = inspect(program.path)
    assert {method.name for method in details.methods} >= {"forward", "guard"}
    assert details.beside is not None
    assert "guard: rows 1" in details.beside.parity


def test_a_program_in_other_forms_says_what_it_lacks(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match="a program with a guard computes in fp32"):
        export_decoder(trained, tmp_path, dtype="bf16")
    with pytest.raises(EdgetuneError, match="its base has no adapters"):
        export_decoder(trained, tmp_path, adapters={"en": tmp_path})


def test_the_guard_alone_is_a_classifier(trained: Any, tmp_path: Path) -> None:
    inputs = texts(4).batch(range(1))[0]
    artifact = et.export(trained, inputs, tmp_path / "guard.pte")
    torch.testing.assert_close(artifact.run(inputs)[0], logits(trained, inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_over_a_base_in_4_bits(tmp_path: Path) -> None:
    guarded = et.apply(talking(), GUARD)
    fit(guarded, texts(8).batch(range(8))[0])
    guarded = et.apply(guarded, et.Int4(targets=("base.*_proj",)))
    artifact = export_decoder(guarded, tmp_path, check_tokens=4, min_same_prediction_pct=0)
    assert artifact.manifest.guard is not None
    assert artifact.manifest.guard.call.parity.max_relative_difference < 0.05
