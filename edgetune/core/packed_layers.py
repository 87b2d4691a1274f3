"""The 4-bit linears of bitsandbytes, however they got into the model."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edgetune.core.carriers import Carrier
from edgetune.core.errors import EdgetuneError


def is_nf4(layer: nn.Module) -> bool:
    """Whether it is a 4-bit linear of bitsandbytes (and not peft's layer of the same name)."""
    return any(c.__name__ == "Linear4bit" and c.__module__.startswith("bitsandbytes") for c in type(layer).__mro__)


def nf4_weight(layer: Any) -> Tensor:
    """The unpacked weight `(out, in)` of a 4-bit linear, in its original type."""
    from bitsandbytes import functional

    data, state = layer.weight.data, getattr(layer.weight, "quant_state", None)
    if state is None:
        raise EdgetuneError("this NF4 layer was never packed and has no weight", action="apply NF4 first")
    if getattr(state, "packing_format_for_cpu", False):  # another loader's layer, rearranged by a forward in eval mode
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.deepcopy(state))
    unpacked: Tensor = functional.dequantize_4bit(data, state)
    return unpacked.to(getattr(layer, "plain_dtype", torch.float32))


class OriginalWeight:
    """The weight that a layer had before it was packed, in a file of the temporary folder, read as it is needed.

    The file has no name any more, so it ends with this object. Copies of the layer share it.
    """

    def __init__(self, weight: Tensor) -> None:
        with tempfile.NamedTemporaryFile(delete=False) as file:
            path = file.name
        try:
            size = {"size": weight.numel(), "dtype": weight.dtype}
            self.tensor = torch.from_file(path, shared=True, **size).view(weight.shape)  # type: ignore[arg-type]
            self.tensor.copy_(weight)
        finally:
            with contextlib.suppress(PermissionError):  # Windows: a mapped file cannot go before its mapping
                Path(path).unlink()

    def __deepcopy__(self, _: object) -> OriginalWeight:
        return self


class MergeParity(NamedTuple):
    """How far a merged layer is from the trained one, over its largest output; `nan`: not measured."""

    onto_rounded: float  # merged onto the dequantized base
    onto_original: float  # merged onto the weights before packing


def original_weight(layer: nn.Module) -> Tensor | None:
    """The weight before packing that adapters are merged onto, if it was kept for that."""
    original = getattr(layer, "original_weight", None)
    return original.tensor if isinstance(original, OriginalWeight) else None


def unpacked_weight(layer: nn.Module) -> Tensor | None:
    """The weight before packing, if it was kept for an adapter to start from or to be merged onto."""
    unpacked = getattr(layer, "unpacked_weight", None)
    return unpacked.tensor if isinstance(unpacked, OriginalWeight) else original_weight(layer)


def subtract_start(layer: Any, product: Tensor) -> None:
    """Forget the weight before packing, of which an adapter now has `product` `(out, in)`; keep what to merge onto."""
    original = original_weight(layer)
    if original is not None:
        layer.original_weight = OriginalWeight(original - product.to(original))
    layer.unpacked_weight = None


def _tensors(layer: Any) -> dict[str, Tensor]:
    bias = {} if layer.bias is None else {"bias": layer.bias}
    return {"weight": nf4_weight(layer), **bias}


def _scales_and_tables(layer: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    state = getattr(layer.weight, "quant_state", None)
    while state is not None:
        tensors += [t for t in (state.absmax, state.code, state.offset) if isinstance(t, Tensor)]
        state = state.state2
    return tensors


PACKED = Carrier(
    owns=is_nf4,
    tensors=_tensors,
    hidden_tensors=_scales_and_tables,
    counts=lambda layer: {layer.weight: layer.weight.quant_state.shape.numel()},  # each byte holds two values
)
