"""How the latest tensors came about, so that what is computed from them keeps what they were made from, or nothing.

An operator that would keep `x` for backward asks `Latest` where `x` came from. Where that is an activation, a gated
product or an attention, whose inputs are kept anyhow, it keeps those and computes `x` again. The output of a linear
with a low-rank path follows from its input, which that layer keeps itself: an activation after it keeps that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

OUTPUT, NORM, PRODUCT = "output", "norm", "product"  # kinds of sources besides the names of activations
ATTENTION = "attention"


def _first(tensors: Sequence[Tensor | None]) -> Tensor | None:
    return tensors[0]


class Kept(NamedTuple):
    """What is saved for backward in the place of a tensor, and how the tensor follows from that."""

    tensors: tuple[Tensor | None, ...]
    rebuild: Callable[[Sequence[Tensor | None]], Tensor | None] = _first


class Rebuilding:
    """How tensors follow from those that a list of `Kept` has saved; holds no tensor itself."""

    def __init__(self, kept: Sequence[Kept]) -> None:
        self.each = [(len(k.tensors), k.rebuild) for k in kept]

    def __call__(self, tensors: Sequence[Tensor | None]) -> list[Any]:
        """Of all saved tensors, one after the other."""
        rebuilt, start = [], 0
        for count, rebuild in self.each:
            rebuilt.append(rebuild(tensors[start : start + count]))
            start += count
        return rebuilt


def tensors_of(kept: Sequence[Kept]) -> tuple[Tensor | None, ...]:
    """All tensors to save, one after the other."""
    return tuple(t for k in kept for t in k.tensors)


class Source:
    """`output` is the activation `kind` of the first input, times the second where there are two; or an attention.

    `kept`: what to save of each input. Without inputs: `OUTPUT`, a norm that keeps its output; `NORM`, one that keeps
    int8 rows; `PRODUCT`, in 8 bits.
    """

    def __init__(self, output: Tensor, kind: str, inputs: tuple[Tensor, ...], kept: Sequence[Kept] = ()) -> None:
        self.output: Callable[[], Tensor | None] = weakref.ref(output)
        self.kind, self.inputs = kind, inputs
        self.versions = [t._version for t in (output, *inputs)]
        self.kept = tuple(kept) or tuple(Kept((t,)) for t in inputs)
        self.rows: tuple[Tensor | None, ...] = ()  # `to_rows` of the output; or of a norm, with its parameters
        self.settings: tuple[Any, ...] = ()  # of an attention

    def made(self, x: Tensor) -> bool:
        """Whether it made this very tensor, and nothing was changed in place since."""
        return self.output() is x and self._unchanged(x)

    def made_view(self, x: Tensor) -> bool:
        """Whether `x` is the output `(batch, heads, tokens, width)` as `(batch, tokens, heads * width)`."""
        output = self.output()
        if output is None or x.data_ptr() != output.data_ptr() or not self._unchanged(x):
            return False
        batch, heads, tokens, width = output.shape
        laid_out = output.transpose(1, 2).is_contiguous() and x.is_contiguous() and x.dtype == output.dtype
        return laid_out and x.shape == (batch, tokens, heads * width)

    def _unchanged(self, x: Tensor) -> bool:
        return self.versions == [t._version for t in (x, *self.inputs)]


class Latest:
    """The latest sources; one of each sort at a time, so that they hold no memory for long."""

    def __init__(self, eight_bit: bool) -> None:
        self.eight_bit = eight_bit
        self.source: Source | None = None
        self.attention: Source | None = None
        self.linear: tuple[weakref.ref[Tensor], int, Kept] | None = None  # the latest output of one with an adapter

    def note(self, output: Tensor, kind: str, *inputs: Tensor, kept: Sequence[Kept] = ()) -> Tensor:
        """Remember how `output` came about; returns it."""
        self.source = Source(output, kind, inputs, kept)
        return output

    def note_norm(
        self, output: Tensor, parameters: tuple[Tensor | None, Tensor | None], rows: tuple[Tensor, ...]
    ) -> None:
        """Remember that `output` is these int8 rows times the norm's weight plus its bias."""
        self.source = Source(output, NORM, ())
        self.source.rows = (*rows, *parameters)

    def note_attention(self, output: Tensor, inputs: tuple[Tensor, ...], mask: Tensor | None, *settings: Any) -> None:
        """Remember that `output` is an attention over query, key and value."""
        self.attention = Source(output, ATTENTION, inputs, [Kept((t,)) for t in (*inputs, mask)])
        self.attention.settings = settings
        self.attention.output = lambda: output  # models take a view of it and let it go

    def note_linear(self, output: Tensor, kept: Kept) -> None:
        """Remember that `output` follows from what its layer keeps."""
        self.linear = (weakref.ref(output), output._version, kept)

    def of(self, x: object) -> Source | None:
        """The source of `x`, if it is the latest output."""
        source = self.source
        return source if source is not None and isinstance(x, Tensor) and source.made(x) else None

    def of_view(self, x: Tensor) -> Source | None:
        """The source of `x`, also where it is an attention's output with the heads side by side."""
        attention = self.attention
        return attention if attention is not None and attention.made_view(x) else self.of(x)

    def kept_of(self, x: Tensor) -> Kept:
        """What to save in the place of `x`: what it follows from, if that is kept anyhow."""
        linear = self.linear
        if linear is not None and not self.eight_bit and linear[0]() is x and linear[1] == x._version:
            return linear[2]
        return Kept((x,))
