"""Operator lists of networks made of depthwise convolutions, as published and as XNNPACK runs them."""

from __future__ import annotations

from edgetune.profile.reference.builder import Builder

# expansion, output channels, repeats, first stride, kernel
Stage = tuple[int, int, int, int, int]


def _divisible(value: float) -> int:
    """To a multiple of 8, never below 90 %: the rounding of the MobileNet family."""
    near = max(8, int(value + 4) // 8 * 8)
    return near + 8 if near < 0.9 * value else near


def _inverted_residuals(net: Builder, stages: tuple[Stage, ...], *, efficient: bool = False) -> None:
    """Inverted residual blocks: expand, depthwise, project; with ReLU6, which is folded.

    `efficient`: those of EfficientNet, with SiLU, and squeezed to a quarter of the block's input.
    """
    for expand, out, repeats, first_stride, kernel in stages:
        for number in range(repeats):
            stride, came_in = (first_stride if number == 0 else 1), net.channels
            if expand > 1:
                net.conv(came_in * expand, 1)
                if efficient:
                    net.silu()
            net.depthwise(kernel, stride)
            if efficient:
                net.silu()
                net.squeeze(came_in // 4, silu=True)
            net.conv(out, 1)
            if stride == 1 and came_in == out:
                net.residual()


def mobilenet_v1(net: Builder) -> None:
    """MobileNet 1.0 (Howard et al. 2017, table 1)."""
    net.conv(32, 3, 2)
    for out, stride in (
        (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1),
    ):  # fmt: skip
        net.depthwise(3, stride)
        net.conv(out, 1)
    net.head()


def mobilenet_v2(net: Builder) -> None:
    """MobileNetV2 1.0 (Sandler et al. 2018, table 2)."""
    net.conv(32, 3, 2)
    _inverted_residuals(
        net,
        ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3), (6, 160, 3, 2, 3),
         (6, 320, 1, 1, 3)),
    )  # fmt: skip
    net.conv(1280, 1)
    net.head()


def mnasnet(net: Builder) -> None:
    """MnasNet-B1 1.0 (Tan et al. 2019, without squeeze and excitation)."""
    net.conv(32, 3, 2)
    net.depthwise(3)
    net.conv(16, 1)
    _inverted_residuals(
        net,
        ((3, 24, 3, 2, 3), (3, 40, 3, 2, 5), (6, 80, 3, 2, 5), (6, 96, 2, 1, 3), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
    )
    net.conv(1280, 1)
    net.head()


# kernel, expanded channels, output channels, squeeze, hard swish, stride: Howard et al. 2019, tables 1 and 2
_V3_LARGE = (
    (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1),
    (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1),
    (3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2), (5, 960, 160, 1, 1, 1),
    (5, 960, 160, 1, 1, 1),
)  # fmt: skip
_V3_SMALL = (
    (3, 16, 16, 1, 0, 2), (3, 72, 24, 0, 0, 2), (3, 88, 24, 0, 0, 1), (5, 96, 40, 1, 1, 2), (5, 240, 40, 1, 1, 1),
    (5, 240, 40, 1, 1, 1), (5, 120, 48, 1, 1, 1), (5, 144, 48, 1, 1, 1), (5, 288, 96, 1, 1, 2), (5, 576, 96, 1, 1, 1),
    (5, 576, 96, 1, 1, 1),
)  # fmt: skip


def _v3(net: Builder, blocks: tuple[tuple[int, ...], ...], last: int, hidden: int) -> None:
    net.conv(16, 3, 2)
    net.unary("hardswish")
    for kernel, expanded, out, squeezed, hard, stride in blocks:
        shortcut = stride == 1 and net.channels == out
        if expanded != net.channels:
            net.conv(expanded, 1)
            if hard:
                net.unary("hardswish")
        net.depthwise(kernel, stride)
        if hard:
            net.unary("hardswish")
        if squeezed:
            net.squeeze(_divisible(expanded / 4), silu=False)
        net.conv(out, 1)
        if shortcut:
            net.residual()
    net.conv(last, 1)
    net.unary("hardswish")
    net.mean()
    net.linear(hidden, "hardswish")
    net.linear(1000)


def mobilenet_v3_large(net: Builder) -> None:
    """MobileNetV3 large 1.0 (Howard et al. 2019, table 1)."""
    _v3(net, _V3_LARGE, 960, 1280)


def mobilenet_v3_small(net: Builder) -> None:
    """MobileNetV3 small 1.0 (Howard et al. 2019, table 2)."""
    _v3(net, _V3_SMALL, 576, 1024)


def efficientnet_b0(net: Builder) -> None:
    """EfficientNet-B0 (Tan and Le 2019, table 1)."""
    net.conv(32, 3, 2)
    net.silu()
    _inverted_residuals(
        net,
        ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
         (6, 320, 1, 1, 3)),
        efficient=True,
    )  # fmt: skip
    net.conv(1280, 1)
    net.silu()
    net.head()


def efficientnet_v2_s(net: Builder) -> None:
    """EfficientNetV2-S (Tan and Le 2021, table 4), at its evaluation size of 384 pixels."""
    net.conv(24, 3, 2)
    net.silu()
    for expand, out, repeats, first_stride in ((1, 24, 2, 1), (4, 48, 4, 2), (4, 64, 4, 2)):
        for number in range(repeats):
            stride, came_in = (first_stride if number == 0 else 1), net.channels
            if expand > 1:
                net.conv(came_in * expand, 3, stride)
                net.silu()
                net.conv(out, 1)
            else:
                net.conv(out, 3, stride)
                net.silu()
            if stride == 1 and came_in == out:
                net.residual()
    _inverted_residuals(net, ((4, 128, 6, 2, 3), (6, 160, 9, 1, 3), (6, 256, 15, 2, 3)), efficient=True)
    net.conv(1280, 1)
    net.silu()
    net.head()
