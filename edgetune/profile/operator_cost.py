"""The predicted cost of one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgetune.program.operators import Operator

Bound = Literal["compute", "memory", "overhead"]


@dataclass(frozen=True)
class OperatorCost:
    """Predicted time of one operator, and its time at the full rates of the device."""

    operator: Operator
    us: float
    log: float  # uncertainty, as a natural logarithm
    compute_us: float  # at the peak arithmetic rate
    memory_us: float  # at the full bandwidth
    fixed_us: float  # independent of its size
    guessed: str = ""  # the stand-in, if the operator was never calibrated

    @property
    def bound(self) -> Bound:
        """What dominates its time: arithmetic, memory traffic, or call overhead."""
        if self.fixed_us > self.us / 2:
            return "overhead"
        return "compute" if self.compute_us >= self.memory_us else "memory"
