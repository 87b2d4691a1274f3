"""Convolutions and pooling whose operands change, in operators that XNNPACK takes: windows by slices, then products.

XNNPACK packs a convolution's weight once, so one that trains is written as a product of its windows. Pictures are
`(batch, channels, height, width)`, as everywhere; inside, channels come last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Pair = list[int]
_HUGE = 3.0e38


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Windows along one side."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def windows(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, fill: float = 0.0) -> list[Tensor]:
    """For each place in the kernel, what lies there under every window: `(batch, height, width, channels)` each."""
    sides = [out_size(n, *a) for n, *a in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)]  # type: ignore[misc]
    x = x.permute(0, 2, 3, 1)
    # to where the last window ends, and on to whole strides
    ends = [(o - 1) * s + d * (k - 1) + 1 for o, s, k, d in zip(sides, stride, kernel, dilation, strict=True)]
    ends = [-(-e // s) * s for e, s in zip(ends, stride, strict=True)]
    rests = [e - n - p for e, n, p in zip(ends, x.shape[1:3], padding, strict=True)]
    pad = [0, 0, padding[1], max(rests[1], 0), padding[0], max(rests[0], 0)]
    x = functional.pad(x, pad, value=fill) if any(pad) else x
    x = x[:, : ends[0], : ends[1]]
    phases = _phases(x.contiguous(), stride)
    found = []
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            (py, oy), (px, ox) = ((n * d % s, n * d // s) for n, d, s in zip((i, j), dilation, stride, strict=True))
            found.append(phases[py][px][:, oy : oy + sides[0], ox : ox + sides[1]])
    return found


def _phases(x: Tensor, stride: Pair) -> list[list[Tensor]]:
    """Every stride-th row and column, by where they begin."""
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


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of two matrices, as a batch of one."""
    return torch.bmm(left.contiguous().unsqueeze(0), right.contiguous().unsqueeze(0)).squeeze(0)


def convolution(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Tensor:
    """As `torch.conv2d`, without a bias."""
    outputs, inputs, *kernel = weight.shape
    taps = windows(x, kernel, stride, padding, dilation)
    batch, height, width, channels = taps[0].shape
    count = len(taps)
    if _is_depthwise(weight.shape, groups):
        rows = weight.reshape(outputs, count).permute(1, 0).contiguous()
        total = taps[0] * rows[0:1]
        for n in range(1, count):
            total = total + taps[n] * rows[n : n + 1]
        return total.permute(0, 3, 1, 2).contiguous()
    places = batch * height * width
    if groups == 1:
        columns = (torch.cat(taps, -1) if count > 1 else taps[0]).reshape(places, count * channels)
        matrix = weight.permute(2, 3, 1, 0).reshape(count * inputs, outputs)
        flat = product(columns, matrix)
    else:
        each = outputs // groups
        matrix = weight.view(groups, each, inputs, count).permute(0, 3, 2, 1).reshape(groups, count * inputs, each)
        flat = torch.bmm(_grouped(taps, groups), matrix).permute(1, 0, 2).reshape(places, outputs)
    return flat.view(batch, height, width, outputs).permute(0, 3, 1, 2).contiguous()


def _grouped(taps: list[Tensor], groups: int) -> Tensor:
    """Columns of each group: `(groups, places, kernel places * channels of the group)`."""
    batch, height, width, channels = taps[0].shape
    places, count, each = batch * height * width, len(taps), channels // groups
    columns = (
        torch.cat([t.reshape(places, 1, channels) for t in taps], 1)
        if count > 1
        else taps[0].reshape(places, 1, channels)
    )
    return columns.view(places, count, groups, each).permute(2, 0, 1, 3).reshape(groups, places, count * each)


def weight_gradient(
    gradient: Tensor, x: Tensor, weight_shape: list[int], stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """The gradient of a convolution's weight, of the weight's shape."""
    outputs, inputs, *kernel = weight_shape
    taps = windows(x, kernel, stride, padding, dilation)
    batch, height, width, channels = taps[0].shape
    places, count = batch * height * width, len(taps)
    rows = gradient.permute(0, 2, 3, 1).reshape(places, outputs)
    if _is_depthwise(weight_shape, groups):
        each = [(tap.reshape(places, channels) * rows).sum(0, keepdim=True) for tap in taps]
        return (torch.cat(each, 0) if count > 1 else each[0]).permute(1, 0).reshape(weight_shape)
    if groups == 1:
        columns = (torch.cat(taps, -1) if count > 1 else taps[0]).reshape(places, count * channels)
        flat = product(rows.permute(1, 0), columns)  # (outputs, kernel places * inputs)
        return flat.view(outputs, *kernel, inputs).permute(0, 3, 1, 2).contiguous()
    each_out = outputs // groups
    mine = rows.view(places, groups, each_out).permute(1, 2, 0).contiguous()
    flat = torch.bmm(mine, _grouped(taps, groups))  # (groups, outputs of the group, kernel places * inputs)
    return flat.view(outputs, *kernel, inputs).permute(0, 3, 1, 2).contiguous()


def spread(gradient: Tensor, size: list[int], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """The output's gradient with zeros between (for the stride) and around: a plain convolution takes it back."""
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


def flipped(weight: Tensor, groups: int) -> Tensor:
    """The weight that takes an output's gradient back to the input: turned around, outputs and inputs exchanged."""
    outputs, inputs, *kernel = weight.shape
    each = outputs // groups
    turned = weight.flip([2, 3]) if kernel != [1, 1] else weight
    return turned.reshape(groups, each, inputs, *kernel).permute(0, 2, 1, 3, 4).reshape(groups * inputs, each, *kernel)


def reversed_kernel(weight: Tensor) -> Tensor:
    """The kernel turned around by slices and a concatenation: there is no flip on XNNPACK."""
    outputs, inputs, height, width = weight.shape
    if height * width == 1:
        return weight
    flat = weight.reshape(outputs, inputs, height * width)
    return torch.cat([flat[:, :, n : n + 1] for n in reversed(range(height * width))], 2).view(weight.shape)


def input_gradient(
    gradient: Tensor, weight: Tensor, size: list[int], stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """The gradient of a convolution's input of `size` (height, width), for a weight that changes."""
    outputs, inputs, *kernel = weight.shape
    each = outputs // groups
    turned = reversed_kernel(weight).view(groups, each, inputs, *kernel).permute(0, 2, 1, 3, 4)
    turned = turned.reshape(groups * inputs, each, *kernel)
    wide = spread(gradient, size, kernel, stride, padding, dilation)
    return convolution(wide, turned, [1, 1], [0, 0], dilation, groups)


def max_pool_gradient(gradient: Tensor, x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """The gradient goes to the first largest element of each window, as PyTorch's does."""
    taps = windows(x, kernel, stride, padding, dilation, fill=-_HUGE)
    largest = taps[0]
    for tap in taps[1:]:
        largest = torch.maximum(largest, tap)
    rows = gradient.permute(0, 2, 3, 1).contiguous()
    parts = []
    for tap in taps:
        first = 1.0 - torch.clamp((largest - tap) * _HUGE, 0.0, 1.0)
        parts.append((rows * first).permute(0, 3, 1, 2).contiguous())
        rows = rows * (1.0 - first)
    return folded(parts, list(x.shape[2:]), kernel, stride, padding, dilation)


def folded(parts: list[Tensor], size: list[int], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Add up what each place of the kernel gives to the input: the reverse of `windows`, channels second."""
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
        rests = [f - o - k for f, o, k in zip(full, offsets, keep, strict=True)]
        part = functional.pad(part, [offsets[1], rests[1], offsets[0], rests[0]])
        total = part if total is None else total + part
    assert total is not None
    return total[:, :, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]].contiguous()
