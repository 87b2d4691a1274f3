"""The one error class, and the exit codes of the command line."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from edgetune.core.other_names import nearest


class Exit(IntEnum):
    """Exit codes of the command line, and what an `EdgetuneError` asks for."""

    DONE = 0
    USAGE = 2
    DATA = 3
    BUDGET = 4
    EXPORT = 5
    INTERRUPTED = 130


class EdgetuneError(ValueError):
    """An error message with its location, the value, the allowed values and one next action.

    Inner code states the problem, and outer code adds the location:

    >>> error = EdgetuneError("unknown scheme", got="last2", allowed=["last-2", "bias"], action="pick a scheme")
    >>> print(error.within("recipe.yaml, step 1, sparse-update"))
    recipe.yaml, step 1, sparse-update: unknown scheme: got 'last2'; allowed: last-2, bias; did you mean 'last-2'?
      next: pick a scheme
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        got: object = None,
        allowed: Iterable[str] = (),
        action: str = "",
        near: str | None = None,
        exit_code: Exit = Exit.USAGE,
    ) -> None:
        """`near`: what was probably meant; by default the allowed name that is spelt most like `got`."""
        self.what, self.where, self.got, self.action, self.near = what, where, got, action, near
        self.allowed, self.exit_code = tuple(allowed), exit_code
        super().__init__(what)

    def within(self, where: str) -> EdgetuneError:
        """The same error with `where` in front of its location."""
        self.where = f"{where}, {self.where}" if self.where else where
        return self

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        details = []
        if self.got is not None:
            details.append(f"got {_format_value(self.got)}")
        if self.allowed:
            details.append("allowed: " + truncate_list(self.allowed))
        near = self.near
        if near is None:
            near = nearest(str(self.got), self.allowed) if isinstance(self.got, (str, int)) else ""
        if near:
            details.append(f"did you mean {near!r}?")
        if details:
            text += ": " + "; ".join(details)
        return f"{text}\n  next: {self.action}" if self.action else text


def _format_value(value: object, most: int = 200) -> str:
    text = " ".join(repr(value).split()) if not isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]} ..."


def truncate_list(names: Iterable[str], most: int = 12) -> str:
    """The names joined by commas, cut after `most` with the number left out."""
    listed = list(names)
    rest = f" ... and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest
