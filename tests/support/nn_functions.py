"""Every function of torch.nn.functional that no module of nn_cases.py calls, with small inputs; for nn_table.py."""

from __future__ import annotations

import inspect

import torch
from torch.nn import functional as F

from support.nn_cases import MODULES, PICTURE, ROW, SEQUENCE, VOLUME, Case, fn, ids, rand, randn

FUNCTIONS: dict[str, Case] = {
    "adaptive_max_pool1d_with_indices": fn(lambda x: F.adaptive_max_pool1d_with_indices(x, 2), SEQUENCE),
    "adaptive_max_pool2d_with_indices": fn(lambda x: F.adaptive_max_pool2d_with_indices(x, 2), PICTURE),
    "adaptive_max_pool3d_with_indices": fn(lambda x: F.adaptive_max_pool3d_with_indices(x, 2), VOLUME),
    "affine_grid": fn(lambda t: F.affine_grid(t, [2, 3, 4, 5]), lambda: randn(2, 2, 3)),
    "conv_tbc": fn(F.conv_tbc, lambda: randn(5, 2, 4), lambda: randn(3, 4, 6), lambda: randn(6)),
    "conv2d, weights given": fn(F.conv2d, PICTURE, lambda: randn(6, 4, 3, 3)),
    "linear, weights given": fn(F.linear, ROW, lambda: randn(3, 6)),
    "cosine_similarity, of channels": fn(lambda x, y: F.cosine_similarity(x, y, 1), PICTURE, lambda: rand(2, 4, 6, 8)),
    "fractional_max_pool2d_with_indices": fn(
        lambda x, r: F.fractional_max_pool2d_with_indices(x, 2, 3, _random_samples=r), PICTURE, lambda: rand(2, 4, 2)
    ),
    "fractional_max_pool3d_with_indices": fn(
        lambda x, r: F.fractional_max_pool3d_with_indices(x, 2, 2, _random_samples=r), VOLUME, lambda: rand(2, 4, 3)
    ),
    "grid_sample": fn(lambda x, g: F.grid_sample(x, g, align_corners=False), PICTURE, lambda: rand(2, 5, 5, 2) * 2 - 1),
    "grid_sample, nearest, reflected": fn(
        lambda x, g: F.grid_sample(x, g, "nearest", "reflection", True), PICTURE, lambda: randn(2, 5, 5, 2)
    ),
    "grid_sample, bicubic": fn(
        lambda x, g: F.grid_sample(x, g, "bicubic", align_corners=False), PICTURE, lambda: rand(2, 5, 5, 2) * 2 - 1
    ),
    "grid_sample, of a volume": fn(
        lambda x, g: F.grid_sample(x, g, align_corners=False), VOLUME, lambda: rand(2, 2, 3, 4, 3) * 2 - 1
    ),
    "grouped_mm": fn(lambda x, w: F.grouped_mm(x, w), lambda: randn(2, 8, 16), lambda: randn(2, 16, 8)),
    "gumbel_softmax": fn(F.gumbel_softmax, ROW),
    "interpolate, area": fn(lambda x: F.interpolate(x, size=(3, 4), mode="area"), PICTURE),
    "interpolate, smaller": fn(lambda x: F.interpolate(x, size=(4, 3), mode="bilinear"), PICTURE),
    "interpolate, antialiased": fn(lambda x: F.interpolate(x, size=(4, 3), mode="bilinear", antialias=True), PICTURE),
    "interpolate, bicubic antialiased": fn(
        lambda x: F.interpolate(x, size=(4, 3), mode="bicubic", antialias=True), PICTURE
    ),
    "interpolate, nearest-exact": fn(lambda x: F.interpolate(x, size=(9, 11), mode="nearest-exact"), PICTURE),
    "interpolate, nearest uneven": fn(lambda x: F.interpolate(x, size=(9, 11)), PICTURE),
    "max_pool1d_with_indices": fn(lambda x: F.max_pool1d_with_indices(x, 2), SEQUENCE),
    "max_pool2d_with_indices": fn(lambda x: F.max_pool2d_with_indices(x, 2), PICTURE),
    "max_pool3d_with_indices": fn(lambda x: F.max_pool3d_with_indices(x, 2), VOLUME),
    "multi_head_attention_forward": fn(
        lambda x, w, b, o: F.multi_head_attention_forward(x, x, x, 8, 2, w, b, None, None, False, 0.0, o, None, False),
        SEQUENCE, lambda: randn(24, 8), lambda: randn(24), lambda: randn(8, 8),
    ),
    "normalize": fn(F.normalize, ROW),
    "normalize, by p=3": fn(lambda x: F.normalize(x, p=3.0), ROW),
    "normalize, by the largest": fn(lambda x: F.normalize(x, p=float("inf")), ROW),
    "one_hot": fn(lambda i: F.one_hot(i, 7), lambda: ids(7, 2, 3)),
    "pad, circular": fn(lambda x: F.pad(x, (1, 2, 2, 1), "circular"), PICTURE),
    "pad, cropping": fn(lambda x: F.pad(x, (-1, 2, 0, -2)), PICTURE),
    "pdist": fn(F.pdist, lambda: randn(4, 6)),
    "scaled_dot_product_attention": fn(F.scaled_dot_product_attention, *[lambda: randn(2, 2, 4, 8)] * 3),
    "scaled_dot_product_attention, causal": fn(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *[lambda: randn(2, 2, 4, 8)] * 3
    ),
    "scaled_dot_product_attention, grouped": fn(
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        lambda: randn(2, 4, 4, 8), lambda: randn(2, 2, 4, 8),
    ),
    "scaled_grouped_mm": fn(
        lambda x, w: F.scaled_grouped_mm(
            x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn).transpose(-2, -1), torch.ones(2, 8),
            F.ScalingType.RowWise, torch.ones(2, 16), F.ScalingType.RowWise,
        ),
        lambda: randn(2, 8, 16), lambda: randn(2, 16, 16),
    ),
    "scaled_mm": fn(
        lambda x, w: F.scaled_mm(
            x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn).t(), torch.ones(()), F.ScalingType.TensorWise,
            torch.ones(()), F.ScalingType.TensorWise, output_dtype=torch.float32,
        ),
        lambda: randn(16, 16), lambda: randn(16, 16),
    ),
    "triplet_margin_loss, swapped": fn(
        lambda a, b, c: F.triplet_margin_loss(a, b, c, swap=True),
        lambda: randn(3, 5), lambda: rand(3, 5), lambda: rand(3, 5).flip(0),
    ),
}  # fmt: skip

# Functions that a module's case calls under another name, that change their input in place, or that are torch's own.
SAME = {
    "upsample": "Upsample", "upsample_bilinear": "UpsamplingBilinear2d", "upsample_nearest": "UpsamplingNearest2d",
    "interpolate": "Upsample", "binary_cross_entropy": "BCELoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss", "kl_div": "KLDivLoss", "ctc_loss": "CTCLoss",
    "pad": "ConstantPad2d", "batch_norm": "BatchNorm2d", "instance_norm": "InstanceNorm2d",
    "native_channel_shuffle": "ChannelShuffle", "log_sigmoid": "LogSigmoid",
}  # fmt: skip
NOT_OF_USERS = {"assert_int_or_pair", "boolean_dispatch", "handle_torch_function"}


def functions_without_case() -> set[str]:
    """Functions of this torch that no case tries, neither as themselves nor through a module."""
    names = {n for n, function in vars(F).items() if callable(function) and not inspect.isclass(function)}
    names = {n.removesuffix("_") for n in names if n[0] != "_" and not n.startswith("has_torch_function")}
    tried = {name.partition(",")[0] for name in FUNCTIONS} | set(SAME) | NOT_OF_USERS
    modules = {name.partition(",")[0].lower().removesuffix("loss") for name in MODULES}
    return {n for n in names - tried if n.replace("_", "").removesuffix("loss") not in modules} - {"Optional"}
