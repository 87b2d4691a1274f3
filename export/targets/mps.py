"""MPS: Apple's GPU through Metal. Lowers anywhere; runs on Apple devices."""

from __future__ import annotations

from typing import Any

from edgetune.export.targets.target import Target


def _build(kind: Any, target: Target) -> Any:
    from executorch.exir.backend.backend_details import CompileSpec

    return kind([CompileSpec("use_fp16", bytes([False]))])


MPS = Target(
    name="mps",
    serves="iPhone, iPad and Mac: GPU",
    partitioner="executorch.backends.apple.mps.partition.mps_partitioner:MPSPartitioner",
    takes=("fp32", "fp16"),
    runtime="MPSBackend",
    build=_build,
)
