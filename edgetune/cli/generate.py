"""`edgetune generate`: generate text with an exported language model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetune.cli.devices import Json, print_result
from edgetune.cli.predict import AdapterName

if TYPE_CHECKING:
    from edgetune.runtime.generating import Generation


def generate(
    program: Annotated[Path, typer.Argument(help="The .pte of a language model; needs its model.json and tokenizer.")],
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of the answer, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0: always the most likely token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the runtime; default: chosen by the runtime.")
    ] = None,
    adapter: AdapterName = None,
    raw: Annotated[bool, typer.Option("--raw", help="Pass the prompt unchanged, without the chat template.")] = False,
    as_json: Json = False,
) -> int:
    """Generate text with an exported language model.

    The text is printed to stdout while it is generated, the speed to stderr.
    """
    from dataclasses import asdict

    from edgetune.runtime.generating import generate as generate_

    def on_text(text: str) -> None:
        if not as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    answer = generate_(
        program,
        sys.stdin.read().rstrip("\n") if prompt == "-" else prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        threads=threads,
        raw=raw,
        adapter=adapter,
        on_text=on_text,
    )
    print_result(asdict(answer) if as_json else "")  # ends the line
    print(f"edgetune: {summary(answer)}", file=sys.stderr)
    if answer.stopped == "cache":
        message = "edgetune: the answer ends here because the cache is full\n  next: export with a larger max_tokens"
        print(message, file=sys.stderr)
    return 0


def summary(answer: Generation) -> str:
    """One line about the cost of an answer."""
    decode = f"{answer.decode_tokens_per_s:.1f} tokens/s" if answer.decode_tokens_per_s is not None else "none"
    return (
        f"prefill {answer.prompt_tokens} tokens, {answer.prefill_tokens_per_s:.1f} tokens/s; "
        f"decode {len(answer.tokens)} tokens, {decode}; "
        f"peak memory {answer.peak_memory_mib:.0f} MiB; {answer.threads} threads"
    )
