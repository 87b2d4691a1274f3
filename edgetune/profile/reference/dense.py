"""Operator lists of networks made of dense convolutions, as published and as XNNPACK runs them."""

from __future__ import annotations

from edgetune.profile.reference.builder import Builder


def _stem(net: Builder) -> None:
    net.conv(64, 7, 2)
    net.pool(3, 2, 1)


def _shortcut(net: Builder, came_in: int, came_size: int, out: int, stride: int) -> None:
    """The projection of the shortcut, and the addition."""
    if came_in != out or stride > 1:
        net.channels, net.size = came_in, came_size
        net.conv(out, 1, stride)
    net.residual()


def resnet18(net: Builder) -> None:
    """ResNet-18 (He et al. 2016, table 1)."""
    _stem(net)
    for width, first_stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for number in range(2):
            stride, came_in, came_size = (first_stride if number == 0 else 1), net.channels, net.size
            net.conv(width, 3, stride)
            net.conv(width, 3)
            _shortcut(net, came_in, came_size, width, stride)
    net.head()


def resnet50(net: Builder, width_factor: int = 1) -> None:
    """ResNet-50 v1.5 (He et al. 2016, stride on the 3x3)."""
    _stem(net)
    for width, repeats, first_stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(repeats):
            stride, came_in, came_size = (first_stride if number == 0 else 1), net.channels, net.size
            net.conv(width * width_factor, 1)
            net.conv(width * width_factor, 3, stride)
            net.conv(4 * width, 1)
            _shortcut(net, came_in, came_size, 4 * width, stride)
    net.head()


def wide_resnet50(net: Builder) -> None:
    """Wide ResNet-50-2 (Zagoruyko and Komodakis 2016): inner layers twice as wide."""
    resnet50(net, 2)


def vgg16(net: Builder) -> None:
    """VGG-16 (Simonyan and Zisserman 2015, configuration D)."""
    for width, layers in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(layers):
            net.conv(width, 3)
        net.pool(2, 2)
    net.linear(4096)
    net.linear(4096)
    net.linear(1000)


def _fire(net: Builder, squeeze: int, expand: int) -> None:
    net.conv(squeeze, 1)
    net.conv(expand, 1)
    net.channels = squeeze
    net.conv(expand, 3)
    net.gather(2 * expand)


def _squeezenet(net: Builder, pools: tuple[int, ...]) -> None:
    """Eight fire modules, a pooling before those numbered; the last convolution is the classifier."""
    for number, (squeeze, expand) in enumerate(
        ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
    ):
        if number in pools:
            net.pool(3, 2, ceil=True)
        _fire(net, squeeze, expand)
    net.conv(1000, 1)
    net.mean()


def squeezenet_1_0(net: Builder) -> None:
    """SqueezeNet 1.0 (Iandola et al. 2016, table 1)."""
    net.conv(96, 7, 2, padding=0)
    _squeezenet(net, (0, 3, 7))


def squeezenet_1_1(net: Builder) -> None:
    """SqueezeNet 1.1 (the authors' repository, v1.1)."""
    net.conv(64, 3, 2, padding=0)
    _squeezenet(net, (0, 2, 4))


def googlenet(net: Builder) -> None:
    """GoogLeNet (Szegedy et al. 2015, table 1), with 3x3 in place of 5x5 as torchvision has it; no auxiliary heads."""
    net.conv(64, 7, 2)
    net.pool(3, 2, ceil=True)
    net.conv(64, 1)
    net.conv(192, 3)
    net.pool(3, 2, ceil=True)
    for one, three_in, three, five_in, five, pooled in (
        (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), (0,) * 6,
        (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128), (0,) * 6,
        (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
    ):  # fmt: skip
        if one == 0:
            net.pool(3 if net.size > 14 else 2, 2, ceil=True)
            continue
        came_in = net.channels
        net.conv(one, 1)
        for inner, out in ((three_in, three), (five_in, five)):
            net.channels = came_in
            net.conv(inner, 1)
            net.conv(out, 3)
        net.channels = came_in
        net.pool(3, 1, 1)
        net.conv(pooled, 1)
        net.gather(one + three + five + pooled)
    net.head()


def shufflenet_v2(net: Builder) -> None:
    """ShuffleNetV2 1.0x (Ma et al. 2018, table 5); a channel shuffle is one movement of the whole tensor."""
    net.conv(24, 3, 2)
    net.pool(3, 2, 1)
    for out, repeats in ((116, 4), (232, 8), (464, 4)):
        for number in range(repeats):
            came_in, came_size, half = net.channels, net.size, out // 2
            if number == 0:
                net.depthwise(3, 2)
                net.conv(half, 1)
                net.channels, net.size = came_in, came_size
            else:
                net.channels = half
            net.conv(half, 1)
            net.depthwise(3, 2 if number == 0 else 1)
            net.conv(half, 1)
            net.gather(out)
            net.shuffle()
    net.conv(1024, 1)
    net.head()
