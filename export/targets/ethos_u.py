"""Ethos-U: Arm's NPU for microcontrollers, through Vela. Integers only."""

from __future__ import annotations

from typing import Any

from edgetune.export.targets.target import Target
from edgetune.quant.quantizers import ARM_INSTALL, ETHOS_U_CHIP


def _build(kind: Any, target: Target) -> Any:
    import executorch.kernels.quantized  # noqa: F401  conversion to and from int8 stays outside the delegate
    from executorch.backends.arm.ethosu import EthosUCompileSpec

    return kind(EthosUCompileSpec(target.chip))


ETHOS_U = Target(
    name="ethos-u",
    serves="microcontrollers with an Arm Ethos-U NPU",
    partitioner="executorch.backends.arm.ethosu:EthosUPartitioner",
    takes=("int8",),
    install=ARM_INSTALL,
    needs=("ethosu.vela", "tosa_serializer"),
    chip=ETHOS_U_CHIP,
    chips=(("Alif Ensemble", "ethos-u55-256"), ("Himax WiseEye2", "ethos-u55-64")),
    build=_build,
)
