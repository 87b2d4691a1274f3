"""Attributes that pruning sets, with what they were: a model that cannot be cut is left as it came."""

from __future__ import annotations

from typing import Any

_ABSENT = object()


class Changes:
    """Every attribute set through it, with the value it had."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []
        self.shared: dict[tuple[int, str], Any] = {}  # what a tensor became along an axis, for all layers that share it

    def set(self, owner: Any, attribute: str, value: Any) -> None:
        """Set an attribute and store its old value."""
        self._before.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    def add(self, owner: Any, attribute: str, value: Any) -> None:
        """Set an attribute that the owner may not have."""
        self._before.append((owner, attribute, getattr(owner, attribute, _ABSENT)))
        setattr(owner, attribute, value)

    def places(self) -> list[tuple[Any, str]]:
        """What was set: owners and attributes, in order."""
        return [(owner, attribute) for owner, attribute, _ in self._before]

    def undo(self) -> None:
        """Restore all old values, the last first."""
        while self._before:
            owner, attribute, value = self._before.pop()
            if value is _ABSENT:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, value)
