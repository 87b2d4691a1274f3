"""Count the bytes and parameters of a model, quantized tensors included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.carriers import Carrier, carrier_of


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as a file would store them; a shared tensor counts once.

    torchao keeps 4-bit values one in a byte while the model is in eager mode. They count as 4 bits here, plus
    their scales, plus their zero points where these are not all zero (a symmetric weight has none to store). Equal
    8-bit values count once: a program stores a table and the head that was tied to it once.
    """
    tensors = list(_tensors(model))
    return sum(map(tensor_bytes, tensors)) - _repeated_bytes(tensors)


def parameter_count(model: nn.Module) -> int:
    """Weights of the model as its architecture counts them, however many bits each has. A shared one counts once.

    A carrier gives the number of values of its layer; the graph of an `int8` model states it in `source_parameters`.
    """
    whole = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "source_parameters", None), int)}
    inside = {id(p) for m in whole.values() for p in m.parameters()}
    counts = {id(p): count for c, m in _carried_layers(model) for p, count in c.counts(m).items()}
    own = sum(counts.get(id(p), p.numel()) for p in model.parameters() if id(p) not in inside)
    return own + sum(int(m.source_parameters) for m in whole.values())  # type: ignore[arg-type]


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of one tensor as stored: 4-bit values are half a byte each."""
    bits = weight_bits(tensor)
    if bits is None:
        return tensor.numel() * tensor.element_size()
    scale, zero_point = tensor.scale, tensor.zero_point  # type: ignore[attr-defined]
    zeros = tensor_bytes(zero_point) if bool(torch.any(zero_point != 0)) else 0
    return -(-tensor.numel() * bits // 8) + tensor_bytes(scale) + zeros


def _repeated_bytes(tensors: Sequence[Tensor]) -> int:
    """The 8-bit values that equal those of an earlier weight."""
    wide: list[Any] = [tensor for tensor in tensors if weight_bits(tensor) == 8]
    return sum(
        weight.numel()
        for number, weight in enumerate(wide)
        if any(other.shape == weight.shape and torch.equal(other.qdata, weight.qdata) for other in wide[:number])
    )


def weight_bits(tensor: Tensor) -> int | None:
    """Bits of a torchao integer weight; `None` for an ordinary tensor."""
    kind = getattr(tensor, "target_dtype", None)
    if kind is None or not hasattr(tensor, "qdata"):
        return None
    return int(str(kind).rpartition("int")[2])


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    seen: set[int] = set()
    hidden = [tensor for carrier, layer in _carried_layers(model) for tensor in carrier.hidden_tensors(layer)]
    for tensor in (*model.parameters(), *model.buffers(), *hidden):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _carried_layers(model: nn.Module) -> list[tuple[Carrier, nn.Module]]:
    pairs = [(carrier_of(layer), layer) for layer in model.modules()]
    return [(carrier, layer) for carrier, layer in pairs if carrier is not None]
