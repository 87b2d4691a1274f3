"""How many bytes the models of laws.py take after lossy techniques, from the plain models."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from edgetune.core.layers import matches


def packed_bytes(weights: int, block_size: int, double_quant: bool) -> int:
    """Bytes that the weights of an NF4 layer take: codes, scales and tables."""
    codes, scales, table = math.ceil(weights / 2), math.ceil(weights / block_size), 16 * 4
    if not double_quant:
        return codes + 4 * scales + table
    return codes + scales + table + 4 * math.ceil(scales / 256) + 256 * 4 + 4


def nf4_size(double_quant: bool, skipped: str) -> Callable[[nn.Module], int]:
    """All linears but one packed, the rest as it was."""

    def size(plain: nn.Module) -> int:
        total = 4 * sum(t.numel() for t in plain.parameters()) + sum(t.nbytes for t in plain.buffers())
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear) and name != skipped:
                weights = module.weight.numel()
                total += packed_bytes(weights, 32, double_quant) - 4 * weights
        return total

    return size


def bytes_of(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def pruned_bert_size(plain: nn.Module) -> int:
    """16 of 64 units of each FFN and 1 of 4 heads go, of width 8: rows with their biases, and columns."""
    ffn, heads = 16 * (32 + 1 + 32), 8 * (3 * (32 + 1) + 32)
    return bytes_of(plain) - 2 * 4 * (ffn + heads)


def int4_size(plain: nn.Module) -> int:
    """Linears at half a byte and a scale of two bytes for each 32; embeddings at a byte and a scale for each row."""
    total = bytes_of(plain)
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            total -= 4 * module.weight.numel() - module.weight.numel() // 2 - 2 * module.weight.numel() // 32
        if isinstance(module, nn.Embedding):
            total -= 3 * module.weight.numel() - 4 * module.num_embeddings
    return total


def int4_int8_size(plain: nn.Module) -> int:
    """Three linears at half a byte, four at a byte and a scale of four bytes for each output; the stem stays."""
    total = bytes_of(plain)
    for name, module in plain.named_modules():
        if name.endswith("down"):
            total -= 4 * module.weight.numel() - module.weight.numel() // 2 - 2 * module.weight.numel() // 32
        elif name.endswith("up") or name == "classifier":
            total -= 3 * module.weight.numel() - 4 * module.weight.shape[0]
    return total


def channel_size(bits: int, scale_bytes: int) -> Callable[[nn.Module], int]:
    """Linears with a scale for each output; embeddings at a byte and a scale of four bytes for each row."""

    def size(plain: nn.Module) -> int:
        total = bytes_of(plain)
        for module in plain.modules():
            if isinstance(module, nn.Linear):
                total -= (32 - bits) * module.weight.numel() // 8 - scale_bytes * module.out_features
            if isinstance(module, nn.Embedding):
                total -= 3 * module.weight.numel() - 4 * module.num_embeddings
        return total

    return size


def int8_size(plain: nn.Module) -> int:
    """Weights at a byte; for each output a bias, a scale (4 bytes each) and a zero point (8). Norms are folded."""
    layers = [m for m in plain.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return sum(m.weight.numel() + (4 + 4 + 8) * m.weight.shape[0] for m in layers)


def shared_size(targets: tuple[str, ...], ratio: float, block_size: int = 64) -> Callable[[nn.Module], int]:
    """A pool in the place of these linears' weights, and for each block of these a place and two factors."""

    def size(plain: nn.Module) -> int:
        linears = [m for n, m in plain.named_modules() if isinstance(m, nn.Linear) and matches(n, targets)]
        blocks = sum(linear.weight.numel() for linear in linears) // block_size
        return bytes_of(plain) + 4 * (math.ceil(ratio * blocks) - blocks) * block_size + 3 * 4 * blocks

    return size


def without_second_block(plain: nn.Module) -> int:
    """Two of three blocks stay."""
    return bytes_of(plain) - bytes_of(plain.get_submodule("blocks.1"))
