"""Convolution and pooling in three dims, by images: the kernels of the runtime and of XNNPACK have at most two.

A volume `(batch, channels, depth, rows, columns)` is a stack of images. The images that a window covers in depth become
further input channels of a convolution, or further operands of a maximum or a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgetune.capture.repairs.shapes import Repaired, is_fixed


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Repaired:
    """A convolution of images whose channels are those of all depths that the window covers."""
    if x.dim() != 5 or not is_fixed(x, weight):
        return NotImplemented
    stride, padding, dilation = _three(stride), _three(padding), _three(dilation)
    deep, edge, step = weight.shape[2], padding[0], dilation[0]
    frames = F.pad(x, [0, 0, 0, 0, edge, edge]) if edge else x
    count = (frames.shape[2] - step * (deep - 1) - 1) // stride[0] + 1
    images = _side_by_side(frames, [k * step for k in range(deep)], count, stride[0], groups)
    flat = weight.transpose(1, 2).reshape(weight.shape[0], -1, *weight.shape[3:])
    return _volume(F.conv2d(images, flat, bias, stride[1:], padding[1:], dilation[1:], groups), count)


def conv3d_padded(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: str = "valid",
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Repaired:
    """The same with its padding by name."""
    if x.dim() != 5 or not is_fixed(x, weight):
        return NotImplemented
    dilation = _three(dilation)
    if padding == "same":
        whole = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        x = F.pad(x, [side for total in reversed(whole) for side in (total // 2, total - total // 2)])
    return conv3d(x, weight, bias, stride, (0,), dilation, groups)


def conv_transpose3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    dilation: Sequence[int] = (1,),
) -> Repaired:
    """A transposed convolution of images: in depth, zeros between them and the window turned round."""
    if x.dim() != 5 or not is_fixed(x, weight):
        return NotImplemented
    stride, padding, dilation = _three(stride), _three(padding), _three(dilation)
    more = _three(output_padding)
    deep, step = weight.shape[2], dilation[0]
    if stride[0] > 1:
        spread = F.pad(x.unsqueeze(3), [0, 0, 0, 0, 0, stride[0] - 1])
        spread = spread.reshape(*x.shape[:2], -1, *x.shape[3:])
        x = spread.narrow(2, 0, (x.shape[2] - 1) * stride[0] + 1)
    edge = step * (deep - 1) - padding[0]
    frames = F.pad(x, [0, 0, 0, 0, edge, edge + more[0]])  # a negative one cuts
    count = frames.shape[2] - step * (deep - 1)
    images = _side_by_side(frames, [k * step for k in reversed(range(deep))], count, 1, groups)
    wide = weight.shape[1]
    flat = weight.reshape(groups, -1, wide, deep, prod(weight.shape[3:])).permute(0, 3, 1, 2, 4)
    flat = flat.reshape(weight.shape[0] * deep, wide, *weight.shape[3:])
    made = F.conv_transpose2d(images, flat, bias, stride[1:], padding[1:], more[1:], groups, dilation[1:])
    return _volume(made, count)


def average(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Repaired:
    """Sums of windows in depth of averages of images, by how many places each window counts."""
    if x.dim() != 5 or not is_fixed(x):
        return NotImplemented
    kernel, step, edge = _three(kernel_size), _three(stride or kernel_size), _three(padding)
    sides, counts = [], []
    for size, k, s, p in zip(x.shape[2:], kernel, step, edge, strict=True):
        count = _windows(size, k, s, p, ceil_mode)
        sides.append((p, max(0, (count - 1) * s + k - size - p)))
        ends = [(start, min(start + k, size + p)) for start in range(-p, (count - 1) * s - p + 1, s)]
        counts.append([e - b if count_include_pad else min(e, size) - max(b, 0) for b, e in ends])
    if any(before or after for before, after in sides):
        x = F.pad(x, [side for pair in reversed(sides) for side in pair])
    taps = _taps(x, kernel[0], step[0], len(counts[0]))
    total = taps[0]
    for tap in taps[1:]:
        total = total + tap
    images = total.transpose(1, 2).reshape(-1, x.shape[1], *x.shape[3:])
    means = _volume(F.avg_pool2d(images, kernel[1:], step[1:]), len(counts[0]))
    means = means[..., : len(counts[1]), : len(counts[2])]
    area = kernel[1] * kernel[2]
    if divisor_override is not None:
        return means * (area / divisor_override)
    for dim, counted in zip((2, 3, 4), counts, strict=True):
        whole = 1 if dim == 2 else kernel[dim - 2]
        if len(set(counted)) == 1:
            means = means * (whole / counted[0]) if whole != counted[0] else means
        else:
            form = [1, 1, 1, 1, 1]
            form[dim] = len(counted)
            shares = [x.new_full((len(list(run)),), whole / n) for n, run in groupby(counted)]
            means = means * torch.cat(shares).reshape(form)
    return means


def largest(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Repaired:
    """The largest in depth of the largest of images."""
    if x.dim() != 5 or not is_fixed(x) or not x.dtype.is_floating_point:
        return NotImplemented
    kernel, step, edge, apart = (_three(v) for v in (kernel_size, stride or kernel_size, padding, dilation))
    images = x.transpose(1, 2).reshape(-1, x.shape[1], *x.shape[3:])
    pooled = _volume(F.max_pool2d(images, kernel[1:], step[1:], edge[1:], apart[1:], ceil_mode), x.shape[2])
    covered = apart[0] * (kernel[0] - 1) + 1
    count = _windows(x.shape[2], covered, step[0], edge[0], ceil_mode)
    after = max(0, (count - 1) * step[0] + covered - x.shape[2] - edge[0])
    if edge[0] or after:
        pooled = F.pad(pooled, [0, 0, 0, 0, edge[0], after], value=torch.finfo(x.dtype).min)
    result, *rest = _taps(pooled, kernel[0], step[0], count, apart[0])
    for tap in rest:
        result = torch.maximum(result, tap)
    return result


def _three(value: Sequence[int]) -> list[int]:
    return [value[0]] * 3 if len(value) == 1 else list(value)


def _windows(size: int, kernel: int, step: int, edge: int, ceil_mode: bool) -> int:
    """How many windows torch makes of a dim; with `ceil_mode` none begins behind the last place."""
    free = size + 2 * edge - kernel
    count = (-(-free // step) if ceil_mode else free // step) + 1
    return count - 1 if ceil_mode and (count - 1) * step >= size + edge else count


def _taps(x: Tensor, kernel: int, step: int, count: int, apart: int = 1) -> list[Tensor]:
    """For each depth of a window, the values there in every window."""
    return [x[:, :, k * apart : k * apart + (count - 1) * step + 1 : step] for k in range(kernel)]


def _side_by_side(x: Tensor, starts: list[int], count: int, step: int, groups: int) -> Tensor:
    """`count` images a volume, each with the channels of the depths at `starts`, those of a group together."""
    frames = x.transpose(1, 2)
    taps = [frames[:, start : start + (count - 1) * step + 1 : step] for start in starts]
    if groups == 1 or len(taps) == 1:
        return torch.cat(taps, 2).reshape(-1, len(taps) * x.shape[1], *x.shape[3:])
    parts = torch.cat(taps, 2).reshape(-1, len(taps), groups, x.shape[1] // groups * prod(x.shape[3:]))
    return parts.transpose(1, 2).reshape(-1, len(taps) * x.shape[1], *x.shape[3:])


def _volume(images: Tensor, count: int) -> Tensor:
    """Pictures as volumes of so many each."""
    return images.reshape(-1, count, *images.shape[1:]).transpose(1, 2)


_ATEN = torch.ops.aten
REPAIRS: dict[Any, Any] = {
    _ATEN.conv3d.default: conv3d,
    _ATEN.conv3d.padding: conv3d_padded,
    _ATEN.conv_transpose3d.input: conv_transpose3d,
    _ATEN.avg_pool3d.default: average,
    _ATEN.max_pool3d.default: largest,
}
