"""Operator lists of networks and language models with published measurements, as the engines run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgetune.profile.reference import dense, mobile
from edgetune.profile.reference.builder import Builder
from edgetune.program.operators import DType, Operator


@dataclass(frozen=True)
class Network:
    """A network, and the usual size of its input images in pixels."""

    build: Callable[[Builder], None]
    size: int = 224

    def __call__(self, size: int | None = None, dtype: DType = "fp32") -> tuple[Operator, ...]:
        """The operators of one run."""
        net = Builder(size or self.size, dtype)
        self.build(net)
        return tuple(net.operators)


NETWORKS = {
    "mobilenet-v1": Network(mobile.mobilenet_v1),
    "mobilenet-v2": Network(mobile.mobilenet_v2),
    "mobilenet-v3-large": Network(mobile.mobilenet_v3_large),
    "mobilenet-v3-small": Network(mobile.mobilenet_v3_small),
    "mnasnet": Network(mobile.mnasnet),
    "efficientnet-b0": Network(mobile.efficientnet_b0),
    "efficientnet-v2-s": Network(mobile.efficientnet_v2_s, 384),
    "resnet-18": Network(dense.resnet18),
    "resnet-50": Network(dense.resnet50),
    "wide-resnet-50": Network(dense.wide_resnet50),
    "vgg-16": Network(dense.vgg16),
    "squeezenet-1.0": Network(dense.squeezenet_1_0),
    "squeezenet-1.1": Network(dense.squeezenet_1_1),
    "googlenet": Network(dense.googlenet),
    "shufflenet-v2": Network(dense.shufflenet_v2),
}
