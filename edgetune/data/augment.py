"""Random changes to training images each time they are used: mirroring, cropping, brightness and contrast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgetune.core.inputs import Inputs
from edgetune.data.dataset import data_error
from edgetune.data.rows import Encode

_SHIFT = 0.125  # of a image's width, that a crop moves by at most
_STRENGTH = 0.3  # of brightness and contrast


@dataclass(frozen=True)
class Augmented:
    """An image encoder whose results are changed by `kinds`, each image independently.

    "flip" mirrors every second image, "crop" shifts each by up to an eighth of its width and fills the gap by
    reflection, "colour" changes brightness and contrast by up to 0.3. Uses torch's random generator.
    """

    encode: Encode
    kinds: tuple[str, ...]

    def __call__(self, inputs: Sequence[Any], pad_to: int | None = None) -> Inputs:
        """The images as tensors `(batch, channels, height, width)`."""
        images = self.encode(inputs, pad_to)
        if not isinstance(images, Tensor) or images.dim() != 4:
            raise data_error("data.augment changes images, but this encoder does not return images", got=type(images))
        if "flip" in self.kinds:
            mirrored = torch.rand(len(images)) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        if "crop" in self.kinds:
            images = _crop_randomly(images)
        if "colour" in self.kinds:
            contrast, brightness = 1 + _STRENGTH * (2 * torch.rand(2, len(images), 1, 1, 1) - 1)
            mean = images.mean((1, 2, 3), keepdim=True)
            images = (images - mean) * contrast + mean + (brightness - 1) * images.std()
        return images


def _crop_randomly(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    most = max(1, round(_SHIFT * min(height, width)))
    wide = F.pad(images, (most,) * 4, mode="reflect")
    places = torch.randint(0, 2 * most + 1, (len(images), 2)).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(wide, places, strict=True)])
