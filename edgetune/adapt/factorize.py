"""Matrices as products of two low-rank ones, by their singular values, and how far those are from the matrices.

Eckart and Young, 1936: the first r singular directions are the nearest matrix of rank r.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.adapt.layer_kinds import Kind, kind_of, widths_of
from edgetune.core.errors import EdgetuneError

BOUND = 0.01  # the relative error that a rank which nobody stated stays within
ADAPTABLE: tuple[Kind, ...] = ("linear", "Conv1D", "conv1d", "conv2d 1x1", "conv2d", "conv3d", "embedding")
Pair = tuple[Tensor, Tensor]  # A (rank, in) and B (out, rank)


def to_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """What is added to a layer's weight, as `(out, in)`: of a convolution `in` are the inputs of one output value."""
    return weight.T if kind_of(layer) in ("Conv1D", "embedding") else weight.flatten(1)


def to_weight(layer: Any, matrix: Tensor) -> Tensor:
    """What is added to a layer's weight, in the layout of the weight."""
    kind = kind_of(layer)
    if kind in ("Conv1D", "embedding"):
        return matrix.T
    return matrix if kind == "linear" else matrix.view(layer.weight.shape)


def relative_error(matrices: Mapping[str, Tensor], pairs: Mapping[str, Pair]) -> float:
    """`|M - B A| / |M|` over all matrices together, by the Frobenius norm."""
    whole = sum(float(matrix.double().square().sum()) for matrix in matrices.values())
    left = sum(float((matrices[name] - b @ a).double().square().sum()) for name, (a, b) in pairs.items())
    return float((left / whole) ** 0.5) if whole else 0.0


def factorize(
    layers: Mapping[str, nn.Module], matrices: Mapping[str, Tensor], rank: int | None = None, setting: str = "rank"
) -> dict[str, Pair]:
    """For each layer the nearest product of `rank`; by default of the lowest rank within `BOUND` in every layer.

    Raises `EdgetuneError`, with the errors of some ranks and the name of the `setting`, if a rank is above a width, or
    if two matrices of the default rank would be larger than the layer's own.
    """
    pairs, needed = {}, {}
    for name, matrix in matrices.items():
        width = min(matrix.shape)
        if rank is not None and rank > width:
            action = f"state {setting} up to {min(min(m.shape) for m in matrices.values())}"
            raise EdgetuneError(f"{name}: {setting} is above the layer's width {width}", got=rank, action=action)
        u, s, v = torch.linalg.svd(matrix.float(), full_matrices=False)
        kept = _needed_rank(s) if rank is None else rank
        if kept * sum(widths_of(layers[name])) > matrix.numel():
            needed[name] = kept
        pairs[name] = v[:kept].contiguous(), (u[:, :kept] * s[:kept]).contiguous()
    if needed and rank is None:
        name, kept = max(needed.items(), key=lambda item: item[1])
        raise EdgetuneError(
            f"{name}: a LoRA within {BOUND:.0%} of the adapter has rank {kept} of {min(matrices[name].shape)}, and "
            "more values than the layer's weight",
            got=f"{len(needed)} such layers of {len(matrices)}",
            action=f"state a {setting} ({_errors_of_ranks(matrices)}), or merge it",
        )
    return pairs


def _needed_rank(s: Tensor) -> int:
    """The lowest rank whose error is within the bound."""
    left = s.double().square().flip(0).cumsum(0).flip(0)  # of the singular values from each one on
    return max(1, int((left > BOUND**2 * left[0]).sum()))


def _errors_of_ranks(matrices: Mapping[str, Tensor]) -> str:
    """`rank 4 is off by 61 %, rank 8 by 40 %`, over all matrices together."""
    squares = [torch.linalg.svdvals(matrix.double()).square() for matrix in matrices.values()]
    ranks = [rank for rank in (4, 8, 16, 32, 64) if rank < min(map(len, squares))] or [1]
    whole = sum(float(s.sum()) for s in squares)
    errors = [(sum(float(s[rank:].sum()) for s in squares) / whole) ** 0.5 for rank in ranks]
    return "rank " + ", rank ".join(
        f"{rank} {'is off by' if not n else 'by'} {error:.0%}"
        for n, (rank, error) in enumerate(zip(ranks, errors, strict=True))
    )
