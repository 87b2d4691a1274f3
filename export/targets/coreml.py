"""Core ML: Apple's CPU, GPU and Neural Engine. Lowers on Linux; runs on Apple devices."""

from __future__ import annotations

from typing import Any

from edgetune.export.targets.target import Target

_OLDEST = "iOS17"  # the first with int8 quantize and dequantize operators; runs on iPhones from 2018 on


def _build(kind: Any, target: Target) -> Any:
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend

    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=getattr(coremltools.target, target.chip),
        compute_precision=coremltools.precision.FLOAT16,  # the only one of the Neural Engine
        compute_unit=coremltools.ComputeUnit.ALL,
    )
    return kind(compile_specs=specs)


COREML = Target(
    name="coreml",
    serves="iPhone, iPad and Mac: CPU, GPU and Neural Engine",
    partitioner="executorch.backends.apple.coreml.partition:CoreMLPartitioner",
    takes=("fp32", "int8"),
    runtime="CoreMLBackend",
    install='pip install "edgetune[export]" on Linux or macOS: coremltools comes with executorch there',
    needs=("coremltools",),
    chip=_OLDEST,
    build=_build,
)
