"""Images as arrays of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from edgetune.data.dataset import data_error


def load_pixels(inputs: Sequence[Any], image_px: int, grey: bool = False) -> NDArray[np.uint8]:
    """Image files as one array `(rows, image_px, image_px, 3)` of bytes, RGB; without the last axis for `grey`.

    An image that is not square is resized to cover one, and cropped to the centre.
    """
    from PIL import Image, ImageOps

    mode = "L" if grey else "RGB"
    out = np.empty((len(inputs), image_px, image_px, *(() if grey else (3,))), dtype=np.uint8)
    for row, path in enumerate(inputs):
        with Image.open(path) as image:
            if reason := depth_problem(image):
                raise data_error(f"{path}: {reason}")
            image.draft("RGB", (image_px, image_px))  # a JPEG at a fraction of its size, never below this one
            upright = ImageOps.exif_transpose(image).convert(mode)
        out[row] = np.asarray(ImageOps.fit(upright, (image_px, image_px), Image.Resampling.BILINEAR))
    return out


def luma(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey values `(rows, height, width)` of RGB `(rows, height, width, 3)`, as in Pillow's mode L (ITU-R 601-2)."""
    weighted = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], dtype=np.uint32)
    return ((weighted + 0x8000) >> 16).astype(np.uint8)


def grey_pixels(inputs: Sequence[Any], image_px: int) -> NDArray[np.float32]:
    """Images as one array `(rows, image_px, image_px)` of grey values from 0 to 255."""
    array = inputs if isinstance(inputs, np.ndarray) else load_pixels(inputs, image_px)
    grey = torch.from_numpy(array.astype(np.float32))
    grey = (grey.mean(dim=3) if grey.dim() == 4 else grey)[:, None]
    if grey.shape[2:] != (image_px, image_px):
        grey = F.interpolate(grey, size=(image_px, image_px), mode="bilinear", antialias=True)
    squares: NDArray[np.float32] = grey[:, 0].numpy()
    return squares


def depth_problem(image: Any) -> str:
    """The problem with more than 8 bits per channel, which Pillow would turn white or black; empty for 8."""
    bits = 16 if image.mode.startswith("I;") else 32 if image.mode in ("I", "F") else 8
    return f"it has {bits} bits per channel, but only 8 are supported: save it with 8" if bits > 8 else ""
