"""The key of a cached prefix: the frozen stages, how they are computed, and their rows."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from edgetune.core.inputs import device_of, tensors_of
from edgetune.train.plan import TrainingRows
from edgetune.train.prefix.rows import Form, bytes_of, digest_of
from edgetune.train.prefix.stages import Prefix

_FORMAT = 1
_SAMPLED_ROWS = 16


def describe_cache(
    model: nn.Module, split: TrainingRows, prefix: Prefix, dtype: str, chunk_rows: int, autocast: str
) -> dict[str, Any]:
    """Everything that must be the same for a cached row to have the same bits if computed again.

    Only a few rows' inputs are read here; each cached row has a digest of its own inputs.
    """
    lengths = split.lengths
    return {
        "format": _FORMAT,
        "dtype": dtype,
        "stages": prefix.stages,
        "calls": [repr(tree_map(_describe_form, made.template)) for made in prefix.calls],
        "weights": _digest_weights(model, prefix),
        "layers": _hash("\n".join(str(model.get_submodule(name)) for name in prefix.stages)),
        "config": _hash(str(getattr(model, "config", ""))),
        "rows": len(split),
        "lengths": None if lengths is None else _hash(repr(list(lengths))),
        "sample": _digest_sample(split),
        "chunk_rows": chunk_rows,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "device": device_of(model).type,
        "autocast": autocast,
    }


def _describe_form(value: Any) -> Any:
    return f"{value.sizes} {value.dtype}" if isinstance(value, Form) else value


def _digest_weights(model: nn.Module, prefix: Prefix) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for stage in prefix.stages:
        module = model.get_submodule(stage)
        # the scales of 4-bit weights are in the state dict alone, and buffers that are not saved are not in it
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers()), **module.state_dict()}
        for name, value in sorted(tensors.items()):
            if isinstance(value, Tensor):
                digest.update(f"{stage}.{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(bytes_of(value.detach().cpu()))
    return digest.hexdigest()


def _digest_sample(split: TrainingRows) -> str:
    count = len(split)
    rows = dict.fromkeys((count - 1) * n // (_SAMPLED_ROWS - 1) for n in range(_SAMPLED_ROWS))
    digests = [digest_of(tensors_of(split.batch([row])[0])) for row in rows]
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
