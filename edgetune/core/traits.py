"""Traits of a model: the vocabulary in which techniques declare what they take and leave."""

from __future__ import annotations

from enum import Flag, auto


class Trait(Flag):
    """What a model is in addition to plain floating-point layers. They combine: `Trait.FROZEN | Trait.PACKED`."""

    PLAIN = 0
    ADAPTED = auto()  # trained tensors in addition to frozen layers
    FROZEN = auto()  # only some of the layers train
    PACKED = auto()  # weights in a storage format that trains nothing itself, as a base for adapters
    LEAN = auto()  # operators that save less for backward
    ROUNDED = auto()  # computes with rounded weights while it trains those in floating point
    SHARED = auto()  # layers read their weights from one pool of parameters
    SPLIT = auto()  # linears in two parts, for quantization: an adapter or a cut would see one of them
    INTEGER = auto()  # integer weights, for good: nothing trains any more

    @property
    def in_words(self) -> str:
        """`adapters, frozen layers`."""
        return ", ".join(words for trait, words in _WORDS.items() if trait in self)


OPEN = ~(
    Trait.INTEGER | Trait.SPLIT
)  # what `finalize` turns into plain layers again; it can train, or carries what can

_WORDS = {
    Trait.ADAPTED: "adapters",
    Trait.FROZEN: "frozen layers",
    Trait.PACKED: "packed weights",
    Trait.LEAN: "lean operators",
    Trait.ROUNDED: "rounded weights",
    Trait.SHARED: "shared weights",
    Trait.SPLIT: "split linears",
    Trait.INTEGER: "integer weights",
}
