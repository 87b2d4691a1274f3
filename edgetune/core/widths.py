"""The precision that each layer of a model got, and what it costs beside other choices: part of the ledger."""

from __future__ import annotations

from edgetune.core.one_line import Entry


class LayerWidth(Entry):
    """The precision of one layer's weight."""

    layer: str
    width: str  # as a recipe writes it: int4, int8, float
    bits: float | None  # stored for each weight, scales included; None: another layer has its values
    share_pct: float  # of the size of the whole model
    loss: float | None = None  # predicted, of this layer alone; None: the width was written, not chosen


class MeasuredWidths(Entry):
    """One precision for each layer, all weights rounded to nearest, measured on calibration rows."""

    name: str
    average_bits: float  # of a weight in these layers, scales included
    size_mib: float  # of the whole model as stored
    kl_divergence: float  # from the floating-point model, mean, in nats


class BitWidths(Entry):
    """What a step that chooses precisions chose, and other choices measured in the same way."""

    layers: tuple[LayerWidth, ...]
    loss: str = ""  # what the losses of the layers are, in words
    measured: tuple[MeasuredWidths, ...] = ()  # the choice itself first; empty: it was written, not chosen
    held_out: bool = True  # whether it was measured on other batches than those that the choice is from
