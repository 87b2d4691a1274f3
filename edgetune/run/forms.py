"""The forms of a model, in floating point and quantized: which is fastest on a device."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from edgetune.core.apply import apply
from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import CallCost, Measured, Predicted
from edgetune.core.numbers import format_number
from edgetune.core.technique import Sample, Technique
from edgetune.export.targets import for_device
from edgetune.profile.calls import predict_calls
from edgetune.program.artifact import Artifact
from edgetune.quant.int4 import Int4
from edgetune.quant.int8 import Int8, Static8
from edgetune.quant.int8_dynamic import Int8Dynamic
from edgetune.quant.size import weight_bits
from edgetune.run.exportable import Exportable, to_program
from edgetune.runtime.hosts.host import Host
from edgetune.runtime.hosts.session import measure_on

FLOAT = "float"


def choose_fastest(source: Exportable, *, device: str | None = None, target: str | None = None) -> Exportable:
    """The fastest of the model as it is, `int8_dynamic`, `int4` per channel and, of convolutions, `int8`.

    Each is lowered, and predicted for the device, or without one measured on this host; a text-generation program by
    one token. The quality is not compared. The result's notes say what was chosen, with the numbers of all. Raises
    `EdgetuneError` for a model that is quantized already.
    """
    if isinstance(source.model, Static8) or any(weight_bits(p) is not None for p in source.model.parameters()):
        raise EdgetuneError("the model is quantized already, so it has no other form", action="omit --fastest-form")
    goal = for_device(device, target).name
    candidates: dict[str, Exportable] = {}
    costs: dict[str, Predicted | Measured] = {}
    failures: list[str] = []
    for name, technique in _forms(source.model, goal).items():
        try:
            candidates[name] = source if technique is None else _quantize(source, technique)
            costs[name] = _cost(candidates[name], device, goal)
        except EdgetuneError as error:
            if technique is None:
                raise
            failures.append(f"{name} is not possible: {error.what}")
    fastest = min(costs, key=lambda name: costs[name].latency_ms)
    note = "; ".join([_describe_choice(fastest, costs), *failures])
    return _with_notes(candidates[fastest], [note])


def _forms(model: nn.Module, target: str) -> dict[str, Technique | None]:
    forms: dict[str, Technique | None] = {
        FLOAT: None, "int8_dynamic": Int8Dynamic(), "int4": Int4(group_size="channel", algorithm="absmax"),
    }  # fmt: skip
    if any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules()):
        forms["int8"] = Int8(target=target)
    return forms


def _quantize(source: Exportable, technique: Technique) -> Exportable:
    batches = source.check_inputs or [source.example]
    sample = Sample(source.example, lambda: iter(batches))
    with warnings.catch_warnings(record=True) as caught:  # only those of the chosen form matter
        warnings.simplefilter("always")
        model = apply(copy.deepcopy(source.model), technique, sample)
    return _with_notes(replace(source, model=model), [str(warning.message) for warning in caught])


def _with_notes(source: Exportable, notes: Sequence[str]) -> Exportable:
    if source.carried is None:
        return source
    return replace(source, carried=source.carried.model_copy(update={"notes": (*source.carried.notes, *notes)}))


def _cost(source: Exportable, device: str | None, target: str) -> Predicted | Measured:
    with tempfile.TemporaryDirectory() as folder:
        artifact: Artifact = to_program(replace(source, ledger=None), Path(folder) / "model.pte", target=target)
        costs: Sequence[Predicted | Measured] = (
            predict_calls(artifact, device) if device else measure_on(Host(), artifact)
        )
    return costs[0]


def _describe_choice(fastest: str, costs: dict[str, Predicted | Measured]) -> str:
    """`int8 is the fastest form, predicted for pixel-8: int8 8.1 ms, float 12 ms, int4 13 ms`."""
    line: CallCost = costs[fastest]
    how = "predicted for" if isinstance(line, Predicted) else "measured on"
    ordered = sorted(costs, key=lambda name: costs[name].latency_ms)
    times = ", ".join(f"{name} {format_number(costs[name].latency_ms)} ms" for name in ordered)
    text = f"{fastest} is the fastest form, {how} {line.where}: {times}"
    return f"{text}; quantizing would make the program smaller and slower" if fastest == FLOAT else text
