"""Images: Fashion-MNIST, and the user's own folders with one subfolder for each class."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.core.errors import EdgetuneError
from edgetune.core.other_names import nearest_file
from edgetune.core.registry import require
from edgetune.data.dataset import BadRows, Dataset, assemble, cache_folder, complete_parts, data_error
from edgetune.data.pixels import depth_problem
from edgetune.data.rows import Rows
from edgetune.data.settings import DataSettings
from edgetune.tasks.image_classification import ImageClassification

_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_PARTS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}


def fashion_mnist(argument: str, settings: DataSettings) -> Dataset:
    """70,000 greyscale images of clothes, 28 x 28 pixels, ten classes; the official 10,000 test images.

    `fashion-mnist:folder` reads the four `*-ubyte.gz` files from there; else they are searched for in the folder of
    EDGETUNE_DATA, in `fashion-mnist` of the cache folder, and in the folder of Debian's package.
    """
    folder = _fashion_folder(argument)
    train = Rows(*_idx_pair(folder, "train", 60_000))
    test = Rows(*_idx_pair(folder, "t10k", 10_000))
    keys = [hashlib.sha256(image.tobytes()).hexdigest() for image in np.asarray(train.inputs)]
    shared = len({hashlib.sha256(image.tobytes()).hexdigest() for image in np.asarray(test.inputs)} & set(keys))
    copies = (f"{shared:,} test images are also among the training rows",) if shared else ()
    notes = ("the official test set", *copies)
    parts = complete_parts(keys, train, settings, test=test)
    return assemble("fashion-mnist", ImageClassification(_FASHION_CLASSES), parts, settings, notes)


def _fashion_folder(argument: str) -> Path:
    own = os.environ.get("EDGETUNE_DATA")
    places = [Path(argument).expanduser()] if argument else []
    if not argument:
        places += [Path(own), Path(own) / "fashion-mnist"] if own else []
        places += [cache_folder() / "fashion-mnist", Path("/usr/share/datasets/fashion-mnist")]
    for place in places:
        if (place / "train-images-idx3-ubyte.gz").exists():
            return place
    raise data_error(
        "Fashion-MNIST was not found in " + ", ".join(str(place) for place in places),
        action=f"apt-get install dataset-fashion-mnist, or put its four *-ubyte.gz files into {places[0]}",
    )


def _idx_pair(folder: Path, part: str, rows: int) -> tuple[Any, list[int]]:
    images = _idx(folder / f"{part}-images-idx3-ubyte.gz", (rows, 28, 28))
    labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz", (rows,))
    if labels.max() >= len(_FASHION_CLASSES):
        raise data_error(f"{part}-labels-idx1-ubyte.gz contains a class that does not exist", got=int(labels.max()))
    return images, labels.tolist()


def _idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An array of bytes in IDX format: a magic number, one big-endian size for each dimension, then the bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise data_error(f"{path} is missing", action="apt-get install --reinstall dataset-fashion-mnist") from error
    except (OSError, EOFError, zlib.error) as error:
        raise data_error(f"{path} cannot be unpacked: {error}", action="download the file again") from error
    begin = 4 + 4 * len(shape)
    if len(content) < begin or content[:4] != bytes((0, 0, 8, len(shape))):
        raise data_error(f"{path} is not an IDX file of bytes with {len(shape)} dimensions", got=content[:4].hex())
    sizes = struct.unpack(f">{len(shape)}I", content[4:begin])
    if sizes != shape or len(content) - begin != np.prod(shape):
        raise data_error(
            f"{path} has an unexpected size: {sizes} and {len(content) - begin} bytes",
            got="x".join(map(str, sizes)),
            allowed=["x".join(map(str, shape))],
            action="download the file again",
        )
    return np.frombuffer(content, dtype=np.uint8, offset=begin).reshape(shape)


def from_imagefolder(argument: str, settings: DataSettings) -> Dataset:
    """Images in one folder for each class, in `argument` itself or in its `train`, `validation` and `test` folders.

    Missing parts are split off the training images. Every image is decoded once, so that unreadable ones are reported
    before any training.
    """
    require("PIL", "an image folder")
    if not argument:
        raise data_error("imagefolder needs a path", action="write source: imagefolder:path/to/folder")
    folder = Path(argument).expanduser()
    if not folder.is_dir():
        near = nearest_file(folder, folders=True)
        raise data_error(
            f"{folder} is not a folder",
            near=f"imagefolder:{folder.with_name(near)}" if near else "",
            action="give a folder with one folder for each class",
        )
    inside = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    parts = {_PARTS[name]: path for name, path in inside.items() if name in _PARTS}
    if not inside:
        raise _no_classes(folder)
    if not parts:
        parts = {"train": folder}
    elif "train" not in parts or set(inside) - set(_PARTS):
        raise data_error(
            f"{folder} holds {', '.join(inside)}",
            action="give either class folders, or train, validation and test folders that contain the class folders",
        )
    names = {part: _folders(path) for part, path in parts.items()}
    classes = tuple(sorted(set().union(*names.values())))
    bad = BadRows(settings.max_bad_rows_pct)
    counted: dict[str, int] = {}
    read = {part: _read_folder(path, classes, bad, counted) for part, path in parts.items()}
    for label in classes:
        if not counted[label]:
            raise data_error(
                f"the class folder {label} contains no image",
                action=f"put images into it ({', '.join(IMAGE_SUFFIXES)}), or remove the folder",
            )
    notes = bad.notes(sum(counted.values()), folder.name)
    train, keys = read.pop("train")
    shared = len(set(keys) & set(read["test"][1])) if "test" in read else 0
    if shared:
        notes = (*notes, f"{shared:,} test images are also among the training rows")
    split = complete_parts(keys, train, settings, **{part: rows for part, (rows, _) in read.items()})
    return assemble(folder.name, ImageClassification(classes), split, settings, notes)


def _no_classes(folder: Path) -> EdgetuneError:
    """The error for a folder without subfolders: it holds the images of one class, or of all."""
    beside = [p for p in folder.absolute().parent.iterdir() if p.is_dir() and any(_image_files(p, "*"))]
    return data_error(
        f"{folder} contains no class folders",
        near=f"imagefolder:{folder.parent}" if len(beside) > 1 and any(_image_files(folder, "*")) else "",
        action=f"put the images of each class into a separate folder: {folder.name}/CLASS/NAME.jpg",
    )


def _image_files(folder: Path, pattern: str) -> Iterator[Path]:
    for path in sorted(folder.glob(pattern)):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file():
            yield path


def _folders(path: Path) -> list[str]:
    return [p.name for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")]


def _read_folder(path: Path, classes: tuple[str, ...], bad: BadRows, counted: dict[str, int]) -> tuple[Rows, list[str]]:
    """The images of one part, and the hash of each file. Adds to `counted`, unreadable ones too."""
    inputs: list[str] = []
    labels: list[int] = []
    keys: list[str] = []
    for number, label in enumerate(classes):
        counted.setdefault(label, 0)
        for image in _image_files(path / label, "**/*"):
            counted[label] += 1
            problem = _problem(image)
            if problem:
                bad.add(str(image), problem)
                continue
            inputs.append(str(image))
            labels.append(number)
            keys.append(hashlib.sha256(image.read_bytes()).hexdigest())
    return Rows(inputs, labels), keys


def _problem(path: Path) -> str:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.draft("RGB", (64, 64))  # a JPEG is decoded at a fraction of its size, which is several times as fast
            image.load()
            return depth_problem(image)
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        return str(error) or type(error).__name__
