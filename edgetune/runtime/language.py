"""Run a text-generation program in a child process, and receive its tokens as they come.

`python -m edgetune.runtime.language FOLDER` is the child's side. It follows the protocol of `edgetune.runtime.run`,
and writes each generated token to stdout, one a line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from edgetune.runtime.clock.machine import resident_mib
from edgetune.runtime.clock.runs import load_language_operators, load_runtime, read_inputs, serve
from edgetune.runtime.run import ask_child

_MODULE = "edgetune.runtime.language"


class Answer(BaseModel):
    """One answer of a program, timed. Memory is resident memory of the whole child process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[int, ...]
    stopped: Literal["end", "length", "cache"]  # by an end token; at max_tokens; because the cache is full
    threads: int
    load_ms: float
    prefill_ms: float  # of the prompt, up to the first token
    decode_ms: float  # of all calls with one token
    decode_calls: int
    peak_memory_mib: float
    empty_memory_mib: float  # after the imports, before the program is loaded


class GenerationRequest(BaseModel):
    """The prompt, the program and the settings that the child gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    prompt: tuple[int, ...]
    cache_tokens: int
    prefill_tokens: int
    eos_ids: tuple[int, ...]
    max_tokens: int  # of the answer
    temperature: float = 0.0  # 0: greedy
    seed: int = 0
    threads: int | None = None
    data: str | None = None  # the `.ptd` with the weights


def answer(
    generation: GenerationRequest,
    on_token: Callable[[int], None] = lambda token: None,
    given: tuple[Tensor, ...] = (),
) -> Answer:
    """Generate in a child process; `on_token` gets each token as it is generated.

    `given` are the inputs of the program after tokens and position: an adapter.
    Raises `EdgetuneError` (exit code 5) if the program does not load or run, or the child dies.
    """
    request = {"verb": "generate", "generation": generation.model_dump(mode="json")}
    result, _ = ask_child(
        _MODULE, Path(generation.path), request, [given], fresh=True, on_line=lambda line: on_token(int(line))
    )
    return Answer.model_validate(result)


def greedy_in_child(
    path: Path,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    prefill_tokens: int,
    *,
    given: tuple[Tensor, ...] = (),
    data: Path | None = None,
) -> list[tuple[list[int], Tensor]]:
    """For each prompt the program's first `tokens` greedy tokens, past any end token, and the logits of each.

    The logits are `(tokens, vocabulary)`. `given` and `data`: an adapter as inputs, and the data file. Raises as
    `answer` does.
    """
    request = {
        "verb": "greedy",
        "tokens": tokens,
        "prefill_tokens": prefill_tokens,
        "data": None if data is None else str(data.resolve()),
    }
    rows = [(torch.tensor([list(prompt)]), *given) for prompt in prompts]
    result, outputs = ask_child(_MODULE, path, request, rows)
    return [([int(token) for token in row], outputs[str(place)]) for place, row in enumerate(result["tokens"])]


class LanguageProgram:
    """A text-generation `.pte` loaded by the runtime in this process."""

    def __init__(
        self,
        path: str,
        prefill_tokens: int,
        threads: int | None = None,
        *,
        data: str | None = None,
        given: Sequence[Tensor] = (),
    ) -> None:
        """`given` are the inputs of every call after tokens and position: an adapter."""
        runtime = load_runtime(threads)
        load_language_operators()
        self.threads = int(runtime._threadpool_get_thread_count())
        self.prefill_tokens = prefill_tokens
        self.given = tuple(given)
        self._method = runtime._load_program(path, data_path=data).load_method("forward")

    def prefill(self, prompt: Sequence[int]) -> Tensor:
        """Fill the cache with the prompt. Returns the logits `(vocabulary,)` after it."""
        logits = torch.empty(0)
        for start in range(0, len(prompt), self.prefill_tokens):
            logits = self.step(prompt[start : start + self.prefill_tokens], start)
        return logits

    def step(self, tokens: Sequence[int], position: int) -> Tensor:
        """The logits after `tokens`, which are cached from `position`. Overwritten by the next step."""
        inputs = (torch.tensor([list(tokens)]), torch.tensor([position]), *self.given)
        (logits,) = self._method.call(inputs, clone_outputs=False)
        last: Tensor = logits[0, -1]
        return last


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the logits are not finite")
    if temperature == 0.0:
        return int(logits.argmax())
    likely = torch.softmax(logits.float() / temperature, -1)
    return int(torch.multinomial(likely, 1, generator=generator))


def _generate(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    generation = GenerationRequest.model_validate(request["generation"])
    (given,) = read_inputs(folder, request["rows"])
    generator = torch.Generator().manual_seed(generation.seed)
    load_runtime(generation.threads)
    empty_mib = resident_mib("VmRSS")
    started = time.perf_counter()
    program = LanguageProgram(
        generation.path, generation.prefill_tokens, generation.threads, data=generation.data, given=given
    )
    loaded = time.perf_counter()
    logits = program.prefill(generation.prompt)
    token = _choose(logits, generation.temperature, generator)
    prefilled = time.perf_counter()
    decode = 0.0
    tokens: list[int] = []
    position, stopped = len(generation.prompt), "length"
    while True:
        tokens.append(token)
        print(token, flush=True)
        if token in generation.eos_ids:
            stopped = "end"
            break
        if len(tokens) >= generation.max_tokens:
            break
        if position >= generation.cache_tokens:
            stopped = "cache"
            break
        begun = time.perf_counter()
        token = _choose(program.step([token], position), generation.temperature, generator)
        decode += time.perf_counter() - begun
        position += 1
    return {
        "tokens": tokens,
        "stopped": stopped,
        "threads": program.threads,
        "load_ms": (loaded - started) * 1e3,
        "prefill_ms": (prefilled - loaded) * 1e3,
        "decode_ms": decode * 1e3,
        "decode_calls": len(tokens) - 1,
        "peak_memory_mib": resident_mib("VmHWM"),
        "empty_memory_mib": empty_mib,
    }


def _greedy(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import save_file

    rows = read_inputs(folder, request["rows"])
    given = rows[0][1:]  # the same in each
    program = LanguageProgram(request["path"], request["prefill_tokens"], data=request["data"], given=given)
    tokens: list[list[int]] = []
    saved: dict[str, Tensor] = {}
    for prompt, *_ in rows:
        logits = [program.prefill(prompt[0].tolist()).clone()]
        for position in range(prompt.shape[1], prompt.shape[1] + request["tokens"] - 1):
            logits.append(program.step([int(logits[-1].argmax())], position).clone())
        saved[str(len(tokens))] = torch.stack(logits)
        tokens.append([int(row.argmax()) for row in logits])
    save_file(saved, folder / "outputs.safetensors")
    return {"tokens": tokens}


def _answer(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)  # the runtime has threads of its own
    return _greedy(folder, request) if request["verb"] == "greedy" else _generate(folder, request)


def main(folder: Path) -> int:
    """Answer the request in the folder."""
    return serve(folder, _answer)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
