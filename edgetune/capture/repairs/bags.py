"""`nn.EmbeddingBag`: rows of a table looked up, and their sum, mean or maximum for each bag."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgetune.capture.repairs.shapes import Repaired, add_node, is_fixed

_SUM, _MEAN, _MAX = 0, 1, 2


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Repaired:
    """Bags that begin at `offsets`, known only at run time: test for every row whether it is in every bag."""
    if not is_fixed(indices, offsets) or indices.dim() != 1:
        return NotImplemented
    places = torch.arange(indices.shape[0], device=indices.device)
    begins = offsets[:-1] if include_last_offset else offsets
    ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_full((1,), indices.shape[0])])
    inside = torch.logical_and(places >= begins.unsqueeze(1), places < ends.unsqueeze(1))
    if padding_idx is not None and padding_idx >= 0:
        inside = torch.logical_and(inside, indices != padding_idx)
    rows, shares = torch.nn.functional.embedding(indices, weight), inside.to(weight.dtype)
    counts = shares.sum(1, keepdim=True)
    if mode == _MAX:
        lowest = (1.0 - shares).unsqueeze(-1) * torch.finfo(weight.dtype).min
        bags = (rows.unsqueeze(0) * shares.unsqueeze(-1) + lowest).amax(1) * counts.clamp(max=1.0)
    else:
        shares = shares if per_sample_weights is None else shares * per_sample_weights
        bags = torch.matmul(shares, rows)
        bags = bags / counts.clamp(min=1.0) if mode == _MEAN else bags
    return bags, indices, indices, indices  # the others are for a backward pass


def of_one_length(program: ExportedProgram) -> None:
    """Write bags that are the rows of a matrix, with evenly spaced offsets, as a look-up of that matrix."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target != _ATEN.embedding_bag.padding_idx:
            continue
        length = _length(node)
        firsts = [user for user in node.users if user.target == operator.getitem]
        if not length or any(user.users and user.args[1] != 0 for user in firsts):
            continue
        with graph.inserting_before(node):
            bags = _looked_up(graph, node, length)
        for user in firsts:
            if user.args[1] == 0:
                user.replace_all_uses_with(bags)
                program.graph_signature.replace_all_uses(user.name, bags.name)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _length(node: fx.Node) -> int:
    """Rows of each bag; 0 if that differs or is unknown."""
    indices, offsets = node.args[1:3]
    if not isinstance(offsets, fx.Node) or offsets.target != _ATEN.arange.start_step:
        return 0
    numbers = [value for value in offsets.args if isinstance(value, int)]
    count = indices.meta["val"].shape[0]  # type: ignore[union-attr]
    if len(numbers) != 3 or not isinstance(count, int):
        return 0
    begin, end, step = numbers
    return step if begin == 0 and end == count and step > 0 and count % step == 0 else 0


def _looked_up(graph: fx.Graph, node: fx.Node, length: int) -> fx.Node:
    call = partial(add_node, graph, node)
    given = dict(enumerate(node.args))
    weight, mode, padding = node.args[0], given.get(4, _SUM), given.get(8)
    dtype = weight.meta["val"].dtype  # type: ignore[union-attr]
    indices = call(_ATEN.reshape.default, given[1], [-1, length])
    rows = call(_ATEN.embedding.default, weight, indices)
    keep = None
    if padding is not None and padding >= 0:  # type: ignore[operator]
        keep = call(_ATEN.to.dtype, call(_ATEN.ne.Scalar, indices, padding), dtype)
        keep = call(_ATEN.unsqueeze.default, keep, -1)
    if mode == _MAX:
        if keep is None:
            return call(_ATEN.amax.default, rows, [1])
        hidden = call(_ATEN.mul.Tensor, call(_ATEN.rsub.Scalar, keep, 1.0), torch.finfo(dtype).min)
        shown = call(_ATEN.add.Tensor, call(_ATEN.mul.Tensor, rows, keep), hidden)
        one = call(_ATEN.amax.default, keep, [1])
        return call(_ATEN.mul.Tensor, call(_ATEN.amax.default, shown, [1]), one)
    if given.get(6) is not None:
        each = call(_ATEN.reshape.default, given[6], [-1, length, 1])
        keep = each if keep is None else call(_ATEN.mul.Tensor, keep, each)
    if keep is None and mode == _MEAN:
        return call(_ATEN.mean.dim, rows, [1])
    total = call(_ATEN.sum.dim_IntList, rows if keep is None else call(_ATEN.mul.Tensor, rows, keep), [1])
    if mode != _MEAN:
        return total
    counts = call(_ATEN.clamp.default, call(_ATEN.sum.dim_IntList, keep, [1]), 1.0)
    return call(_ATEN.div.Tensor, total, counts)


_ATEN = torch.ops.aten
REPAIRS: dict[Any, Any] = {
    _ATEN.embedding_bag.padding_idx: embedding_bag,
    _ATEN.embedding_bag.default: embedding_bag,
}
