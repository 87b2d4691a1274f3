"""Export a decoder with a static key-value cache and its tokenizer as a text-generation program."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgetune.adapt.guarded import GuardedModel
from edgetune.adapt.low_rank import LowRank
from edgetune.capture.narrow import TORCH_DTYPES, narrow
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.files import write_atomically
from edgetune.core.floats import FloatType, KeyValueType, check_types
from edgetune.core.freed import release_freed_memory
from edgetune.core.inputs import device_of
from edgetune.core.modes import preserve_state
from edgetune.core.parity import Parity
from edgetune.export import targets
from edgetune.export.adapters import AdapterSet, prove_each, read_adapters, split_files
from edgetune.export.language import parity
from edgetune.export.language.adapted import AdaptedDecoder
from edgetune.export.language.cached import CachedDecoder, check_model
from edgetune.export.language.guard import NAME as GUARD
from edgetune.export.language.guard import check_guard, guard_method
from edgetune.export.language.lower import lower
from edgetune.export.lower import Layout, Lowered
from edgetune.export.pipeline import advise_on, call_of, check_narrow, choose_target, manifest_of
from edgetune.export.side_paths import SidePaths
from edgetune.export.targets.target import Target
from edgetune.program.artifact import Artifact, write_pair
from edgetune.program.card import write_card
from edgetune.program.carried import Carried, tokenizer_file
from edgetune.program.manifest import AdapterForm, Call, LanguageSpec, Manifest, TensorSpec, TokenizerSpec, data_path
from edgetune.program.program_files import sha256_of
from edgetune.program.tokenizer import backend, encode, tokenizer_spec, without_truncation

PREFILL = 128  # tokens of one call: more need more memory for little speed
# The attention kernel processes blocks of 32 tokens (64 from 192 tokens on), and masks wrongly in a block that crosses
# a multiple of 512 cache positions: chunks of these sizes have no such block.
PREFILLS = (32, 64, 96, 128, 160)
CHECK_PROMPT = "Why does the sea have waves? Answer in a few sentences."
CHECK_TOKENS = 32


def export_language(
    model: nn.Module,
    tokenizer: Any,
    path: str | Path,
    *,
    max_tokens: int = 512,
    device: str | None = None,
    target: str | None = None,
    dtype: FloatType = "fp32",
    cache_dtype: KeyValueType | None = None,
    prefill_tokens: int = PREFILL,
    check_prompts: Sequence[str | Sequence[int]] = (CHECK_PROMPT,),
    check_tokens: int = CHECK_TOKENS,
    min_same_prediction_pct: float = 99.0,
    carried: Carried | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    form: AdapterForm = "inputs",
    adapter_rank: int | None = None,
) -> Artifact:
    """Lower a transformers decoder to `path` (a `.pte`), verify that it generates the same text, and add its
    tokenizer.

    The cache has `max_tokens` positions for prompt and answer together. A prompt is read in chunks of
    `prefill_tokens`, one of `PREFILLS`. The model may have `Int4` applied. `tokenizer` is a fast tokenizer of
    transformers, or a `tokenizers.Tokenizer`. After each of `check_prompts` (user messages, or the tokens of any
    text), the first `check_tokens` greedy tokens of the program are compared with those of the model in eager mode.
    A bf16 or fp16 model is exported as a float32 copy and compared with that copy; the manifest has a note about it.

    `dtype` is the type that the program computes in, next to quantized layers: "fp32", "bf16" or "fp16"; its logits are
    fp32. `cache_dtype` is that of the cache (None: `dtype`); "int8" takes a third of fp32's, with a scale for each head
    of a position. In every type the program is compared with the model in fp32.

    Writes `model.pte`, `model.json` and `model.tokenizer.json`. Raises `EdgetuneError` (exit code 5) if the model
    cannot be lowered, if the program does not run, or if fewer than `min_same_prediction_pct` of the tokens agree.
    Then no new program or manifest is left. `carried` is written to the manifest and to a model card, `model.md`.
    `adapters`, `form` and `adapter_rank` are as in `et.export`; ExecuTorch's own language runner runs the form `files`.

    Of a model with `et.LoRAGuard` the program also has the method `guard`, over the same weights, which takes
    `input_ids` and `attention_mask` `(1, n)` and returns the logits of its classes. `carried.preprocessing` says how a
    text becomes these; by default it has at most 128 tokens.
    """
    path = Path(path)
    check_types(dtype, cache_dtype)
    outer = model
    if isinstance(outer, GuardedModel):
        check_guard(dtype, adapters)
        model = outer.base
    chosen = _choose_target(model, path, max_tokens, prefill_tokens, device, target)
    backend_tokenizer = without_truncation(tokenizer)
    text = backend_tokenizer.to_str()
    spec = tokenizer_spec(tokenizer, tokenizer_file(path), sha256_of(text.encode()))
    prompts = [encode(backend_tokenizer, spec, p, raw=False) if isinstance(p, str) else list(p) for p in check_prompts]
    if not prompts or not all(prompts):
        raise EdgetuneError("the comparison needs at least one prompt, and tokens in every prompt")
    # a text-generation program has no fixed window of tokens to preprocess
    metadata = carried.model_copy(update={"preprocessing": None}) if carried is not None else None
    floats, stored = TORCH_DTYPES[dtype], cache_dtype or dtype
    outer, converted = _convert_to_float32(outer)
    guarded = outer if isinstance(outer, GuardedModel) else None
    model = outer if guarded is None else guarded.base
    check_narrow(model, floats)
    if form == "methods":
        message = "the methods of a text-generation program would each have a cache, and tokens of their own in it"
        raise EdgetuneError(message, got=form, allowed=["inputs", "files"], action="leave form out")
    sides = read_adapters(adapters, form, adapter_rank, model, chosen, dtype)
    guard = None if guarded is None else guard_method(guarded, prompts, tokenizer, spec, carried)
    with _as_program(model, max_tokens, floats, stored, sides) as (program, paths):
        prefill = min(prefill_tokens, max_tokens)
        facts = _facts(program, backend_tokenizer, spec, prefill)
        given = () if sides is None else sides.given(None)
        layout = Layout(external_data=sides is not None and sides.form == "files")
        others = {} if guard is None else {GUARD: (guard.request.module, guard.request.inputs.example)}
        lowered = lower(program, prefill, chosen, facts, given, layout, others)
        if paths is not None:
            paths.check_used()
        files = split_files(sides, lowered["prompt"].weights)
        whole = replace(lowered["prompt"], weights=files.weights)
        release_freed_memory()  # the graphs, and the weights in the forms that lowering gave them

        def prove(partial: Path) -> Manifest:
            data = data_path(partial) if whole.weights else None

            def prove_with(
                adapter: LowRank | None, data: Path | None
            ) -> tuple[Parity | None, tuple[int, float] | None]:
                if not chosen.runs_here:
                    return None, None
                allowed = parity.allowed_difference_of(model, floats, stored)
                given = () if sides is None else sides.given(adapter)
                factors = nullcontext() if sides is None or paths is None else paths.holding(sides.tensors(adapter))
                with advise_on(dtype), factors:
                    compared, first = parity.compare(
                        partial, model, prompts, check_tokens, max_tokens, prefill, allowed, given, data
                    )
                    parity.check(compared, first, min_same_prediction_pct)
                return compared, first

            (compared, first), adapted = prove_each(sides, files, data, path, prove_with)
            write_atomically(tokenizer_file(path), text)
            section = _section(program, spec, facts, whole.shared_bytes, first)
            calls = _calls(lowered, section, compared, sides.inputs if sides is not None else ())
            also = ", and compared with the model in float32" if compared is not None else ""
            computed = str(floats).removeprefix("torch.")
            note = f"exported in {computed} from {converted} weights{also}" if converted else ""
            sections: dict[str, Any] = {"dtype": dtype, "carried": metadata, "language": section, "note": note}
            sections["guard"] = None if guard is None else guard.prove(partial, lowered[GUARD], chosen)
            return manifest_of("language", whole, calls, chosen, device, path, **sections, adapters=adapted)

        manifest = write_pair(path, whole.data, prove, whole.weights, files.beside(path))
        artifact = Artifact(path=path, manifest=manifest)
    if metadata is not None:
        write_card(path, artifact.manifest)
    return artifact


def check_exportable(model: nn.Module, tokenizer: Any, *, max_tokens: int, target: str | None = None) -> None:
    """Raise before a training what `export_language` would raise before it lowers the model."""
    _choose_target(model, Path("model.pte"), max_tokens, PREFILL, None, target)
    backend(tokenizer)


def _choose_target(
    model: nn.Module, path: Path, max_tokens: int, prefill_tokens: int, device: str | None, target: str | None
) -> Target:
    check_model(model, max_tokens)
    if prefill_tokens not in PREFILLS:
        raise EdgetuneError(
            "the prompt chunk size is not valid",
            got=prefill_tokens,
            allowed=map(str, PREFILLS),
            exit_code=Exit.USAGE,
        )
    chosen = targets.for_device(device, target)
    if chosen.name not in ("xnnpack", "portable"):  # before it asks for the tools of another target
        raise EdgetuneError(
            "a key-value cache needs a CPU target",
            got=chosen.name,
            allowed=["xnnpack", "portable"],
            action="pass target='xnnpack'",
            exit_code=Exit.EXPORT,
        )
    return choose_target(path, device, target)


def _convert_to_float32(model: nn.Module) -> tuple[nn.Module, str]:
    """The model, or a float32 copy if it has 16-bit weights, and their type ("bfloat16"), or nothing.

    The backend has no fast kernels in 16 bits. Raises `EdgetuneError` if such weights are also quantized.
    """
    halves = (torch.bfloat16, torch.float16)
    named = [(name, t) for name, t in (*model.named_parameters(), *model.named_buffers()) if t.dtype in halves]
    if not named:
        return model, ""
    types = " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for _, tensor in named}))
    packed = [name for name, tensor in named if type(tensor.data) is not torch.Tensor]
    if packed:
        raise EdgetuneError(
            f"the model was quantized in {types}, which cannot be exported as float32",
            got=packed[0],
            action="call model.float() before you quantize it",
            exit_code=Exit.EXPORT,
        )
    return copy.deepcopy(model).float(), types


@contextlib.contextmanager
def _as_program(
    model: nn.Module, max_tokens: int, dtype: torch.dtype, cache_dtype: KeyValueType, sides: AdapterSet | None
) -> Iterator[tuple[CachedDecoder, SidePaths | None]]:
    """Inside, the model in eval mode with a cache and its side paths, if any, or a copy of it in 16 bits."""
    if device_of(model).type != "cpu":
        raise EdgetuneError(
            "a language model must be exported on the CPU", got=str(device_of(model)), action="model.cpu()"
        )
    with preserve_state(model):
        model.eval()
        if sides is None:
            computed = model if dtype == torch.float32 else narrow(model, dtype)
            yield CachedDecoder(computed, max_tokens, cache_dtype).eval(), None
            return
        paths = sides.paths()
        with paths.attached(model):
            computed = model if dtype == torch.float32 else narrow(model, dtype)
            own = [tensor.to(dtype) for tensor in sides.placeholders()] if sides.form == "files" else []
            yield AdaptedDecoder(computed, max_tokens, cache_dtype, paths, own).eval(), paths


def _facts(program: CachedDecoder, tokenizer: Any, spec: TokenizerSpec, prefill: int) -> dict[str, Any]:
    """The constant methods that ExecuTorch's language runner reads from a program."""
    bos, eos = _end_ids(program, tokenizer, spec)
    facts: dict[str, Any] = {
        "get_max_seq_len": prefill,
        "get_max_context_len": program.max_tokens,
        "get_vocab_size": int(program.config.vocab_size),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_eos_ids": list(eos),
    }
    return facts if bos is None else {**facts, "get_bos_id": bos}


def _end_ids(program: CachedDecoder, tokenizer: Any, spec: TokenizerSpec) -> tuple[int | None, tuple[int, ...]]:
    """The begin and end tokens, from the generation config, the model's config and the tokenizer."""
    generation = getattr(program.model, "generation_config", None)
    ends: list[int] = []
    for holder in (generation, program.config):
        ids = getattr(holder, "eos_token_id", None)
        ends += ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids]
    special = tokenizer.token_to_id(spec.special_tokens.get("eos_token", ""))
    ends += [] if special is None else [special]
    bos = getattr(program.config, "bos_token_id", None)
    return (bos if isinstance(bos, int) else None), tuple(dict.fromkeys(int(i) for i in ends))


def _section(
    program: CachedDecoder,
    spec: TokenizerSpec,
    facts: dict[str, Any],
    shared_bytes: int,
    first: tuple[int, float] | None,
) -> LanguageSpec:
    return LanguageSpec(
        architecture=str(program.config.model_type),
        max_tokens=program.max_tokens,
        prefill_tokens=facts["get_max_seq_len"],
        vocabulary=facts["get_vocab_size"],
        bos_id=facts.get("get_bos_id"),
        eos_ids=tuple(facts["get_eos_ids"]),
        tokenizer=spec,
        shared_bytes=shared_bytes,
        cache_bytes=program.cache_bytes,
        cache_dtype=program.cache_dtype,
        first_difference=None if first is None else first[0],
        margin_at_difference=None if first is None else first[1],
    )


def _calls(
    lowered: dict[str, Lowered], section: LanguageSpec, compared: Parity | None, given: tuple[TensorSpec, ...]
) -> tuple[Call, ...]:
    prefill = section.prefill_tokens
    position = TensorSpec(name="position", shape=(1,), dtype="int64")
    logits = TensorSpec(name="logits", shape=(1, 1, section.vocabulary), dtype="float32")
    kinds = (("token", 1, f"a token after {prefill}"), ("prompt", prefill, f"{prefill} tokens of a prompt"))
    return tuple(
        call_of(
            name,
            lowered[name],
            (TensorSpec(name="tokens", shape=(1, count), dtype="int64"), position, *given),
            (logits,),
            compared,
            label=label,
        )
        for name, count, label in kinds
    )
