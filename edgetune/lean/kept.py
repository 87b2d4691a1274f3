"""How many bytes autograd keeps for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from edgetune.core.inputs import Inputs, call
from edgetune.core.modes import preserve_state


def kept_bytes(model: nn.Module, inputs: Inputs, loss_fn: Callable[[Any], Tensor]) -> int:
    """Bytes that one forward in training mode and its loss keep for backward, each storage once.

    Parameters and buffers are not counted: they are there anyway. `loss_fn` gets what the model returns.
    The model is left as it was: modes, buffers and the random state are put back, and no gradient is computed.
    """
    kept: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor.detach()  # an operator that keeps its own output would hold itself for ever

    hooks = saved_tensors_hooks(note, lambda tensor: tensor)
    with preserve_state(model, training=True), torch.enable_grad(), hooks:
        loss_fn(call(model, inputs))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)
