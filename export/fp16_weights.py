"""Store the weights of convolutions in fp16 where they are computed in fp16.

executorch 1.5.1 writes them in fp32, although their values are fp16: the program is as large as in fp32. XNNPACK
packs either form alike. Transposed convolutions take weights in fp32 alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def fp16_weights() -> Iterator[None]:
    """Inside, executorch writes the weights and biases of fp16 convolutions as they are."""
    from executorch.backends.xnnpack.operators.node_visitor import NodeVisitor

    stock = NodeVisitor.define_tensor

    def define_tensor(self: Any, tensor: Any, *args: Any, force_fp32: bool = False, **settings: Any) -> None:
        stock(self, tensor, *args, force_fp32=force_fp32 and not _keeps_fp16(tensor), **settings)

    NodeVisitor.define_tensor = define_tensor
    try:
        yield
    finally:
        NodeVisitor.define_tensor = stock


def _keeps_fp16(weight: Any) -> bool:
    """Whether only convolutions that are not transposed read it, in fp16."""
    value = weight.meta.get("val")
    return (
        isinstance(value, Tensor)
        and value.dtype == torch.float16
        and all("aten.convolution.default" in str(user.target) and not user.args[6] for user in weight.users)
    )
