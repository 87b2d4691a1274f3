"""Manifests of every kind of program, with as little in them as there may be."""

from __future__ import annotations

from pathlib import Path

from edgetune.program.artifact import Artifact, write_pair
from edgetune.program.carried import Carried
from edgetune.program.manifest import (
    Call,
    LanguageSpec,
    Manifest,
    ProgramKind,
    TensorSpec,
    TokenizerSpec,
    TrainingParity,
    TrainingSpec,
    UpdateRule,
)
from edgetune.program.program_files import sha256_of

CALLS: dict[ProgramKind, tuple[str, ...]] = {
    "model": ("forward",),
    "language": ("token", "prompt"),
    "training": ("forward", "train"),
    "methods": ("encode", "decode"),
}
PROGRAM, TOKENIZER = b"a program", b"{}"


def call(name: str) -> Call:
    spec = TensorSpec(name="x", shape=(1, 2), dtype="float32")
    return Call(
        name=name, inputs=(spec,), outputs=(spec,), plan_bytes=0, delegates=0, delegated_macs_pct=0.0,
        delegated_operators_pct=0.0, undelegated=(), operators=(),
    )  # fmt: skip


def manifest(kind: ProgramKind, carried: Carried | None = None) -> Manifest:
    tokenizer = TokenizerSpec(
        file="model.tokenizer.json", sha256=sha256_of(TOKENIZER), chat_template=None, special_tokens={}
    )
    language = LanguageSpec(
        architecture="llama", max_tokens=64, prefill_tokens=32, vocabulary=9, bos_id=None, eos_ids=(), shared_bytes=0,
        cache_bytes=0, tokenizer=tokenizer,
    )  # fmt: skip
    parity = TrainingParity(steps=1, learning_rate=0.1, max_abs_loss_difference=0.0, losses=(1.0,))
    training = TrainingSpec(optimizer=UpdateRule(), trainable=(), slices=(), state_bytes=0, parity=parity)
    return Manifest(
        kind=kind, target="xnnpack", size_bytes=len(PROGRAM), sha256=sha256_of(PROGRAM), versions={}, carried=carried,
        language=language if kind == "language" else None, training=training if kind == "training" else None,
        calls=tuple(map(call, CALLS[kind])),
    )  # fmt: skip


def stored(folder: Path, kind: ProgramKind, carried: Carried | None = None) -> Artifact:
    """Such a program on disk, with what lies beside it; no runtime loads it."""
    path = folder / "model.pte"
    if kind == "language":
        (folder / "model.tokenizer.json").write_bytes(TOKENIZER)
    return Artifact(path, write_pair(path, PROGRAM, lambda partial: manifest(kind, carried)))
