"""Generate an answer with the program in this folder.

python generate.py "a question"

It reads model.json, its tokenizer and chat.json, which has the text that the chat format puts around a message.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("MKL_NUM_THREADS", "1")  # the runtime has threads of its own, and each of them calls MKL

import torch


class Generator:
    """A text-generation program and its tokenizer."""

    def __init__(self, path: Path) -> None:
        """Load the .pte at `path` with its .json and the files that it names."""
        import executorch.kernels.quantized  # noqa: F401  registers the kernels of quantized embeddings
        from executorch.runtime import Runtime
        from tokenizers import Tokenizer

        manifest = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        check_runtime(manifest)
        self.language: dict[str, Any] = manifest["language"]
        self.chat: dict[str, str] = json.loads((path.parent / "chat.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(path.parent / self.language["tokenizer"]["file"]))
        runtime = Runtime.get()
        _load_kernels()
        self.program = runtime.load_program(path)  # must outlive its methods
        self.method = self.program.load_method("forward")

    def answer(self, message: str, most: int = 256) -> Iterator[str]:
        """The most likely answer to one message, piece by piece."""
        from tokenizers.decoders import DecodeStream

        has_format = self.chat["before"] or self.chat["after"]
        text = self.chat["before"] + message + self.chat["after"]
        prompt = self.tokenizer.encode(text, add_special_tokens=not has_format).ids
        if not 0 < len(prompt) <= self.language["max_tokens"]:
            raise ValueError(f"the message has {len(prompt)} tokens; from 1 to {self.language['max_tokens']} fit")
        stream = DecodeStream(skip_special_tokens=True)
        token = self._prefill(prompt)
        for position in range(len(prompt), len(prompt) + most):
            if token in self.language["eos_ids"]:
                return
            yield (
                stream.step(self.tokenizer, token) or ""
            )  # a character of several tokens is complete with the last one
            if position >= self.language["max_tokens"]:  # the cache is full
                return
            token = self._step([token], position)

    def _prefill(self, prompt: list[int]) -> int:
        token, piece = 0, self.language["prefill_tokens"]
        for start in range(0, len(prompt), piece):
            token = self._step(prompt[start : start + piece], start)
        return token

    def _step(self, tokens: list[int], position: int) -> int:
        """Put the tokens into the cache at `position`; returns the most likely next token."""
        (logits,) = self.method.execute([torch.tensor([tokens]), torch.tensor([position])])
        return int(logits[0, -1].argmax())


def check_runtime(manifest: dict[str, Any]) -> None:
    """Exit unless the installed executorch is of the version that the program was made for."""
    made, installed = manifest["versions"]["executorch"], version("executorch")
    if made.split(".")[:2] != installed.split(".")[:2]:
        raise SystemExit(
            f"model.pte was made for executorch {made}; installed: {installed}\n  next: pip install -r requirements.txt"
        )


def _load_kernels() -> None:
    """Load the library with the attention and cache kernels."""
    package = importlib.util.find_spec("executorch.extension.llm.custom_ops")
    folders = list(package.submodule_search_locations or []) if package is not None else []
    (library,) = (file for folder in folders for file in Path(folder).glob("*custom_ops_aot_lib.*"))
    torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]


def main(words: list[str]) -> int:
    """Print the answer; returns the exit code."""
    if not words:
        print(__doc__)
        return 2
    generator = Generator(Path(__file__).resolve().parent / "model.pte")
    for piece in generator.answer(" ".join(words)):
        print(piece, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
