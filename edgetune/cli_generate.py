"""`edgetune generate`: an exported language model answers a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetune.cli_devices import Json, printed

if TYPE_CHECKING:
    from edgetune.generating import Generation


def generate(
    program: Annotated[Path, typer.Argument(help="A language model's .pte, with model.json and tokenizer beside it.")],
    prompt: Annotated[str, typer.Argument(help="What to say to it; - reads it from stdin.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws, with a temperature.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the runtime; default: its own choice.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    as_json: Json = False,
) -> int:
    """Let an exported language model answer a prompt.

    The text goes to stdout as it comes, what it cost to stderr.
    """
    from dataclasses import asdict

    from edgetune.generating import generate as generate_

    def heard(text: str) -> None:
        if not as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    found = generate_(
        program,
        sys.stdin.read().rstrip("\n") if prompt == "-" else prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        threads=threads,
        raw=raw,
        heard=heard,
    )
    printed(asdict(found) if as_json else "")  # ends the line
    print(f"edgetune: {summary(found)}", file=sys.stderr)
    if found.stopped == "cache":
        what = "edgetune: the answer stops here: the cache is full\n  next: export with a larger max_tokens"
        print(what, file=sys.stderr)
    return 0


def summary(found: Generation) -> str:
    """One line about the cost of an answer."""
    decode = f"{found.decode_tokens_per_s:.1f} tokens/s" if found.decode_tokens_per_s is not None else "none"
    return (
        f"prefill {found.prompt_tokens} tokens, {found.prefill_tokens_per_s:.1f} tokens/s; "
        f"decode {len(found.tokens)} tokens, {decode}; "
        f"peak memory {found.peak_memory_mib:.0f} MiB; {found.threads} threads"
    )
