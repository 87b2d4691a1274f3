"""Plain kernels without a backend: slow, but they run wherever ExecuTorch runs."""

from __future__ import annotations

from edgetune.export.targets.target import WHEEL, Target

PORTABLE = Target(
    name="portable",
    serves="any processor",
    partitioner="",
    takes=("fp32", "fp16", "bf16", "int8", "8da4w", "weights-only"),
    runtime=WHEEL,
)
