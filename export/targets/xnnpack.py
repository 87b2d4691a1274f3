"""XNNPACK: the CPU of phones, boards and computers. Undelegated operators run on portable kernels."""

from __future__ import annotations

from edgetune.export.targets.target import WHEEL, Target

XNNPACK = Target(
    name="xnnpack",
    serves="the CPU of Android, iOS, Raspberry Pi, Jetson and computers",
    partitioner="executorch.backends.xnnpack.partition.xnnpack_partitioner:XnnpackPartitioner",
    takes=("fp32", "fp16", "bf16", "int8", "8da4w", "weights-only"),
    runtime=WHEEL,
    build=lambda kind, _target: kind(enable_bf16=True),  # what has no kernel in bf16 is written in fp32 before
)
