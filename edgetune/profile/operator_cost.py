"""The share of one operator in a prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgetune.program.operators import Operator

Bound = Literal["compute", "memory", "overhead"]


@dataclass(frozen=True)
class OperatorCost:
    """What one operator is predicted to take, and what it would take at the full rates of the device."""

    operator: Operator
    us: float
    log: float  # how far off it may be, as a natural logarithm
    compute_us: float  # at the peak arithmetic rate
    memory_us: float  # at the full bandwidth
    fixed_us: float  # whatever its size
    guessed: str = ""  # where the figure comes from, if the calibration does not know the operator

    @property
    def bound(self) -> Bound:
        """What its time is mostly spent on: arithmetic, memory traffic, or being called at all."""
        if self.fixed_us > self.us / 2:
            return "overhead"
        return "compute" if self.compute_us >= self.memory_us else "memory"
