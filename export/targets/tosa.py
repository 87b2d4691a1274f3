"""TOSA: Arm's portable graph of operators, the input of their compilers; not a program for one chip."""

from __future__ import annotations

from typing import Any

from edgetune.export.targets.target import Target
from edgetune.quant.quantizers import ARM_INSTALL, TOSA_PROFILE


def _build(kind: Any, target: Target) -> Any:
    import executorch.kernels.quantized  # noqa: F401  conversion to and from int8 stays outside the delegate
    from executorch.backends.arm.tosa.compile_spec import TosaCompileSpec

    return kind(TosaCompileSpec(TOSA_PROFILE))


TOSA = Target(
    name="tosa",
    serves="Arm's TOSA compilers",
    partitioner="executorch.backends.arm.tosa.partitioner:TOSAPartitioner",
    takes=("fp32", "int8"),
    install=ARM_INSTALL,
    needs=("tosa_serializer",),
    build=_build,
)
