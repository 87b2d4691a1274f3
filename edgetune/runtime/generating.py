"""Generate text with an exported language model, by the real runtime in a child process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgetune.core.errors import EdgetuneError

if TYPE_CHECKING:
    from edgetune.program.adapters import Adapter

MAX_TOKENS = 256


@dataclass(frozen=True)
class Generation:
    """An answer, and its cost on this host."""

    text: str
    tokens: tuple[int, ...]  # an end token included
    prompt_tokens: int
    stopped: Literal["end", "length", "cache"]  # by an end token; at max_tokens; because the cache is full
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None  # None: the answer is one token, computed with the prompt
    load_ms: float
    peak_memory_mib: float  # of the process that ran it
    threads: int


def generate(
    path: str | Path,
    prompt: str,
    *,
    max_tokens: int = MAX_TOKENS,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
    raw: bool = False,
    adapter: Adapter = None,
    on_text: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Generate text for `prompt` with the program at `path` (a `.pte` of `export_language`).

    Args:
        path: the program; its manifest and tokenizer must be in the same folder.
        prompt: one user's message; put into the model's chat template, if it has one, unless `raw`.
        max_tokens: maximum length of the answer, in tokens. It ends earlier at an end token, or when the cache is
            full.
        temperature: 0 always takes the most likely token; above 0, tokens are sampled with this temperature.
        seed: seed of the sampling.
        threads: threads of the runtime; the default is chosen by the runtime.
        raw: pass the prompt unchanged, without a chat template.
        adapter: one of the program's adapters, by name; by default the base answers alone.
        on_text: called with each piece of text as it is generated.

    Raises `EdgetuneError`, with exit code 2 for invalid settings or a prompt that is longer than the cache, and 5
    if the program does not load or run.
    """
    from edgetune.program.artifact import Artifact
    from edgetune.program.tokenizer import ChatTokenizer
    from edgetune.runtime.language import GenerationRequest, answer

    for name, got, least in (("max_tokens", max_tokens, 1), ("threads", threads, 1), ("seed", seed, 0)):
        if got is not None and got < least:
            raise EdgetuneError(f"{name} is at least {least}", got=got)
    if not 0.0 <= temperature < float("inf"):
        raise EdgetuneError(
            "temperature must not be negative",
            got=temperature,
            action="use 0 for greedy decoding, or 1 for the distribution of the model",
        )
    artifact = Artifact.load(path, "language")
    artifact.check_runtime()
    language, tokenizer = artifact.language, ChatTokenizer(artifact)
    tokens = tokenizer.tokens(prompt, raw=raw)
    if len(tokens) > language.max_tokens:
        raise EdgetuneError(
            "the prompt has more tokens than fit into the cache of the program",
            where=str(artifact.path),
            got=len(tokens),
            allowed=[f"at most {language.max_tokens}"],
            action="shorten the prompt, or export the model with a larger max_tokens",
        )
    stream = tokenizer.stream()

    def emit(token: int) -> None:
        text = stream.add(token)
        if text:
            on_text(text)

    with artifact.data_for(adapter) as data:
        request = GenerationRequest(
            path=str(artifact.path.resolve()),
            prompt=tuple(tokens),
            cache_tokens=language.max_tokens,
            prefill_tokens=language.prefill_tokens,
            eos_ids=language.eos_ids,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            threads=threads,
            data=None if data is None else str(data.resolve()),
        )
        reply = answer(request, emit, artifact.with_adapter((), adapter))
    return Generation(
        text=tokenizer.text(reply.tokens),
        tokens=reply.tokens,
        prompt_tokens=len(tokens),
        stopped=reply.stopped,
        prefill_tokens_per_s=1e3 * len(tokens) / reply.prefill_ms,
        decode_tokens_per_s=1e3 * reply.decode_calls / reply.decode_ms if reply.decode_calls else None,
        load_ms=reply.load_ms,
        peak_memory_mib=reply.peak_memory_mib,
        threads=reply.threads,
    )
