"""Images of one of several classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from edgetune.core.ledger import Baseline
from edgetune.data.rows import Encode
from edgetune.tasks.baselines import majority_baseline, pixel_classes
from edgetune.tasks.classification import Classification
from edgetune.tasks.task import Parts


@dataclass(frozen=True)
class ImageClassification(Classification):
    """One class for each image."""

    name: ClassVar[str] = "image-classification"
    kind: ClassVar[Literal["text", "image", "language"]] = "image"
    rows: ClassVar[str] = "images with classes"
    models: ClassVar[str] = "effnet-lite0 or timm:NAME"
    texts: ClassVar[bool] = False

    def baselines(self, parts: Parts, encode: Encode | None = None) -> tuple[Baseline, ...]:
        """Always the most frequent class; logistic regression on grey pixels."""
        return majority_baseline(parts, self.labels), pixel_classes(parts)
