"""Operator lists of networks that others published latencies for, as XNNPACK runs them: norms and ReLUs folded."""

from __future__ import annotations

from edgetune.profile.operators import DType, Kind, Operator


class _Builder:
    """Counts operators of a convolutional network layer by layer. Sizes are of one image."""

    def __init__(self, size: int, dtype: DType) -> None:
        self.size, self.channels, self.dtype = size, 3, dtype
        self.bytes = 1 if dtype == "int8" else 4
        self.operators: list[Operator] = []

    def add(self, name: str, kind: Kind, shape: tuple[int, ...], macs: int, weights: int, read: int) -> None:
        """One delegated operator that reads `read` elements and writes its output."""
        written = 1
        for extent in shape:
            written *= extent
        self.operators.append(
            Operator(
                operator=name,
                module="",
                kind=kind,
                dtype=self.dtype,
                output_shape=shape,
                macs=macs,
                weight_bytes=weights * self.bytes,
                activation_bytes=(read + written) * self.bytes,
                delegated=True,
            )
        )

    def conv(self, out: int, kernel: int, stride: int = 1, *, depthwise: bool = False) -> None:
        """A convolution with padding to keep the size, up to its stride."""
        read = self.channels * self.size**2
        self.size = -(-self.size // stride)
        weights = out * kernel**2 * (1 if depthwise else self.channels)
        kind: Kind = "depthwise-conv" if depthwise else "pointwise-conv" if kernel == 1 else "conv"
        shape = (1, out, self.size, self.size)
        self.add("aten.convolution.default", kind, shape, weights * self.size**2, weights + out, read)
        self.channels = out

    def residual(self) -> None:
        """Addition of the shortcut."""
        shape = (1, self.channels, self.size, self.size)
        self.add("aten.add.Tensor", "elementwise", shape, 0, 0, 2 * self.channels * self.size**2)

    def head(self, classes: int) -> None:
        """Global average pooling and the classifier."""
        self.add("aten.mean.dim", "reduction", (1, self.channels), 0, 0, self.channels * self.size**2)
        weights = self.channels * classes
        self.add("aten.linear.default", "linear", (1, classes), weights, weights + classes, self.channels)


def mobilenet_v2(size: int = 224, dtype: DType = "fp32") -> tuple[Operator, ...]:
    """MobileNetV2 1.0 (Sandler et al. 2018, table 2): 0.30 G multiply-accumulates, 3.5 M parameters."""
    net = _Builder(size, dtype)
    net.conv(32, 3, 2)
    for expand, out, repeats, first_stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for number in range(repeats):
            stride = first_stride if number == 0 else 1
            shortcut = stride == 1 and net.channels == out
            if expand > 1:
                net.conv(net.channels * expand, 1)
            net.conv(net.channels, 3, stride, depthwise=True)
            net.conv(out, 1)
            if shortcut:
                net.residual()
    net.conv(1280, 1)
    net.head(1000)
    return tuple(net.operators)


def resnet50(size: int = 224, dtype: DType = "fp32") -> tuple[Operator, ...]:
    """ResNet-50 v1.5 (He et al. 2016, stride on the 3x3): 4.1 G multiply-accumulates, 25.6 M parameters."""
    net = _Builder(size, dtype)
    net.conv(64, 7, 2)
    read = 64 * net.size**2
    net.size //= 2
    net.add("aten.max_pool2d.default", "pooling", (1, 64, net.size, net.size), 0, 0, read)
    for width, repeats, first_stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(repeats):
            stride = first_stride if number == 0 else 1
            came_in, came_size = net.channels, net.size
            net.conv(width, 1)
            net.conv(width, 3, stride)
            net.conv(4 * width, 1)
            if number == 0:
                net.channels, net.size = came_in, came_size
                net.conv(4 * width, 1, stride)
            net.residual()
    net.head(1000)
    return tuple(net.operators)


NETWORKS = {"mobilenet-v2": mobilenet_v2, "resnet-50": resnet50}
