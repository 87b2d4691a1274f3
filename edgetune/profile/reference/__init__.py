"""Operator lists of networks and language models that others published measurements of, as the engines run them."""

from __future__ import annotations

from typing import Protocol

from edgetune.profile.reference.dense import (
    googlenet,
    resnet18,
    resnet50,
    shufflenet_v2,
    squeezenet_1_0,
    squeezenet_1_1,
    vgg16,
    wide_resnet50,
)
from edgetune.profile.reference.mobile import (
    efficientnet_b0,
    efficientnet_v2_s,
    mnasnet,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3_large,
    mobilenet_v3_small,
)
from edgetune.program.operators import DType, Operator


class Network(Protocol):
    """A function from the size of the image in pixels and the type to the operators."""

    def __call__(self, *, dtype: DType) -> tuple[Operator, ...]:
        """The operators at the network's usual size."""
        ...


NETWORKS: dict[str, Network] = {
    "mobilenet-v1": mobilenet_v1,
    "mobilenet-v2": mobilenet_v2,
    "mobilenet-v3-large": mobilenet_v3_large,
    "mobilenet-v3-small": mobilenet_v3_small,
    "mnasnet": mnasnet,
    "efficientnet-b0": efficientnet_b0,
    "efficientnet-v2-s": efficientnet_v2_s,
    "resnet-18": resnet18,
    "resnet-50": resnet50,
    "wide-resnet-50": wide_resnet50,
    "vgg-16": vgg16,
    "squeezenet-1.0": squeezenet_1_0,
    "squeezenet-1.1": squeezenet_1_1,
    "googlenet": googlenet,
    "shufflenet-v2": shufflenet_v2,
}

__all__ = ["NETWORKS", "Network", "mobilenet_v2", "resnet50"]
