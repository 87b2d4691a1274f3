"""Training pictures changed at random each time they are seen: mirrored, cropped, in other colours."""

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

_SHIFT = 0.125  # of a picture's width, that a crop moves by at most
_STRENGTH = 0.3  # of brightness and contrast


@dataclass(frozen=True)
class Augmented:
    """An encoder of pictures whose results are changed by `kinds`, each picture by itself.

    "flip" mirrors every second picture, "crop" moves each by up to an eighth of its width and fills what is missing by
    reflection, "colour" changes brightness and contrast by up to 0.3. Uses torch's random generator.
    """

    encode: Encode
    kinds: tuple[str, ...]

    def __call__(self, inputs: Sequence[Any], pad_to: int | None = None) -> Inputs:
        """The pictures as tensors `(batch, channels, height, width)`."""
        pictures = self.encode(inputs, pad_to)
        if not isinstance(pictures, Tensor) or pictures.dim() != 4:
            raise data_error("data.augment changes images, but this encoder does not return images", got=type(pictures))
        if "flip" in self.kinds:
            mirrored = torch.rand(len(pictures)) < 0.5
            pictures = torch.where(mirrored.view(-1, 1, 1, 1), pictures.flip(3), pictures)
        if "crop" in self.kinds:
            pictures = _crop_randomly(pictures)
        if "colour" in self.kinds:
            contrast, brightness = 1 + _STRENGTH * (2 * torch.rand(2, len(pictures), 1, 1, 1) - 1)
            mean = pictures.mean((1, 2, 3), keepdim=True)
            pictures = (pictures - mean) * contrast + mean + (brightness - 1) * pictures.std()
        return pictures


def _crop_randomly(pictures: Tensor) -> Tensor:
    height, width = pictures.shape[2:]
    most = max(1, round(_SHIFT * min(height, width)))
    wide = F.pad(pictures, (most,) * 4, mode="reflect")
    places = torch.randint(0, 2 * most + 1, (len(pictures), 2)).tolist()
    return torch.stack(
        [picture[:, y : y + height, x : x + width] for picture, (y, x) in zip(wide, places, strict=True)]
    )
