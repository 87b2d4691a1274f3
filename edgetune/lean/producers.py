"""What produced the last tensors, so that operators on them can save less than the tensors.

An operator that would save `x` for backward asks `LastActivation` what produced `x`. If that is an activation, a
gated product or an attention, whose inputs are saved anyway, it saves those and computes `x` again. The output of a
linear with a low-rank path follows from its input, which that layer saves: an activation after it saves that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

OUTPUT, NORM, PRODUCT = "output", "norm", "product"  # kinds of producers besides the names of activations
ATTENTION = "attention"


def _first(tensors: Sequence[Tensor | None]) -> Tensor | None:
    return tensors[0]


class Saved(NamedTuple):
    """What is saved for backward instead of a tensor, and how to compute the tensor from it."""

    tensors: tuple[Tensor | None, ...]
    rebuild: Callable[[Sequence[Tensor | None]], Tensor | None] = _first


class Rebuilder:
    """Computes tensors from those that a list of `Saved` has saved; holds no tensor itself."""

    def __init__(self, saved: Sequence[Saved]) -> None:
        self.each = [(len(k.tensors), k.rebuild) for k in saved]

    def __call__(self, tensors: Sequence[Tensor | None]) -> list[Any]:
        """The tensors, from all saved ones in order."""
        rebuilt, start = [], 0
        for count, rebuild in self.each:
            rebuilt.append(rebuild(tensors[start : start + count]))
            start += count
        return rebuilt


def tensors_to_save(saved: Sequence[Saved]) -> tuple[Tensor | None, ...]:
    """All tensors to save, one after the other."""
    return tuple(t for k in saved for t in k.tensors)


class Producer:
    """`output` is the activation `kind` of the first input, times the second if there are two; or an attention.

    `saved`: what to save of each input. Without inputs: `OUTPUT`, a norm that saves its output; `NORM`, one that saves
    int8 rows; `PRODUCT`, in 8 bits.
    """

    def __init__(self, output: Tensor, kind: str, inputs: tuple[Tensor, ...], saved: Sequence[Saved] = ()) -> None:
        self.output: Callable[[], Tensor | None] = weakref.ref(output)
        self.kind, self.inputs = kind, inputs
        self.versions = [t._version for t in (output, *inputs)]
        self.saved = tuple(saved) or tuple(Saved((t,)) for t in inputs)
        self.rows: tuple[Tensor | None, ...] = ()  # `to_rows` of the output; or of a norm, with its parameters
        self.settings: tuple[Any, ...] = ()  # of an attention

    def is_output(self, x: Tensor) -> bool:
        """Whether `x` is its output, and nothing was changed in place since."""
        return self.output() is x and self._unchanged(x)

    def is_view_of_output(self, x: Tensor) -> bool:
        """Whether `x` is the output `(batch, heads, tokens, width)` as `(batch, tokens, heads * width)`."""
        output = self.output()
        if output is None or x.data_ptr() != output.data_ptr() or not self._unchanged(x):
            return False
        batch, heads, tokens, width = output.shape
        laid_out = output.transpose(1, 2).is_contiguous() and x.is_contiguous() and x.dtype == output.dtype
        return laid_out and x.shape == (batch, tokens, heads * width)

    def _unchanged(self, x: Tensor) -> bool:
        return self.versions == [t._version for t in (x, *self.inputs)]


class LastActivation:
    """The last producers, one of each kind, so that they hold no memory for long."""

    def __init__(self, eight_bit: bool) -> None:
        self.eight_bit = eight_bit
        self.producer: Producer | None = None
        self.attention: Producer | None = None
        self.linear: tuple[weakref.ref[Tensor], int, Saved] | None = None  # the last output of one with an adapter

    def record(self, output: Tensor, kind: str, *inputs: Tensor, saved: Sequence[Saved] = ()) -> Tensor:
        """Record what produced `output`; returns `output`."""
        self.producer = Producer(output, kind, inputs, saved)
        return output

    def record_norm(
        self, output: Tensor, parameters: tuple[Tensor | None, Tensor | None], rows: tuple[Tensor, ...]
    ) -> None:
        """Record that `output` is these int8 rows times the norm's weight plus its bias."""
        self.producer = Producer(output, NORM, ())
        self.producer.rows = (*rows, *parameters)

    def record_attention(self, output: Tensor, inputs: tuple[Tensor, ...], mask: Tensor | None, *settings: Any) -> None:
        """Record that `output` is an attention over query, key and value."""
        self.attention = Producer(output, ATTENTION, inputs, [Saved((t,)) for t in (*inputs, mask)])
        self.attention.settings = settings
        self.attention.output = lambda: output  # models keep only a view of it

    def record_linear(self, output: Tensor, saved: Saved) -> None:
        """Record that `output` follows from what its layer saves."""
        self.linear = (weakref.ref(output), output._version, saved)

    def producer_of(self, x: object) -> Producer | None:
        """The producer of `x`, if it is the last output."""
        producer = self.producer
        return producer if producer is not None and isinstance(x, Tensor) and producer.is_output(x) else None

    def producer_of_view(self, x: Tensor) -> Producer | None:
        """The producer of `x`, also where it is an attention's output with the heads side by side."""
        attention = self.attention
        return attention if attention is not None and attention.is_view_of_output(x) else self.producer_of(x)

    def saved_for(self, x: Tensor) -> Saved:
        """What to save instead of `x`: what it follows from, if that is saved anyway."""
        linear = self.linear
        if linear is not None and not self.eight_bit and linear[0]() is x and linear[1] == x._version:
            return linear[2]
        return Saved((x,))
