"""Silence libraries' own output, which would break progress bars and tells the user nothing to act on."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARIES = (
    "bitsandbytes", "datasets", "executorch", "filelock", "httpx", "huggingface_hub", "lightning", "numpy", "peft",
    "pydantic", "safetensors", "timm", "tokenizers", "torch", "torchao", "torchvision", "transformers",
)  # fmt: skip


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Silence warnings, logs and progress bars of libraries in the body."""
    with _hide_logs(), warnings.catch_warnings(), _hide_bars():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def silence_command() -> Iterator[None]:
    """For a whole command: silence logs below errors, and warnings that libraries raise in their own code.

    Warnings from the user's files are shown; with `python -W` or PYTHONWARNINGS, all are.
    """
    with _hide_logs(), warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)})(\.|$)")
        yield


@contextmanager
def _hide_logs() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _hide_bars() -> Iterator[None]:
    """Hide the progress bars of transformers and datasets, if they are imported; restored afterwards."""
    transformers, datasets = (sys.modules.get(name) for name in ("transformers.utils.logging", "datasets.utils.tqdm"))
    level = transformers.get_verbosity() if transformers else 0
    shown = transformers is not None and transformers.is_progress_bar_enabled()
    drawn = datasets is not None and datasets.are_progress_bars_disabled() is False
    if transformers:
        transformers.set_verbosity_error()
        transformers.disable_progress_bar()
    if datasets and drawn:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if transformers:
            transformers.set_verbosity(level)
        if transformers and shown:
            transformers.enable_progress_bar()
        if datasets and drawn:
            datasets.enable_progress_bars()
