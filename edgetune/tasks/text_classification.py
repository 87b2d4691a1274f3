"""Texts with one of several classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgetune.core.ledger import Baseline
from edgetune.data.rows import Encode
from edgetune.tasks.baselines import majority_baseline, tfidf_classes
from edgetune.tasks.classification import Classification
from edgetune.tasks.task import Parts


@dataclass(frozen=True)
class TextClassification(Classification):
    """One class for each text."""

    name: ClassVar[str] = "text-classification"
    rows: ClassVar[str] = "texts with classes"

    def baselines(self, parts: Parts, encode: Encode | None = None) -> tuple[Baseline, ...]:
        """Always the most frequent class; TF-IDF with logistic regression."""
        return majority_baseline(parts, self.labels), tfidf_classes(parts)
