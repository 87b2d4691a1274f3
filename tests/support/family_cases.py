"""Settings of peft's families that fit tiny layers, and a case for the laws from each."""

from __future__ import annotations

from typing import Any

from edgetune.adapt.families import FamilyAdapter
from edgetune.core.registry import PEFT_FAMILIES, technique_class
from support.laws import BLOCKS, NOTHING, Case, llama, mlp, tokens, vectors

SMALL: dict[str, dict[str, Any]] = {
    "adamss": {"rank": 8, "num_subspaces": 2},
    "c3a": {"block_size": 16},
    "deft": {"rank": 2},
    "delora": {"rank": 2},
    "fourierft": {"n_frequency": 32},
    "gralora": {"rank": 4},
    "hira": {"rank": 2},
    "hra": {"rank": 2},
    "ia3": {"feedforward": ["*.down"]},
    "lily": {"rank": 2},
    "loha": {"rank": 2},
    "lokr": {"rank": 2},
    "miss": {"rank": 4},
    "oft": {"oft_block_size": 8},
    "osf": {"effective_rank": 4},
    "peanut": {"rank": 2},
    "peft-glora": {"rank": 2},
    "psoft": {"rank": 4},
    "pvera": {"rank": 8},
    "randlora": {"rank": 4},
    "road": {"group_size": 16},
    "shira": {"rank": 2},
    "supertuning": {"sparsity": 0.9},
    "trainable_tokens": {"token_indices": [5, 30]},
    "vblora": {"num_vectors": 16, "vector_length": 16},
    "vera": {"rank": 8},
    "waveft": {"n_frequency": 32},
}
BLOCK = ("blocks.1.up", "blocks.1.down")
TARGETS = {"ln_tuning": ("blocks.1.norm",), "lily": BLOCKS, "trainable_tokens": ("*.embed_tokens",)}
BASES: dict[str, tuple[Any, Any]] = {"trainable_tokens": (llama, tokens)}  # the others are tried on `mlp`
EXPORTED = ("ia3", "ln_tuning", "vera")  # all are plain once they are merged: these stand for the rest


def small(name: str, targets: tuple[str, ...] = (), **more: Any) -> FamilyAdapter:
    """The technique with settings for tiny layers, on one block of `mlp` unless `targets` says else."""
    targets = targets or TARGETS.get(name, BLOCK)
    return technique_class(name)(targets=targets, **{**SMALL.get(name, {}), **more})  # type: ignore[return-value]


FAMILY_CASES = [
    Case(
        f"{name}-{base.__name__}", (small(name),), base, inputs, error=20.0, pickles=name != "osf",
        unmatched=small(name, NOTHING), tolerance=5e-5 if name == "randlora" else 2e-5, exports=name in EXPORTED,
    )
    for name in PEFT_FAMILIES
    for base, inputs in [BASES.get(name, (mlp, vectors))]
    if technique_class(name).merges  # type: ignore[attr-defined]
]  # fmt: skip
