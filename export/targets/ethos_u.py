"""Ethos-U: Arm's NPU for microcontrollers, through Vela. Integers only."""

from __future__ import annotations

from typing import Any

from edgetune.export.targets.target import Target


def _build(kind: Any, target: Target) -> Any:
    import executorch.kernels.quantized  # noqa: F401  the steps into int8 and back stay outside the delegate
    from executorch.backends.arm.ethosu import EthosUCompileSpec

    return kind(EthosUCompileSpec(target.chip))


def _quantizer(target: Target, per_channel: bool) -> Any:
    from executorch.backends.arm.ethosu import EthosUCompileSpec
    from executorch.backends.arm.quantizer import EthosUQuantizer, get_symmetric_quantization_config

    config = get_symmetric_quantization_config(is_per_channel=per_channel)
    return EthosUQuantizer(EthosUCompileSpec(target.chip)).set_global(config)


ETHOS_U = Target(
    name="ethos-u",
    serves="microcontrollers with an Arm Ethos-U NPU",
    partitioner="executorch.backends.arm.ethosu:EthosUPartitioner",
    takes=("int8",),
    install='pip install "edgetune[ethos-u]"',
    needs=("ethosu.vela", "tosa_serializer"),
    chip="ethos-u85-256",
    chips=(("Alif Ensemble", "ethos-u55-256"), ("Himax WiseEye2", "ethos-u55-64")),
    build=_build,
    quantizer=_quantizer,
)
