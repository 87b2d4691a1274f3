"""TOSA: Arm's portable graph of operators, as their compilers read it. Not a program for any one chip."""

from __future__ import annotations

from typing import Any

from edgetune.export.targets.target import Target

PROFILE = "TOSA-1.0+INT+FP"  # both profiles: float models lower as well as quantized ones


def _build(kind: Any, target: Target) -> Any:
    import executorch.kernels.quantized  # noqa: F401  the steps into int8 and back stay outside the delegate
    from executorch.backends.arm.tosa.compile_spec import TosaCompileSpec

    return kind(TosaCompileSpec(PROFILE))


def _quantizer(target: Target, per_channel: bool) -> Any:
    from executorch.backends.arm.quantizer import TOSAQuantizer, get_symmetric_quantization_config
    from executorch.backends.arm.tosa.compile_spec import TosaCompileSpec

    config = get_symmetric_quantization_config(is_per_channel=per_channel)
    return TOSAQuantizer(TosaCompileSpec(PROFILE)).set_global(config)


TOSA = Target(
    name="tosa",
    serves="Arm's TOSA compilers",
    partitioner="executorch.backends.arm.tosa.partitioner:TOSAPartitioner",
    takes=("fp32", "int8"),
    install='pip install "edgetune[ethos-u]"',
    needs=("tosa_serializer",),
    build=_build,
    quantizer=_quantizer,
)
