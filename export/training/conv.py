"""Convolutions and pooling with trainable operands, in operators that XNNPACK takes: slices, then products.

XNNPACK packs a convolution's weight once, so a trainable one becomes a product of its windows. Images are
`(batch, channels, height, width)`; inside, channels are last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Pair = list[int]
HUGE = 3.0e38


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Number of windows along one side."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def slice_windows(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, fill: float = 0.0
) -> list[Tensor]:
    """For each kernel position, its input in every window: `(batch, height, width, channels)` each."""
    sides = [out_size(n, *a) for n, *a in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)]  # type: ignore[misc]
    x = x.permute(0, 2, 3, 1)
    # up to the end of the last window, rounded up to whole strides
    ends = [(o - 1) * s + d * (k - 1) + 1 for o, s, k, d in zip(sides, stride, kernel, dilation, strict=True)]
    ends = [-(-e // s) * s for e, s in zip(ends, stride, strict=True)]
    margins = [e - n - p for e, n, p in zip(ends, x.shape[1:3], padding, strict=True)]
    pad = [0, 0, padding[1], max(margins[1], 0), padding[0], max(margins[0], 0)]
    x = functional.pad(x, pad, value=fill) if any(pad) else x
    x = x[:, : ends[0], : ends[1]]
    phases = _split_phases(x.contiguous(), stride)
    taps = []
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            (py, oy), (px, ox) = ((n * d % s, n * d // s) for n, d, s in zip((i, j), dilation, stride, strict=True))
            taps.append(phases[py][px][:, oy : oy + sides[0], ox : ox + sides[1]])
    return taps


def _split_phases(x: Tensor, stride: Pair) -> list[list[Tensor]]:
    """Every stride-th row and column, by their offset."""
    if stride == [1, 1]:
        return [[x]]
    batch, height, width, channels = x.shape
    rows, columns = height // stride[0], width // stride[1]
    parts = x.view(batch, rows, stride[0], columns, stride[1], channels).permute(2, 4, 0, 1, 3, 5).contiguous()
    return [
        [parts[i : i + 1, j : j + 1].reshape(batch, rows, columns, channels) for j in range(stride[1])]
        for i in range(stride[0])
    ]


def _is_depthwise(weight_shape: Any, groups: int) -> bool:
    return groups > 1 and weight_shape[0] == groups and weight_shape[1] == 1


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of two matrices, as a batch of one."""
    return torch.bmm(left.contiguous().unsqueeze(0), right.contiguous().unsqueeze(0)).squeeze(0)


def convolve(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Tensor:
    """As `torch.conv2d`, without a bias."""
    outputs, inputs, *kernel = weight.shape
    taps = slice_windows(x, kernel, stride, padding, dilation)
    batch, height, width, _ = taps[0].shape
    count = len(taps)
    if _is_depthwise(weight.shape, groups):
        rows = weight.reshape(outputs, count).permute(1, 0).contiguous()
        total = taps[0] * rows[0:1]
        for n in range(1, count):
            total = total + taps[n] * rows[n : n + 1]
        return total.permute(0, 3, 1, 2).contiguous()
    positions = batch * height * width
    if groups == 1:
        flat = multiply(_columns(taps), weight.permute(2, 3, 1, 0).reshape(count * inputs, outputs))
    else:
        each = outputs // groups
        matrix = weight.view(groups, each, inputs, count).permute(0, 3, 2, 1).reshape(groups, count * inputs, each)
        flat = torch.bmm(_group_columns(taps, groups), matrix).permute(1, 0, 2).reshape(positions, outputs)
    return flat.view(batch, height, width, outputs).permute(0, 3, 1, 2).contiguous()


def _columns(taps: list[Tensor]) -> Tensor:
    """`(positions, kernel positions * channels)`."""
    columns = torch.cat(taps, -1) if len(taps) > 1 else taps[0]
    return columns.reshape(-1, columns.shape[-1])


def _group_columns(taps: list[Tensor], groups: int) -> Tensor:
    """Columns of each group: `(groups, positions, kernel positions * channels of the group)`."""
    columns = _columns(taps).view(-1, len(taps), groups, taps[0].shape[-1] // groups)
    return columns.permute(2, 0, 1, 3).reshape(groups, columns.shape[0], -1)


def weight_gradient(
    gradient: Tensor, x: Tensor, weight_shape: list[int], stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """The gradient of a convolution's weight, of the weight's shape."""
    outputs, inputs, *kernel = weight_shape
    taps = slice_windows(x, kernel, stride, padding, dilation)
    batch, height, width, channels = taps[0].shape
    positions, count = batch * height * width, len(taps)
    rows = gradient.permute(0, 2, 3, 1).reshape(positions, outputs)
    if _is_depthwise(weight_shape, groups):
        each = [(tap.reshape(positions, channels) * rows).sum(0, keepdim=True) for tap in taps]
        return (torch.cat(each, 0) if count > 1 else each[0]).permute(1, 0).reshape(weight_shape)
    if groups == 1:
        flat = multiply(rows.permute(1, 0), _columns(taps))  # (outputs, kernel positions * inputs)
        return flat.view(outputs, *kernel, inputs).permute(0, 3, 1, 2).contiguous()
    each_out = outputs // groups
    grouped = rows.view(positions, groups, each_out).permute(1, 2, 0).contiguous()
    flat = torch.bmm(grouped, _group_columns(taps, groups))  # (groups, outputs of the group, kernel positions * inputs)
    return flat.view(outputs, *kernel, inputs).permute(0, 3, 1, 2).contiguous()


def dilate(gradient: Tensor, size: list[int], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """The output's gradient dilated and padded with zeros, so that a plain convolution gives the input's."""
    batch, channels, height, width = gradient.shape
    if stride != [1, 1]:
        wide = functional.pad(
            gradient.contiguous().view(batch, channels, height, 1, width, 1),
            [0, stride[1] - 1, 0, 0, 0, stride[0] - 1],
        )
        gradient = wide.reshape(batch, channels, height * stride[0], width * stride[1])
    pads: list[int] = []
    for n in (1, 0):
        have = gradient.shape[2 + n]
        reach = dilation[n] * (kernel[n] - 1)
        before = reach - padding[n]
        pads += [before, size[n] + reach - have - before]
    return functional.pad(gradient, pads) if any(pads) else gradient


def flip_weight(weight: Tensor, groups: int) -> Tensor:
    """The weight of the convolution that gives the input's gradient: flipped, outputs and inputs exchanged."""
    outputs, inputs, *kernel = weight.shape
    each = outputs // groups
    turned = weight.flip([2, 3]) if kernel != [1, 1] else weight
    return turned.reshape(groups, each, inputs, *kernel).permute(0, 2, 1, 3, 4).reshape(groups * inputs, each, *kernel)


def reverse_kernel(weight: Tensor) -> Tensor:
    """The kernel flipped by slices and a concatenation: XNNPACK has no flip."""
    outputs, inputs, height, width = weight.shape
    if height * width == 1:
        return weight
    flat = weight.reshape(outputs, inputs, height * width)
    return torch.cat([flat[:, :, n : n + 1] for n in reversed(range(height * width))], 2).view(weight.shape)


def input_gradient(
    gradient: Tensor, weight: Tensor, size: list[int], stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """The gradient of a convolution's input of `size` (height, width), for a trainable weight."""
    outputs, inputs, *kernel = weight.shape
    each = outputs // groups
    turned = reverse_kernel(weight).view(groups, each, inputs, *kernel).permute(0, 2, 1, 3, 4)
    turned = turned.reshape(groups * inputs, each, *kernel)
    wide = dilate(gradient, size, kernel, stride, padding, dilation)
    return convolve(wide, turned, [1, 1], [0, 0], dilation, groups)


def max_pool_gradient(gradient: Tensor, x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """The gradient goes to the first largest element of each window, as PyTorch's does."""
    taps = slice_windows(x, kernel, stride, padding, dilation, fill=-HUGE)
    largest = taps[0]
    for tap in taps[1:]:
        largest = torch.maximum(largest, tap)
    rows = gradient.permute(0, 2, 3, 1).contiguous()
    parts = []
    for tap in taps:
        first = 1.0 - torch.clamp((largest - tap) * HUGE, 0.0, 1.0)
        parts.append((rows * first).permute(0, 3, 1, 2).contiguous())
        rows = rows * (1.0 - first)
    return fold_windows(parts, list(x.shape[2:]), kernel, stride, padding, dilation)


def fold_windows(
    parts: list[Tensor], size: list[int], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Sum the contributions of each kernel position to the input: the reverse of `slice_windows`, channels second."""
    total: Tensor | None = None
    for n, part in enumerate(parts):
        batch, channels, height, width = part.shape
        offsets = [n // kernel[1] * dilation[0], n % kernel[1] * dilation[1]]
        if stride != [1, 1]:
            part = functional.pad(
                part.view(batch, channels, height, 1, width, 1), [0, stride[1] - 1, 0, 0, 0, stride[0] - 1]
            ).reshape(batch, channels, height * stride[0], width * stride[1])
        full = [s + 2 * p for s, p in zip(size, padding, strict=True)]
        keep = [min(have, f - o) for have, f, o in zip(part.shape[2:], full, offsets, strict=True)]
        part = part[:, :, : keep[0], : keep[1]]
        margins = [f - o - k for f, o, k in zip(full, offsets, keep, strict=True)]
        part = functional.pad(part, [offsets[1], margins[1], offsets[0], margins[0]])
        total = part if total is None else total + part
    assert total is not None
    return total[:, :, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]].contiguous()
