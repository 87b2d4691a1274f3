"""What a loader of models returns, and the settings it takes."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from edgetune.data.dataset import Encode


class ModelSettings(BaseModel):
    """Which model, and in which form it takes its inputs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str  # "minilm", "hf:owner/name", ...: a name of the registry, and what follows the first colon
    max_length: int = Field(default=64, ge=8, le=8192)  # tokens; longer texts are cut
    image_px: int = Field(default=112, ge=8, le=2048)  # width and height of a picture
    pretrained: bool = True  # False: random weights, for trials of shape, size and speed; hf and timm only


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode and fp32, and what turns rows into its inputs.

    A new head is drawn from torch's random generator: seed it before loading to have the same one again.
    """

    name: str
    model: nn.Module
    encode: Encode
    notes: tuple[str, ...] = ()
