"""Find the embeddings that only look up rows of their weight: only those still run when it is quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def looks_up(table: nn.Embedding) -> bool:
    """Whether a call of the table reads its weight by `F.embedding` and in no other way.

    Subclasses differ: Bart's and Gemma's word embeddings scale the rows that they look up, Whisper's positions are
    slices of the weight. A subclass is called once, with one token, and watched. If it does not take a tensor of
    tokens, it counts as reading in another way.
    """
    if type(table).forward is nn.Embedding.forward:
        return True
    tokens = torch.zeros(1, 1, dtype=torch.long, device=table.weight.device)
    try:
        with torch.no_grad(), _LookupRecorder(table.weight) as watch:
            table.forward(tokens)
    except Exception:  # whatever its forward raises
        return False
    return watch.looked_up and not watch.read_otherwise


class _LookupRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operators that read one weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weight = weight
        self.looked_up = self.read_otherwise = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(leaf is self.weight for leaf in tree_leaves((args, kwargs))):
            look_up = func is torch.ops.aten.embedding.default
            self.looked_up |= look_up
            self.read_otherwise |= not look_up
        return func(*args, **(kwargs or {}))
