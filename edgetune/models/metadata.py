"""Metadata for a model's program: its preprocessing, and the names of the classes."""

from __future__ import annotations

from typing import Any

from edgetune.core.errors import EdgetuneError
from edgetune.data.dataset import Dataset
from edgetune.models.loaded import LoadedModel
from edgetune.models.preprocessing import text_preprocessing
from edgetune.models.text import TextEncoder
from edgetune.models.vision import ImageEncoder
from edgetune.program.carried import Carried, ImagePreprocessing, TextPreprocessing


def describe_io(loaded: LoadedModel, dataset: Dataset, recipe: str = "") -> Carried:
    """The metadata in the manifest of a program made from this model, for an app to use.

    A tokenizer or an encoder that cannot be described is named in `notes`, and left out.
    """
    dataset = loaded.relabel(dataset)
    preprocessing, note = _preprocessing(loaded, dataset)
    return Carried(
        model=loaded.name,
        data=dataset.name,
        task=dataset.task.name,
        recipe=recipe,
        licence=loaded.licence,
        preprocessing=preprocessing,
        postprocessing=dataset.task.postprocessing(),
        labels=dataset.classes,
        notes=tuple(dict.fromkeys((*loaded.notes, *dataset.notes, *note))),
    )


def _preprocessing(
    loaded: LoadedModel, dataset: Dataset
) -> tuple[ImagePreprocessing | TextPreprocessing | None, list[str]]:
    encode = loaded.encode
    if isinstance(encode, ImageEncoder):
        return _image_preprocessing(encode, dataset.train.inputs), []
    if not isinstance(encode, TextEncoder):
        return None, ["preprocessing is not part of the program: its encoder is the user's own"]
    try:
        return text_preprocessing(encode.tokenizer, encode.max_length, ending=encode.ending), []
    except EdgetuneError as error:
        return None, [f"preprocessing is not part of the program: {error.what}"]


def _image_preprocessing(encode: ImageEncoder, inputs: Any) -> ImagePreprocessing:
    """Image files are cropped and resized as bytes; arrays are stretched as floats."""
    shape = getattr(inputs, "shape", None)
    return ImagePreprocessing(
        size_px=encode.image_px,
        color="grey" if len(encode.mean) == 1 or (shape is not None and len(shape) == 3) else "rgb",
        crop="center" if shape is None or shape[1] == shape[2] else "none",
        rounded=shape is None,
        mean=encode.mean,
        std=encode.std,
    )
