"""Core ML: Apple's CPU, GPU and Neural Engine. Lowers on Linux; runs on Apple devices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.export import ExportedProgram

from edgetune.export.targets.target import LoweringPlan, Target
from edgetune.quant.palettize import SMALLEST, has_palette

_OLDEST = "iOS17"  # the first with int8 quantize and dequantize operators; runs on iPhones from 2018 on


def _build(kind: Any, target: Target, passes: list[str] | None = None) -> Any:
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend

    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=getattr(coremltools.target, target.chip),
        compute_precision=coremltools.precision.FLOAT16,  # the only one of the Neural Engine
        compute_unit=coremltools.ComputeUnit.ALL,
        pass_names=passes,
    )
    return kind(compile_specs=specs)


def _plan(program: ExportedProgram, target: Target) -> LoweringPlan:
    """With weights of few values as codes and a table, if there are any."""
    if not any(has_palette(tensor) for tensor in program.state_dict.values()):
        return LoweringPlan(program, tuple(target.partitioners()))
    with_passes = replace(target, build=lambda kind, own: _build(kind, own, _palette_passes()))
    return LoweringPlan(program, tuple(with_passes.partitioners()))


def _palette_passes() -> list[str]:
    """The passes of coremltools' default palettization, with its options: executorch hands on names alone."""
    from coremltools import PassPipeline
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass
    from coremltools.optimize.coreml import OpPalettizerConfig, OptimizationConfig
    from coremltools.optimize.coreml._quantization_passes import palettize_weights

    @register_pass(namespace="edgetune", override=True)
    class store_palettes(palettize_weights):  # type: ignore[misc]  # passes are registered by their class names
        def __init__(self) -> None:
            unique = OpPalettizerConfig(mode="unique", weight_threshold=SMALLEST)
            super().__init__(OptimizationConfig(global_config=unique))

    return ["edgetune::store_palettes", *PassPipeline.DEFAULT.passes]


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
    plan=_plan,
)
