"""How many bytes autograd saves for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from edgetune.core.inputs import Inputs, call
from edgetune.core.modes import preserve_state


def saved_bytes(model: nn.Module, inputs: Inputs, loss_fn: Callable[[Any], Tensor]) -> int:
    """Bytes that one forward in training mode and its loss save for backward, each storage once.

    Parameters and buffers are not counted. `loss_fn` gets what the model returns. The model is left as it was: modes,
    buffers and the random state are restored, and no gradient is computed.
    """
    storages: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice

    def record(tensor: Tensor) -> Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage
        return tensor.detach()  # an operator that saves its own output would keep itself alive

    hooks = saved_tensors_hooks(record, lambda tensor: tensor)
    with preserve_state(model, training=True), torch.enable_grad(), hooks:
        loss_fn(call(model, inputs))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)
