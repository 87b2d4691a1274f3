"""The rows of bench_quant.py's tables: steps of every method, by its name."""

from __future__ import annotations

from typing import Any

from quant_models import TASKS, Task
from quant_others import others_of
from trained_models import Steps

FLOAT = "fp32"
UNIFORM = "int4 gptq g32, 4-bit tables"
BITS, AS_UNIFORM = "bits, as large as uniform 4", -1.0  # in place of a size


def methods_of(task: Task) -> dict[str, Steps]:
    """The steps of every method that suits a model, by its name in the table."""
    wide = {"int8_linears": list(task.wide)} if task.wide else {}

    def int4(**settings: Any) -> dict[str, Any]:
        return {"int4": {**wide, **settings}}

    methods: dict[str, Steps] = {FLOAT: []}
    if task.kind == "image":
        observers = ("minmax", "percentile", "mse", "entropy")
        methods |= {f"int8 {observer}": [{"int8": {"observer": observer}}] for observer in observers}
        methods |= {
            "int8 auto": [{"int8": {"observer": "auto"}}],
            "int8 auto, biases": [{"int8": {"observer": "auto", "bias_correction": True}}],
        }
        return methods
    methods["int8_dynamic"] = [{"int8_dynamic": {}}]
    methods["int4 smallest"] = [int4(preset="smallest")]
    methods[UNIFORM] = [int4(algorithm="gptq", embeddings="int4")]
    for group, name in ((32, "g32"), ("channel", "channel")):
        for algorithm in ("absmax", "mse", "awq", "gptq"):
            methods[f"int4 {algorithm} {name}"] = [int4(group_size=group, algorithm=algorithm)]
        gptq = int4(group_size=group, algorithm="gptq")
        methods[f"smooth, int4 gptq {name}"] = [{"smooth": {}}, gptq]
        if task.kind == "language":
            methods[f"rotate, int4 gptq {name}"] = [{"rotate": {}}, gptq]
        methods[f"offsets, int4 gptq {name}"] = [{"offsets": {}}, gptq]
        training = {"train": task.qat}
        methods[f"qat, int4 {name}"] = [{"qat": {"distill": 1.0}}, training, int4(group_size=group)]
    methods["quik"] = [{"quik": {}}]
    methods[BITS] = [{"bits": {"size_mib": AS_UNIFORM}}]
    methods["bits 5.0"] = [{"bits": {"average_bits": 5.0}}]
    return methods


def names_of(name: str) -> list[str]:
    """Every row of a model's table."""
    return [*methods_of(TASKS[name]), *others_of(TASKS[name].kind, name)]
