"""The tokenizer of a text-generation program: text to tokens and back, by the file next to the program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.registry import require
from edgetune.program.artifact import Artifact
from edgetune.program.manifest import TokenizerSpec


class ChatTokenizer:
    """The tokenizer of a text-generation program."""

    def __init__(self, artifact: Artifact) -> None:
        tokenizers = require("tokenizers", "language models")
        self._spec = artifact.language.tokenizer
        self._tokenizer = tokenizers.Tokenizer.from_file(str(artifact.path.with_name(self._spec.file)))

    def tokens(self, prompt: str, *, raw: bool = False) -> list[int]:
        """The prompt as a user's message in the chat template, or unchanged if `raw` or if there is no template."""
        return encode(self._tokenizer, self._spec, prompt, raw=raw)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer."""
        decoded: str = self._tokenizer.decode(list(tokens))
        return decoded

    def stream(self) -> _Stream:
        """Decode token by token."""
        return _Stream(self._tokenizer)


class _Stream:
    """Returns the text that each token adds; a character of several tokens is returned with the last of them."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """The text that the token adds."""
        text: str | None = self._stream.step(self._tokenizer, token)
        return text or ""


def encode(tokenizer: Any, spec: TokenizerSpec, prompt: str, *, raw: bool) -> list[int]:
    """Tokens of a prompt. A chat template writes its special tokens itself; plain text gets the tokenizer's own."""
    chat = spec.chat_template is not None and not raw
    text = chat_text(spec, prompt) if chat else prompt
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not chat).ids
    if not ids:
        raise EdgetuneError("the prompt has no tokens", got=prompt, action="write a prompt")
    return ids


def chat_text(spec: TokenizerSpec, prompt: str) -> str:
    """The prompt as one turn of a chat, as the model's template writes it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    message = [{"role": "user", "content": prompt}]
    rendered = render_jinja_template(
        [message], chat_template=spec.chat_template, add_generation_prompt=True, **spec.special_tokens
    )
    return str((rendered[0] if isinstance(rendered, tuple) else rendered)[0])


def backend(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` in what the user gave: one itself, or a fast tokenizer of transformers."""
    tokenizers = require("tokenizers", "language models")
    backend_tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend_tokenizer, tokenizers.Tokenizer):
        raise EdgetuneError(
            "the program needs a tokenizer.json, which this tokenizer does not have",
            got=type(tokenizer).__name__,
            action="load it with AutoTokenizer, which returns a fast tokenizer if there is one",
            exit_code=Exit.EXPORT,
        )
    return backend_tokenizer


def without_truncation(tokenizer: Any) -> Any:
    """A copy of the tokenizer, without the user's settings for truncation and padding."""
    original = backend(tokenizer)
    plain = type(original).from_str(original.to_str())
    plain.no_truncation()
    plain.no_padding()
    return plain


def tokenizer_spec(tokenizer: Any, file: Path, sha256: str) -> TokenizerSpec:
    """The manifest's section on the user's tokenizer, which is stored in `file`."""
    template = getattr(tokenizer, "chat_template", None)
    named = {name: getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return TokenizerSpec(
        file=file.name,
        sha256=sha256,
        chat_template=template.get("default") if isinstance(template, dict) else template,
        special_tokens={name: str(token) for name, token in named.items() if token is not None},
    )
