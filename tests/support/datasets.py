"""Tiny data sets, and settings that name no real source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgetune.data.dataset import Dataset
from edgetune.data.rows import Rows
from edgetune.data.settings import DataSettings
from edgetune.models.loaded import ModelSettings
from edgetune.tasks.causal_lm import CausalLM
from edgetune.tasks.image_classification import ImageClassification
from edgetune.tasks.task import Task
from edgetune.tasks.text_classification import TextClassification


def tiny_dataset(task: type[Task] = TextClassification, classes: tuple[str, ...] = ("no", "yes", "maybe")) -> Dataset:
    labels = None if task is CausalLM else [n % len(classes) for n in range(6)]
    inputs: Any = [f"a {'very ' * n}good text" for n in range(6)]
    if task is ImageClassification:
        inputs = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    rows = Rows(inputs, labels)
    return Dataset("tiny", task(classes), rows, rows, rows)


def model_settings(**changes: object) -> ModelSettings:
    return ModelSettings.model_validate({"source": "test", **changes})


def data_settings(**changes: object) -> DataSettings:
    return DataSettings.model_validate({"source": "test", **changes})


def save_table(path: Path, rows: int = 60, extra: str = "") -> Path:
    """Two classes in two columns, text and label; `extra` are more lines."""
    lines = [f"the {('good', 'bad')[n % 2]} text number {n},{('good', 'bad')[n % 2]}" for n in range(rows)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n" + extra, encoding="utf-8")
    return path
