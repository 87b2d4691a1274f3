"""A language program on disk: `model.pte`, `model.json` that says everything known about it, and its tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgetune.core.ledger import Leftover, Parity, Program
from edgetune.program.artifact import (
    Artifact,
    Manifest,
    TensorSpec,
    Value,
    check_bytes,
    manifest_path,
    program_at,
    read_manifest,
    unusable,
)
from edgetune.program.beside import artifact_line
from edgetune.program.carried import Carried
from edgetune.program.operators import Operator


class TokenizerSpec(Value):
    """The tokenizer beside the program, and how a prompt becomes a chat."""

    file: str  # in the program's folder: tokenizer.json as Hugging Face's tokenizers write it
    sha256: str
    chat_template: str | None  # Jinja; None: the model takes plain text
    special_tokens: dict[str, str]  # what the template may name: bos_token, eos_token


class LanguageParity(Value):
    """The program's greedy tokens beside the eager model's.

    The eager model reads the prompt and the program's tokens at once and gives its own choice at each place. Where
    all are the same, its greedy text is the program's; up to the first difference it is in any case.
    """

    prompt_tokens: int
    tokens: int
    same_tokens: int
    first_difference: int | None  # place of the first token, from 0, that the eager model would not have chosen
    margin_at_difference: float | None  # of the eager logits there: its choice over the program's
    max_abs_difference: float  # of all logits
    max_relative_difference: float | None = None  # over the largest logit
    max_relative_allowed: float | None = None

    @property
    def same_prediction_pct(self) -> float:
        """Share of the tokens that are the same."""
        return 100.0 * self.same_tokens / self.tokens

    def summary(self) -> Parity:
        """The same as the ledger keeps it: places of greedy tokens take the place of rows."""
        return Parity(
            rows=self.tokens,
            same_prediction_pct=self.same_prediction_pct,
            max_abs_difference=self.max_abs_difference,
            counted="greedy token",
        )


class LanguageManifest(Value):
    """What `model.json` holds for a language program.

    The program's one method `forward` takes `tokens` (1, n), n from 1 to `prefill_tokens`, and `position` (1,), the
    place of the first of them in the cache, and gives the logits (1, 1, vocabulary) after the last. A `position` other
    than 0 begins at a multiple of 32 or comes with one token: the attention kernel hides later tokens wrongly else.
    """

    format: Literal[1] = 1
    kind: Literal["language"] = "language"
    target: str
    device: str | None
    architecture: str  # transformers' name of the model: "llama"
    inputs: tuple[TensorSpec, ...]  # as large as they may be
    outputs: tuple[TensorSpec, ...]
    max_tokens: int  # places in the cache: prompt and answer together
    prefill_tokens: int  # most tokens of one call
    vocabulary: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    tokenizer: TokenizerSpec
    size_bytes: int  # of the .pte
    shared_bytes: int  # stored once although two operators read them: a head and an embedding that are tied
    plan_bytes: int  # arena, the cache included
    cache_bytes: int
    sha256: str
    versions: dict[str, str]
    delegates: int  # calls into the backend
    delegated_macs_pct: float
    delegated_operators_pct: float
    leftovers: tuple[Leftover, ...]
    operators: tuple[Operator, ...]  # of a call with `prefill_tokens` tokens, the first of a prompt
    decode_operators: tuple[Operator, ...]  # of a call with the token after them
    executed: tuple[Operator, ...] = ()  # the same two as the runtime executes them
    decode_executed: tuple[Operator, ...] = ()
    parity: LanguageParity | None = None  # None: this machine cannot run the target; `note` says so
    carried: Carried | None = None  # what an app needs beside the program; the tokenizer stands above
    note: str = ""

    def plain(self) -> Manifest:
        """What it has in common with the manifest of any program, for what reads those."""
        shared = (set(Manifest.model_fields) & set(LanguageManifest.model_fields)) - {"kind", "parity"}
        parity = self.parity.summary() if self.parity is not None else None
        return Manifest(**{name: getattr(self, name) for name in shared}, parity=parity)


@dataclass(frozen=True)
class LanguageArtifact:
    """A language `.pte`, its manifest and its tokenizer."""

    path: Path
    manifest: LanguageManifest

    def __repr__(self) -> str:
        return artifact_line(
            self, self.path, self.manifest.size_bytes, self.manifest.target, f"{self.manifest.max_tokens} tokens"
        )

    @property
    def tokenizer_path(self) -> Path:
        """`model.tokenizer.json` for `model.pte`."""
        return self.path.with_name(self.manifest.tokenizer.file)

    def program(self) -> Program:
        """The ledger's summary."""
        return Artifact(self.path, self.manifest.plain()).program()

    @classmethod
    def load(cls, path: str | Path) -> LanguageArtifact:
        """Read the manifest of the `.pte` at `path`, and check that it describes that file and the tokenizer."""
        found = cls(path=Path(path), manifest=read_manifest(Path(path), LanguageManifest))
        if not found.tokenizer_path.is_file():
            raise unusable("no such file", found.tokenizer_path)
        check_bytes(found.tokenizer_path, found.manifest.tokenizer.sha256)
        return found


def load_any(path: str | Path) -> Artifact | LanguageArtifact:
    """The program at `path`, or in that run's folder, with its manifest, of whichever of the two kinds it is."""
    path = program_at(Path(path))
    try:
        kind = json.loads(manifest_path(path).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = ""  # what is wrong is said by the reader of a plain one
    return LanguageArtifact.load(path) if kind == "language" else Artifact.load(path)
