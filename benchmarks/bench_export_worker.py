"""One cell of bench_export.py in a process of its own: `bench_export_worker.py FAMILY COLUMN OUT.json`.

The family is adapted, trained for some steps on random labels, finalized, quantized where the column says so, exported
and compared. What happened is in OUT.json, written after each stage, so that a crash still says where it was.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.adapt.layer_kinds import kind_of
from edgetune.adapt.lora import LoRA
from edgetune.capture.repairs.experts import static_experts
from edgetune.core.apply import apply, finalize
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, call, logits_of, rows_of, tensors_of
from edgetune.core.technique import Sample, Technique
from edgetune.export import export as to_program
from edgetune.quant.int4 import Int4
from edgetune.quant.int8 import Int8
from edgetune.runtime import verify
from edgetune.runtime.clock.runs import load_runtime
from edgetune.sparse.update import SparseUpdate
from support.families import FAMILIES, Family

ROWS = 100  # that the program and the model are compared on
STEPS, BATCH, RATE = 2, 8, 1e-3
COLUMNS = ("fp32", "quantized", "coreml", "vulkan")


class Cell:
    """What is known of one family in one column so far, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, {"state": "crashed", "stage": "build"}
        self.save()

    def save(self) -> None:
        """Write what is known."""
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self.found), encoding="utf-8")
        os.replace(partial, self.path)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A part of the line by its name; its seconds are kept."""
        self.found["stage"] = name
        self.save()
        begun = time.perf_counter()
        yield
        self.found[f"{name}_s"] = round(time.perf_counter() - begun, 2)
        self.save()


def run(family: Family, column: str, path: Path) -> None:
    """Everything; an error becomes what the cell says."""
    cell = Cell(path)
    try:
        _through(family, column, cell)
        cell.found["state"] = "done"
    except EdgetuneError as error:
        cell.found |= {"state": "refused", "reason": str(error)}
    except Exception as error:  # of whatever kind: it is a row of the table
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        cell.found |= {"state": "failed", "reason": f"{type(error).__name__}: {error} ({place})"[:2000]}
    cell.save()


def _through(family: Family, column: str, cell: Cell) -> None:
    bits = {"fp32": "fp32", "quantized": family.bits}.get(column, "fp32")
    cell.found |= {"column": column, "bits": bits, "adapt": family.adapt}
    with cell.stage("build"):
        model = family.made()
        cell.found["parameters"] = sum(p.numel() for p in model.parameters())
    with cell.stage("adapt"):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model = apply(model, adaptation(family, model))
    with cell.stage("train"):
        train(family, model)
    with cell.stage("finalize"):
        model = finalize(model).eval()
        changed = [n for n, value in model.state_dict().items() if n in before and not torch.equal(before[n], value)]
        cell.found["changed_tensors"] = len(changed)
        if not changed:
            raise ValueError("training changed nothing")
    if bits != "fp32":
        with cell.stage("quantize"):
            model = quantized(family, model)
    with cell.stage("export"):
        export(family, model, column, cell)


def adaptation(family: Family, model: nn.Module) -> Technique:
    """LoRA on every linear and 1x1 convolution that is called and belongs to itself, or a scheme."""
    if family.adapt != "lora":
        return SparseUpdate(scheme=family.adapt)
    return LoRA(rank=4, targets=adaptable(model), skip=family.skip)


def adaptable(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that LoRA goes on."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = []
    for name, layer in model.named_modules():
        pointwise = isinstance(layer, (nn.Conv1d, nn.Conv2d)) and set(layer.kernel_size) == {1} and layer.groups == 1
        plain = type(layer) is nn.Linear or pointwise
        if plain and kind_of(layer) in LoRA.adapts and all(owners[id(p)] == 1 for p in layer.parameters()):
            found.append(name)
    return tuple(found)


def train(family: Family, model: nn.Module) -> None:
    """Some steps on random labels, one label for each row of logits."""
    model.train()
    draw = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for _ in range(STEPS):
        logits = logits_of(call(model, family.inputs(BATCH)))
        flat = logits.reshape(-1, logits.shape[-1])
        labels = torch.randint(0, flat.shape[-1], (len(flat),), generator=draw)
        functional.cross_entropy(flat, labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def quantized(family: Family, model: nn.Module) -> nn.Module:
    """In int8 with calibration rows of its own, or in int4."""
    if family.bits == "int4":
        return apply(model, Int4(skip=family.skip_bits)).eval()
    inputs = family.inputs(4 * BATCH)
    sample = Sample(rows_of(inputs, 0, 2), lambda: (rows_of(inputs, s, s + BATCH) for s in range(0, 4 * BATCH, BATCH)))
    return apply(model, Int8(skip=family.skip_bits), sample).eval()


def run_here(
    path: str | Path, batches: Sequence[tuple[Tensor, ...]], *, method: str = "forward", data: Path | None = None
) -> list[tuple[Tensor, ...]]:
    """In place of `edgetune.runtime.run.run_in_child`: a cell is a process of its own already."""
    assert (method, data) == ("forward", None)
    program = load_runtime(None)._load_for_executorch(str(path))
    ordered = [tuple(tensor.contiguous() for tensor in row) for row in batches]
    return [tuple(tensor.clone() for tensor in program.forward(row)) for row in ordered]


def export(family: Family, model: nn.Module, column: str, cell: Cell) -> None:
    """Lower, run, compare; the manifest's figures go into the cell."""
    verify.run_in_child = run_here
    bits = cell.found["bits"]
    target = column if column in ("coreml", "vulkan") else "xnnpack"
    rows = family.inputs(ROWS)
    with tempfile.TemporaryDirectory() as folder:
        artifact = to_program(
            model, rows, Path(folder) / "model.pte",
            target=target, one_row=True, min_same_prediction_pct=0.0,
        )  # fmt: skip
        known = artifact.manifest
    cell.found |= {
        "delegates": known.main.delegates,
        "delegated_macs_pct": known.main.delegated_macs_pct,
        "delegated_operators_pct": known.main.delegated_operators_pct,
        "size_bytes": known.size_bytes,
        "plan_bytes": known.main.plan_bytes,
        "macs": sum(o.macs for o in known.main.operators),
        "undelegated_kernels": [operator.model_dump() for operator in known.main.undelegated],
        "undelegated": undelegated(known.main.operators),
    }
    if known.main.parity is not None:
        cell.found |= {
            "rows": known.main.parity.rows,
            "same_prediction_pct": known.main.parity.same_prediction_pct,
            "max_abs_difference": known.main.parity.max_abs_difference,
            **spread(model, rows),
        }
        cell.found["relative_difference"] = known.main.parity.max_abs_difference / cell.found["largest_output"]
        if bits == "fp32":
            cell.found["eager_rounding"] = rounding(model, rows_of(rows, 0, BATCH)) / cell.found["largest_output"]


def undelegated(operators: Any) -> list[dict[str, Any]]:
    """The operators outside of a delegate that multiply, most work first."""
    left = [o for o in operators if not o.delegated and o.macs]
    left.sort(key=lambda o: -o.macs)
    return [{"operator": o.operator, "module": o.module, "macs": o.macs, "shape": list(o.output_shape)} for o in left]


@torch.inference_mode()
def spread(model: nn.Module, rows: Inputs) -> dict[str, float]:
    """The largest output in eager mode, and the share of rows with the most frequent prediction."""
    outputs: list[Tensor] = [logits_of(call(model, rows_of(rows, s, s + 20))) for s in range(0, ROWS, 20)]
    whole = torch.cat(outputs)
    predictions = whole.argmax(-1)
    usual = predictions.mode(0).values
    return {
        "largest_output": float(whole.abs().max()),
        "most_frequent_prediction_pct": 100.0 * float((predictions == usual).float().mean()),
    }


@torch.inference_mode()
def rounding(model: nn.Module, inputs: Inputs) -> float:
    """How far eager mode is from itself in double precision: what no program can be held closer than. Ends `model`.

    The grouped product that a mixture of experts uses by itself has no double precision.
    """
    single = logits_of(call(model, inputs))
    wide = [t.double() if t.is_floating_point() else t for t in tensors_of(inputs)]
    doubled: Inputs = dict(zip(inputs, wide, strict=True)) if isinstance(inputs, dict) else tuple(wide)
    with static_experts(model):
        return float((logits_of(call(model.double(), doubled)) - single).abs().max())


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(FAMILIES[sys.argv[1]], sys.argv[2], Path(sys.argv[3]))
