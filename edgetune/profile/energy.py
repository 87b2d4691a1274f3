"""Energy of a run, from its operations, the bytes that they move, and the power of an awake device.

These are orders of magnitude for a class of systems, validated against no measurement.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgetune.profile.device import Device
from edgetune.program.operators import DType, Operator

# Picojoules of one multiply-accumulate, the core that issues it included. A multiplier alone takes 4.6 pJ in fp32 and
# 0.23 in int8 (45 nm: Horowitz, ISSCC 2014, figure 1.1.9), and instruction, registers and caches some ten times that
# in a scalar core; vectors share it among their lanes. int8 by four, as dot products issue four at once.
_MAC_PJ: dict[DType, float] = {"fp32": 40.0, "bf16": 40.0, "fp16": 20.0, "int8": 10.0, "8da4w": 10.0}
# A byte from main memory: 1.3 to 2.6 nJ for 64 bits (the same source), LPDDR4 about a third of it.
_BYTE_PJ = 80.0
# Watts of a device of the class that is awake and idle.
_AWAKE_W = {"phone": 1.0, "board": 2.0, "jetson": 4.0, "computer": 8.0, "microcontroller": 0.02}


def program_mj(operators: Sequence[Operator], device: Device, latency_ms: float) -> float:
    """Millijoules of one run that takes this long; with a thousand runs it is joules."""
    macs_pj = sum(operator.macs * _MAC_PJ[operator.dtype] for operator in operators)
    moved_pj = _BYTE_PJ * sum(operator.weight_bytes + operator.activation_bytes for operator in operators)
    return (macs_pj + moved_pj) * 1e-9 + _AWAKE_W[device.family] * latency_ms
