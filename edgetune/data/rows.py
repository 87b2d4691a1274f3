"""Rows as loaders return them, and the protocol of encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs

IGNORED_LABEL = -100  # the label of a position that takes no part in the loss


@dataclass(frozen=True)
class Rows:
    """Inputs and their labels. Inputs are texts, words of a text, conversations, paths of images, or one `uint8` array
    `(rows, height, width[, 3])`.

    A label is the number of a class, a number to predict, or the number of a tag for each word; `labels` is `None` for
    a
    causal language model, whose labels are the tokens themselves.
    """

    inputs: Sequence[Any]
    labels: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.inputs):
            raise EdgetuneError(
                "the number of labels must equal the number of inputs", got=(len(self.inputs), len(self.labels))
            )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def classes(self) -> Sequence[int] | None:
        """The class of each row; `None` if rows have none."""
        labels = self.labels
        return None if labels is None or any(isinstance(label, (float, tuple)) for label in labels[:1]) else labels

    def subset(self, indices: Sequence[int]) -> Rows:
        """The rows at `indices`, in that order."""
        return Rows(self.take(indices), self.labels_at(indices))

    def take(self, indices: Sequence[int]) -> Sequence[Any]:
        """The inputs at `indices`: an array for an array, else a list."""
        if hasattr(self.inputs, "dtype"):
            picked: Sequence[Any] = self.inputs[list(indices)]  # type: ignore[call-overload]
            return picked
        return [self.inputs[i] for i in indices]

    def labels_at(self, indices: Sequence[int]) -> list[Any] | None:
        """The labels at `indices`, if there are any."""
        return None if self.labels is None else [self.labels[i] for i in indices]


class Encode(Protocol):
    """Turns inputs into a model's tensors, batch first.

    Texts are padded to the longest of the batch, rounded up; `pad_to` sets exactly that many tokens instead.
    Conversations also give `labels`, which the task takes out: the token ids, with -100 for tokens not to be learned.
    """

    def __call__(self, inputs: Sequence[Any], pad_to: int | None = None) -> Inputs:
        """The inputs as tensors."""
        ...
