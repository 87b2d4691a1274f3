"""Paths into nested values, and several errors of one document as one."""

from __future__ import annotations

from collections.abc import Sequence

from edgetune.core.errors import EdgetuneError

Key = str | int
KeyPath = tuple[Key, ...]


class Errors(EdgetuneError):
    """Several errors of one document, printed together; `errors` holds each of them."""

    def __init__(self, name: str, errors: Sequence[EdgetuneError]) -> None:
        self.errors = tuple(errors)
        super().__init__(f"{name}: {len(self.errors)} errors")

    def __str__(self) -> str:
        return "\n".join([f"{self.what}:" if not self.where else f"{self.where}: {self.what}:", *map(str, self.errors)])


def raise_all(name: str, errors: Sequence[EdgetuneError]) -> None:
    """Raise a single error as it is, several as one `Errors`, and nothing if there is none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise Errors(name, errors)


def format_path(path: KeyPath) -> str:
    """A path as text; list positions count from one.

    >>> format_path(("steps", 0, "lora", "rank"))
    'steps.1.lora.rank'
    """
    return ".".join(str(key + 1) if isinstance(key, int) else key for key in path)
