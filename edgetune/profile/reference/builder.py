"""Builds the operator list of a convolutional network as XNNPACK runs it: norms and ReLUs are folded.

Names, shapes and the rest are those that `edgetune.program.executed` reads from a program.
"""

from __future__ import annotations

from math import prod

from edgetune.program.operators import DType, Kind, Operator

_ELEMENT_BYTES: dict[DType, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "8da4w": 4}


class Builder:
    """Collects operators of a convolutional network. `size` and `channels` are those of the current tensor."""

    def __init__(self, size: int, dtype: DType) -> None:
        self.size, self.channels, self.dtype = size, 3, dtype
        self.bytes = _ELEMENT_BYTES[dtype]
        self.operators: list[Operator] = []

    @property
    def elements(self) -> int:
        """Of the current tensor."""
        return self.channels * self.size**2

    def add(
        self,
        name: str,
        kind: Kind,
        shape: tuple[int, ...],
        read: int,
        *,
        macs: int = 0,
        weights: int = 0,
        columns: int | None = None,
        groups: int = 1,
        window: int = 1,
    ) -> None:
        """One operator that reads `read` elements and writes `shape`; `weights` in elements, channels stand last."""
        self.operators.append(
            Operator(
                operator=f"xnnpack.{name}",
                module="",
                kind=kind,
                dtype=self.dtype,
                output_shape=shape,
                macs=macs,
                weight_bytes=weights * self.bytes,
                activation_bytes=(read + prod(shape)) * self.bytes,
                delegated=True,
                columns=shape[-1] if columns is None else columns,
                groups=groups,
                window=window,
            )
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the current tensor."""
        return (1, self.size, self.size, self.channels)

    def conv(self, out: int, kernel: int, stride: int = 1, *, padding: int | None = None) -> None:
        """A convolution with a bias; by default padded to keep the size."""
        read, inner = self.elements, self.channels
        self._slide(kernel, stride, kernel // 2 if padding is None else padding)
        self.channels = out
        kind: Kind = "pointwise-conv" if kernel == 1 else "conv"
        weights = out * inner * kernel**2
        self.add(
            "conv2d", kind, self.shape, read, macs=weights * self.size**2, weights=weights + out, window=kernel**2
        )  # fmt: skip

    def depthwise(self, kernel: int, stride: int = 1) -> None:
        """A padded depthwise convolution."""
        read, weights = self.elements, self.channels * kernel**2
        self._slide(kernel, stride, kernel // 2)
        self.add(
            "depthwise-conv2d", "depthwise-conv", self.shape, read,
            macs=weights * self.size**2, weights=weights + self.channels, window=kernel**2,
        )  # fmt: skip

    def _slide(self, kernel: int, stride: int, padding: int) -> None:
        self.size = (self.size + 2 * padding - kernel) // stride + 1

    def unary(self, name: str) -> None:
        """An activation that is not folded."""
        self.add(name, "elementwise", self.shape, self.elements)

    def residual(self) -> None:
        """Addition of the shortcut."""
        self.add("add", "elementwise", self.shape, 2 * self.elements)

    def pool(self, kernel: int, stride: int, padding: int = 0, *, ceil: bool = False) -> None:
        """Max pooling."""
        read, span = self.elements, self.size + 2 * padding - kernel
        self.size = (-(-span // stride) if ceil else span // stride) + 1
        self.add("max-pooling2d", "pooling", self.shape, read, window=kernel**2)

    def gather(self, channels: int) -> None:
        """Concatenation of branches into so many channels."""
        self.channels = channels
        self.add("concatenate", "data-movement", self.shape, self.elements)

    def shuffle(self) -> None:
        """Interleave the channels of two branches, by a transpose."""
        self.add("static-transpose", "data-movement", self.shape, self.elements, columns=1)

    def squeeze(self, inner: int, *, silu: bool) -> None:
        """Squeeze and excitation: pooled, two small layers, a gate, and the product with the tensor."""
        channels, size = self.channels, self.size
        self.mean()
        self.conv(inner, 1)
        if silu:
            self.silu()
        self.conv(channels, 1)
        self.unary("sigmoid")
        self.size = size
        self.add("multiply", "elementwise", self.shape, self.elements + channels)

    def silu(self) -> None:
        """x * sigmoid(x), as two operators."""
        self.unary("sigmoid")
        self.add("multiply", "elementwise", self.shape, 2 * self.elements)

    def mean(self) -> None:
        """Global average pooling."""
        read, window = self.elements, self.size**2
        self.size = 1
        self.add("global-avg-pooling2d", "reduction", self.shape, read, window=window)

    def linear(self, out: int, act: str = "") -> None:
        """A fully connected layer on one row."""
        inner = self.elements
        self.add("fully-connected", "linear", (1, out), inner, macs=inner * out, weights=inner * out + out)
        self.channels, self.size = out, 1
        if act:
            self.unary(act)

    def head(self, classes: int = 1000) -> None:
        """Global average pooling and the classifier."""
        self.mean()
        self.linear(classes)
