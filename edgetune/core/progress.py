"""The callback that reports progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]  # what is being done, how far, of how much, a detail to show

NOTE = "note"  # a detail under this name is a sentence to read, not a part of the work


def ignore(stage: str, done: int, of: int, detail: str) -> None:
    """Show no progress."""
