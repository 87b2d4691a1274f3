"""Qualcomm AI Engine Direct: the Hexagon NPU of Snapdragon phones. Lowers if Qualcomm's SDK is installed.

Importing executorch's Qualcomm package downloads that SDK if it is missing, so nothing is imported before it has been
found. The steps are those of `to_edge_transform_and_lower_to_qnn`, which takes modules and not a captured program.
"""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram

from edgetune.export.targets.forms import form_of
from edgetune.export.targets.target import LoweringPlan, Target
from edgetune.quant.quantizers import QNN_INSTALL, qnn_lacks


def _specs(target: Target, *, quantized: bool) -> Any:
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.utils import utils

    options = utils.generate_htp_compiler_spec(use_fp16=not quantized)
    chip = getattr(QcomChipset, target.chip)
    return utils.generate_qnn_executorch_compiler_spec(soc_model=chip, backend_options=options)


def _build(kind: Any, target: Target) -> Any:
    return kind(_specs(target, quantized=False))


def _plan(program: ExportedProgram, target: Target) -> LoweringPlan:
    target.partitioners()  # raises if something is missing
    from executorch.backends.qualcomm.partition.qnn_partitioner import QnnPartitioner
    from executorch.backends.qualcomm.serialization.qc_schema import QnnExecuTorchBackendType
    from executorch.backends.qualcomm.utils import utils
    from executorch.backends.qualcomm.utils.qnn_manager_lifecycle import QnnManagerContext

    specs = _specs(target, quantized=form_of(program) == "int8")
    passes = utils.get_qnn_pass_manager_cls(QnnExecuTorchBackendType.kHtpBackend)()
    ready = passes.transform_for_export_pipeline(program)
    return LoweringPlan(
        program=ready,
        partitioners=(QnnPartitioner(specs),),
        passes=passes.get_to_edge_transform_passes(ready, compiler_specs=specs),
        config=utils.qnn_edge_config(),
        context=QnnManagerContext({"forward": specs}),
    )


QNN = Target(
    name="qnn",
    serves="the Hexagon NPU of Snapdragon phones",
    partitioner="executorch.backends.qualcomm.partition.qnn_partitioner:QnnPartitioner",
    takes=("fp32", "int8"),
    install=QNN_INSTALL,
    chip="SM8650",
    chips=(
        ("Snapdragon 8 Gen 1", "SM8450"),
        ("Snapdragon 8+ Gen 1", "SM8475"),
        ("Snapdragon 8 Gen 2", "SM8550"),
        ("Snapdragon 8 Gen 3", "SM8650"),
        ("Snapdragon 8 Elite Gen 5", "SM8850"),
        ("Snapdragon 8 Elite", "SM8750"),
    ),
    missing=qnn_lacks,
    build=_build,
    plan=_plan,
)
