"""RMSNorm and group norm, by means; a batch norm of a batch norm, as a product and a sum.

LayerNorm stays one portable operator: a BERT whose layer norms were written as linears was slower, not faster.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from edgetune.capture.repairs.shapes import Repaired, add_node, takes


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Repaired:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dims (Zhang and Sennrich, 2019)."""
    if not takes(x):
        return NotImplemented
    dims = list(range(x.dim() - len(normalized_shape), x.dim()))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scaled = x * torch.rsqrt(torch.ops.aten.mean.dim(x * x, dims, True) + eps)
    return scaled if weight is None else scaled * weight


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Repaired:
    """Group norm of `(batch, channels, ...)`: each group of channels together gets mean 0 and variance 1."""
    if not takes(x) or x.dim() < 3:
        return NotImplemented
    groups = x.reshape(x.shape[0] * num_groups, 1, 1, -1)
    channels = x.shape[1] // num_groups
    apart = groups - _mean(groups, channels)
    scaled = apart * torch.rsqrt(_mean(apart * apart, channels) + eps)
    result = scaled.reshape(x.shape)
    form = (1, -1, *[1] * (x.dim() - 2))
    result = result if weight is None else result * weight.reshape(form)
    return result if bias is None else result + bias.reshape(form)


def _mean(rows: Tensor, parts: int) -> Tensor:
    """Mean of `(rows, 1, 1, width)`, each row in equal parts first, since XNNPACK's error grows with the width."""
    each = torch.ops.aten.mean.dim(rows.reshape(rows.shape[0] * parts, 1, 1, -1), [2, 3], True)
    whole: Tensor = torch.ops.aten.mean.dim(each.reshape(-1, 1, 1, parts), [2, 3], True)
    return whole


def unchain(program: ExportedProgram) -> None:
    """Write a batch norm that reads another's output as `x * scale + shift`.

    XNNPACK's pass turns each batch norm into a convolution, and fails if it has just done so with its input.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if node.target != _BATCH_NORM or getattr(node.args[0], "target", None) != operator.getitem:
            continue
        if node.args[0].args[0].target != _BATCH_NORM:
            continue
        x, weight, bias, mean, variance, _, eps = node.args
        form = [1, -1, *[1] * (x.meta["val"].dim() - 2)]
        add = partial(add_node, graph, node)
        with graph.inserting_before(node):
            scale = add(_ATEN.rsqrt.default, add(_ATEN.add.Tensor, variance, eps))
            if weight is not None:
                scale = add(_ATEN.mul.Tensor, scale, weight)
            shift = add(_ATEN.neg.default, add(_ATEN.mul.Tensor, mean, scale))
            if bias is not None:
                shift = add(_ATEN.add.Tensor, shift, bias)
            scale, shift = (add(_ATEN.reshape.default, value, form) for value in (scale, shift))
            whole = add(_ATEN.add.Tensor, add(_ATEN.mul.Tensor, x, scale), shift)
        for first in [user for user in node.users if user.args[1] == 0]:
            first.replace_all_uses_with(whole)
    graph.eliminate_dead_code()


_ATEN = torch.ops.aten
_BATCH_NORM = _ATEN._native_batch_norm_legit_no_training.default
REPAIRS: dict[Any, Any] = {_ATEN.rms_norm.default: rms_norm, _ATEN.group_norm.default: group_norm}
