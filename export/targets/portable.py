"""Plain kernels, no backend: slow, and right wherever ExecuTorch itself runs."""

from __future__ import annotations

from edgetune.export.targets.target import WHEEL, Target

PORTABLE = Target(
    name="portable",
    serves="any processor",
    partitioner="",
    takes=("fp32", "fp16", "bf16", "int8", "8da4w", "weights-only"),
    runtime=WHEEL,
)
