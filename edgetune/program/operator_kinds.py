"""The kind of an operator by its name, and which ones cost nothing."""

from __future__ import annotations

import re

from edgetune.program.operators import Kind

_FREE = frozenset(
    ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "alias", "detach", "unsqueeze_copy", "squeeze_copy",
     "view_copy", "flatten", "unflatten", "_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_size",
     "lift_fresh_copy")
)  # fmt: skip
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("linear", "addmm", "mm"), "linear"),
    **dict.fromkeys(("matmul", "bmm", "baddbmm"), "matmul"),
    **dict.fromkeys(("embedding",), "embedding"),
    **dict.fromkeys(
        ("layer_norm", "native_layer_norm", "batch_norm", "_native_batch_norm_legit_no_training", "group_norm",
         "native_group_norm", "rms_norm", "instance_norm"),
        "normalization",
    ),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax"), "softmax"),
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "prod", "any", "all", "argmax", "argmin", "var", "std", "cumsum",
         "norm", "linalg_vector_norm", "topk"),
        "reduction",
    ),
    **dict.fromkeys(
        ("max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d",
         "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d"),
        "pooling",
    ),
    **dict.fromkeys(
        ("permute", "transpose", "t", "cat", "stack", "slice", "select", "expand", "clone", "contiguous", "copy",
         "update_cache", "_to_copy", "to", "index", "index_select", "gather", "repeat", "repeat_interleave", "pad",
         "constant_pad_nd", "split", "split_with_sizes", "chunk", "unbind", "roll", "flip", "permute_copy",
         "expand_copy", "slice_copy", "select_copy", "slice_scatter", "index_put", "scatter", "pixel_shuffle",
         "upsample_bilinear2d", "upsample_nearest2d", "narrow", "unfold", "full", "full_like", "zeros", "ones",
         "new_ones", "new_zeros", "zeros_like", "ones_like", "arange", "scalar_tensor"),
        "data-movement",
    ),
    **dict.fromkeys(
        ("add", "sub", "rsub", "mul", "div", "pow", "sqrt", "rsqrt", "reciprocal", "neg", "abs", "exp", "log", "tanh",
         "sigmoid", "relu", "relu6", "gelu", "silu", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "prelu",
         "elu", "clamp", "clamp_min", "clamp_max", "minimum", "maximum", "where", "masked_fill", "eq", "ne", "lt", "le",
         "gt", "ge", "logical_not", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "bitwise_not",
         "__and__", "__or__", "sin", "cos", "erf", "floor", "ceil", "round", "square", "softplus", "triu", "tril"),
        "elementwise",
    ),
}  # fmt: skip


def is_free(name: str) -> bool:
    """Whether an operator of the lowered graph is bookkeeping: a view, an assertion, an allocation."""
    return short_name(name) in _FREE


def kind_of(name: str) -> Kind:
    """The kind of an operator by its name: `aten.mean.dim`."""
    return _KINDS.get(short_name(name), "other")


def plain_name(name: str) -> str:
    """`aten.mean.dim` of an edge operator's `aten_mean_dim` or `<EdgeOpOverload: aten.mean.dim>: schema = ...`."""
    match = re.match(r"<EdgeOpOverload: ([^>]+)>", name)
    return match.group(1) if match else name


def short_name(name: str) -> str:
    """`layer_norm` of `aten.layer_norm.default`."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else name
