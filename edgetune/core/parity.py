"""A program compared with its model: what a manifest and a ledger say of it."""

from __future__ import annotations

from typing import Literal

from edgetune.core.one_line import Entry


class OutputParity(Entry):
    """One output of the program compared with the eager model's, over all inputs that were tried."""

    name: str
    largest: float  # absolute value in eager mode
    max_abs_difference: float
    max_relative_difference: float  # the same over `largest`
    exact: bool = False  # whole numbers or truth values: no difference is allowed


class RoundingTies(Entry):
    """What rounding of activations alone does to the model: eager mode beside itself, moved by float noise.

    A program adds up in another order, so that an activation between two codes may be rounded the other way. No program
    can be expected to be closer to eager mode than eager mode is to itself under noise of that size.
    """

    noise: float  # relative, of what each layer rounds
    activations: int  # that were rounded
    changed: int  # of them, to another code
    max_relative_difference: float  # of a value over the largest of its output
    same_prediction_pct: float
    predictions: int


class Parity(Entry):
    """The program compared with the eager model, on held-out rows, greedy tokens or given inputs."""

    rows: int  # number of what `counted` names
    same_prediction_pct: float
    max_abs_difference: float
    counted: Literal["held-out row", "greedy token", "input"] = "held-out row"
    outputs: tuple[OutputParity, ...] = ()  # empty: an older program, compared by predictions alone
    max_relative_allowed: float | None = None
    tried: tuple[str, ...] = ()  # what else it was run on, in addition to the rows
    ties: RoundingTies | None = None  # None: the model rounds no activations by their own range

    @property
    def number(self) -> str:
        """`8 rows`, `1 input`, `64 greedy tokens`."""
        return f"{self.rows:,} {self.counted.removeprefix('held-out ')}{'s' * (self.rows != 1)}"

    @property
    def max_relative_difference(self) -> float | None:
        """Of the output that is furthest off."""
        return max((output.max_relative_difference for output in self.outputs), default=None)
