"""Answers of the language model beside this file, as they come.

python talk.py "a question"

It goes by model.json, its tokenizer and chat.json, which holds what the model's chat format puts around a message.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class Talker:
    """A program with its cache, and its tokenizer."""

    def __init__(self, path: Path) -> None:
        """Load the .pte at `path`, with its .json and the files that names beside it."""
        import executorch.kernels.quantized  # noqa: F401  makes the kernels of quantized embeddings known
        from executorch.runtime import Runtime
        from tokenizers import Tokenizer

        manifest = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        self.language: dict[str, Any] = manifest["language"]
        self.chat: dict[str, str] = json.loads((path.parent / "chat.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(path.parent / self.language["tokenizer"]["file"]))
        runtime = Runtime.get()
        _load_kernels()
        self.program = runtime.load_program(path)  # it must live as long as its methods
        self.method = self.program.load_method("forward")

    def answer(self, message: str, most: int = 256) -> Iterator[str]:
        """The likeliest answer to one message, piece by piece."""
        from tokenizers.decoders import DecodeStream

        around = self.chat["before"] or self.chat["after"]
        text = self.chat["before"] + message + self.chat["after"]
        prompt = self.tokenizer.encode(text, add_special_tokens=not around).ids
        if not 0 < len(prompt) <= self.language["max_tokens"]:
            raise ValueError(f"the message has {len(prompt)} tokens; from 1 to {self.language['max_tokens']} fit")
        stream = DecodeStream(skip_special_tokens=True)
        token = self._prefill(prompt)
        for place in range(len(prompt), len(prompt) + most):
            if token in self.language["eos_ids"]:
                return
            yield stream.step(self.tokenizer, token) or ""  # a character of several tokens comes with the last
            if place >= self.language["max_tokens"]:  # the cache is full
                return
            token = self._step([token], place)

    def _prefill(self, prompt: list[int]) -> int:
        token, piece = 0, self.language["prefill_tokens"]
        for start in range(0, len(prompt), piece):
            token = self._step(prompt[start : start + piece], start)
        return token

    def _step(self, tokens: list[int], place: int) -> int:
        """Put the tokens into the cache at `place`; the likeliest after them."""
        (logits,) = self.method.execute([torch.tensor([tokens]), torch.tensor([place])])
        return int(logits[0, -1].argmax())


def _load_kernels() -> None:
    """Attention and cache: they lie in a library of their own."""
    package = importlib.util.find_spec("executorch.extension.llm.custom_ops")
    folders = list(package.submodule_search_locations or []) if package is not None else []
    (library,) = (file for folder in folders for file in Path(folder).glob("*custom_ops_aot_lib.*"))
    torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]


def main(words: list[str]) -> int:
    """Print the answer; the exit code."""
    if not words:
        print(__doc__)
        return 2
    talker = Talker(Path(__file__).resolve().parent / "model.pte")
    for piece in talker.answer(" ".join(words)):
        print(piece, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
