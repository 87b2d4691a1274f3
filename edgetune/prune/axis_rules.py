"""How axes go through operators that compute: one rule for each kind, by the operator's name.

A rule takes the walk, the node and its arguments by name, and returns the axes of the result; of several a list.
What no rule knows blocks the axes that it reads, by its name. The rules of what only moves values are in `axis_moves`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from edgetune.capture.recorded import operator_name, shape_of
from edgetune.prune.axes import Misaligned, UnitAxis, factorize, product, unify
from edgetune.prune.walk import Axes, Walk, fixed

Rule = Callable[[Walk, fx.Node, dict[str, Any]], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for these operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def find_rule(node: fx.Node) -> Rule | None:
    """The rule of a node: by name, or that of all operators that compute each element by itself."""
    named = RULES.get(operator_name(node))
    if named is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return elementwise
    return named


@rule(
    "dropout", "feature_dropout", "alpha_dropout", "to", "_to_copy", "type_as", "contiguous", "clone", "detach",
    "alias", "lift_fresh_copy", "lift_fresh", "copy", "fill", "zero", "masked_fill", "where", "zeros_like", "ones_like",
    "full_like", "empty_like", "rand_like", "randn_like", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "prelu",
    "expand", "expand_as", "broadcast_to", "conj", "resolve_conj", "bernoulli", "square",
)  # fmt: skip
def elementwise(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Each element by itself, with broadcasting: one axis for what stands at one place from the right."""
    shape = shape_of(node)
    operands = [walk.axes(value) for value in given.values() if walk.is_tensor(value)]
    if operator_name(node) == "prelu" and shape_of(given["weight"]).numel() > 1:
        operands[1] = [*operands[1], *[UnitAxis(1)] * (len(shape) - 2)]
    result = []
    for place, size in enumerate(shape, start=-len(shape)):
        same = [axes[place] for axes in operands if len(axes) >= -place and axes[place].size == size]
        for axis in same[1:]:
            unify(same[0], axis)
        result.append(same[0] if same else UnitAxis(size))  # repeated by broadcasting: free, until something says more
    return result


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor", "rand")
def created(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """One value everywhere: any axis may be its own."""
    return [UnitAxis(size) for size in shape_of(node)]


@rule("linear")
def linear(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """`(..., in)` by a weight `(out, in)`."""
    x, (rows, columns) = walk.axes(given["input"]), walk.axes(given["weight"])
    unify(x[-1], columns)
    if given.get("bias") is not None:
        unify(walk.axes(given["bias"])[-1], rows)
    return [*x[:-1], rows]


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """`(..., n, k)` by `(..., k, m)`."""
    values = [value for value in given.values() if walk.is_tensor(value)]
    left, right = (list(walk.axes(value)) for value in values)
    one_row, one_column = len(left) == 1, len(right) == 1
    left, right = ([UnitAxis(1), *left] if one_row else left), ([*right, UnitAxis(1)] if one_column else right)
    unify(left[-1], right[-2])
    batch = _broadcast([left[:-2], right[:-2]])
    if batch and not any(walk.is_parameter(value) for value in values):
        walk.attend(batch[-1], right[-1])
    return [*batch, *([] if one_row else [left[-2]]), *([] if one_column else [right[-1]])]


def _broadcast(operands: Sequence[Axes]) -> Axes:
    result = []
    for place in range(-max(map(len, operands)), 0):
        here = [axes[place] for axes in operands if len(axes) >= -place]
        wide = [axis for axis in here if axis.size > 1]
        for axis in wide[1:]:
            unify(wide[0], axis)
        result.append(wide[0] if wide else here[0])
    return result


@rule("addmm", "baddbmm", "addbmm")
def addmm(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """A bias and a product."""
    values = [value for value in given.values() if walk.is_tensor(value)]
    result = matmul(walk, node, dict(zip("ab", values[1:], strict=True)))
    return _broadcast([walk.axes(values[0]), result])


@rule("einsum")
def einsum(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """One axis for each letter."""
    equation = given["equation"].replace(" ", "")
    sources, arrow, target = equation.partition("->")
    operands = [walk.axes(value) for value in given["tensors"]]
    if "." in equation or not arrow:
        raise Misaligned
    letters: dict[str, UnitAxis] = {}
    for term, axes in zip(sources.split(","), operands, strict=True):
        for letter, axis in zip(term, axes, strict=True):
            if letter in letters:
                unify(letters[letter], axis)
            letters.setdefault(letter, axis)
    if len(operands) == 2 and not any(walk.is_parameter(value) for value in given["tensors"]):
        first, second = sources.split(",")
        parallel = [letter for letter in target if letter in first and letter in second]
        if parallel and target[-1] not in parallel:
            walk.attend(letters[parallel[-1]], letters[target[-1]])
    return [letters[letter] for letter in target]


@rule("scaled_dot_product_attention")
def attention(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Queries and keys of one width, which it scales by; values of any; heads of queries that may share keys."""
    query, key, value = (walk.axes(given[name]) for name in ("query", "key", "value"))
    unify(query[-1], key[-1])
    query[-1].block("the scale of attention")
    unify(key[-2], value[-2])
    if given.get("enable_gqa") and query[-3].size != key[-3].size:
        unify(query[-3], product([key[-3], UnitAxis(query[-3].size // key[-3].size)]))
        unify(key[-3], value[-3])
        batch = [*_broadcast([query[:-3], key[:-3], value[:-3]]), query[-3]]
    else:
        batch = _broadcast([query[:-2], key[:-2], value[:-2]])
    if batch:
        walk.attend(batch[-1], value[-1])
    mask = given.get("attn_mask")
    if mask is not None:
        _broadcast([walk.axes(mask), [*batch, query[-2], key[-2]]])
    return [*batch, query[-2], value[-1]]


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """`(rows, in, ...)` by a weight `(out, in / groups, ...)`; transposed: `(in, out / groups, ...)`."""
    x, weight = walk.axes(given["input"]), walk.axes(given["weight"])
    shape, groups = shape_of(node), given.get("groups", 1)
    spatial = len(weight) - 2
    channels = x[-1 - spatial]
    if operator_name(node).startswith("conv_transpose"):
        group, own = _grouped(walk, weight[0], groups)
        written = product([group, weight[1]])
        unify(channels, weight[0])
    else:
        group, own = _grouped(walk, channels, groups)
        unify(own, weight[1])
        outer, _ = _grouped(walk, weight[0], groups)
        unify(group, outer)
        written = weight[0]
    if groups > 1:
        walk.set_groups(given["weight"], group)
    if given.get("bias") is not None:
        unify(walk.axes(given["bias"])[0], written)
    for axis in x[len(x) - spatial :]:
        axis.block("the places of an image")
    places = [fixed(size, "the places of an image") for size in shape[len(shape) - spatial :]]
    return [*x[: -1 - spatial], written, *places]


def _grouped(walk: Walk, axis: UnitAxis, groups: int) -> tuple[UnitAxis, UnitAxis]:
    """The axis of the groups, and that of the channels of each."""
    if groups == 1:
        return UnitAxis(1), axis
    try:
        return factorize(axis, groups)
    except Misaligned:
        axis.block("a rearrangement of its channels before a convolution in groups")
        return UnitAxis(groups), fixed(axis.size // groups, "channels of a group")


@rule("batch_norm", "instance_norm", "native_batch_norm")
def norm_by_channel(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Each channel by itself."""
    x = walk.axes(given["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if given.get(name) is not None:
            unify(walk.axes(given[name])[0], x[1])
    return list(x)


@rule("layer_norm", "rms_norm", "native_layer_norm", "group_norm")
def norm_over(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Over the last dimensions, or the channels of each group."""
    x, weight = walk.axes(given["input"]), given.get("weight")
    over = x[1:2] if operator_name(node) == "group_norm" else x[-len(given["normalized_shape"]) :]
    for name in ("weight", "bias"):
        if given.get(name) is not None:
            for axis, own in zip(over, walk.axes(given[name]), strict=True):
                unify(axis, own)
    for axis in over:
        axis.block(walk.layer_called(weight, operator_name(node)))
    return list(x)


@rule(
    "softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "flip", "sort", "argsort"
)
def along(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Any:
    """What mixes the positions of some dimensions, and keeps every size."""
    x = walk.first(given)
    dims = given.get("dim", given.get("dims", -1))
    for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
        x[dim].block(operator_name(node))
    return [list(x), list(x)] if isinstance(node.meta.get("val"), (tuple, list)) else list(x)


@rule("roll", "tril", "triu")
def shifted(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """What moves positions, or reads where they are."""
    x = walk.first(given)
    dims = given.get("dims") or range(len(x))
    for dim in dims if operator_name(node) == "roll" else (-2, -1):
        x[dim].block(operator_name(node))
    return list(x)


@rule(
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "norm", "argmax", "argmin",
    "any", "all", "logsumexp", "prod", "median", "linalg_vector_norm", "topk",
)  # fmt: skip
def reduced(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Any:
    """Over some dimensions, which are left out or of size 1 afterwards."""
    tensors = [value for value in given.values() if walk.is_tensor(value)]
    if len(tensors) == 2:  # the larger of two
        return elementwise(walk, node, given)
    x, dims = walk.axes(tensors[0]), given.get("dim")
    dims = range(len(x)) if dims is None or dims == [] else dims if isinstance(dims, (list, tuple)) else [dims]
    over = {dim % len(x) for dim in dims} if x else set()
    for dim in over:
        x[dim].block(operator_name(node))
    value = node.meta.get("val")
    results = list(value) if isinstance(value, (tuple, list)) else [value]
    shape = list(getattr(results[0], "shape", ()))
    if len(shape) == len(x):
        axes = [fixed(shape[n], operator_name(node)) if n in over else axis for n, axis in enumerate(x)]
    else:
        axes = [axis for n, axis in enumerate(x) if n not in over]
    return [list(axes) for _ in results] if isinstance(value, (tuple, list)) else axes


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa", "_upsample_nearest_exact2d", "constant_pad_nd", "pad", "reflection_pad2d",
    "replication_pad2d", "reflection_pad1d",
)  # fmt: skip
def places(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Any:
    """What mixes places, and leaves the other dimensions alone."""
    x = walk.first(given)
    value: Any = node.meta["val"]
    several = isinstance(value, (tuple, list))
    shape = (value[0] if several else value).shape
    axes = []
    for axis, size in zip(x, shape, strict=True):
        if axis.size != size:
            axis.block(operator_name(node))
        axes.append(axis if axis.size == size else fixed(size, operator_name(node)))
    return [list(axes) for _ in value] if several else axes


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Channels `(c, r, r)` to places, and back."""
    *rows, channels, _, _ = walk.axes(given["self"])
    pixels = [fixed(size, "the places of an image") for size in shape_of(node)[-2:]]
    if operator_name(node) == "pixel_unshuffle":
        within = fixed(given["downscale_factor"] ** 2, "the places of an image")
        return [*rows, product([channels, within]), *pixels]
    own, within = walk.try_factorize(channels, channels.size // given["upscale_factor"] ** 2)
    within.block("the places of an image")
    return [*rows, own, *pixels]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Channels `(group, c)` as `(c, group)`."""
    rows, channels, *others = walk.axes(given["self" if "self" in given else "input"])
    outer, inner = walk.try_factorize(channels, given["groups"])
    return [rows, product([inner, outer]), *others]


@rule("embedding", "embedding_bag")
def embedding(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Rows of a table by number."""
    rows, width = walk.axes(given["weight"])
    rows.block("the numbers that look it up")
    return [*walk.axes(given["indices"]), width]


@rule("index", "_unsafe_index")
def index(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Positions by number, side by side in some dimensions."""
    x, chosen = walk.axes(given["self"]), list(given["indices"])
    chosen += [None] * (len(x) - len(chosen))
    dims = [dim for dim, value in enumerate(chosen) if value is not None]
    for dim in dims:
        x[dim].block("the numbers that choose from it")
    shape = shape_of(node)
    kept = [dim for dim in range(len(x)) if dim not in dims]
    among = len(shape) - len(kept)
    first = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    numbers = _broadcast([walk.axes(chosen[dim]) for dim in dims])
    numbers = numbers if len(numbers) == among else [fixed(size, "chosen") for size in shape[first : first + among]]
    return [*[x[dim] for dim in kept[:first]], *numbers, *[x[dim] for dim in kept[first:]]]


@rule("index_select", "gather", "take_along_dim")
def chosen(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Axes:
    """Positions of one dimension by number."""
    x, dim = walk.axes(given["self"]), given["dim"]
    x[dim].block("the numbers that choose from it")
    shape = shape_of(node)
    return [
        axis if n != dim % len(x) and axis.size == shape[n] else fixed(shape[n], "chosen") for n, axis in enumerate(x)
    ]


def unknown(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Any:
    """What is not understood: nothing that it reads can be cut."""
    name = operator_name(node)
    for source in node.all_input_nodes:
        walk.block(source, name)
    return walk.fixed_like(node.meta.get("val"), name)
