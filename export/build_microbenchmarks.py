"""Build the micro-programs of a calibration: `python -m edgetune.export.build_microbenchmarks FOLDER PART OF QUICK`.

PART of OF takes every OF-th program.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from edgetune.capture.positional import Positional
from edgetune.core.errors import EdgetuneError
from edgetune.core.files import write_atomically
from edgetune.core.registry import technique_class
from edgetune.core.technique import Sample
from edgetune.export.lower import Layout, lower
from edgetune.export.targets import find
from edgetune.profile.micro.program import Micro
from edgetune.profile.trials import is_built, trials


def build_part(folder: Path, part: int, of: int, quick: bool) -> None:
    """Build this part of the programs that are missing, and print each name."""
    torch.set_num_threads(1)
    for trial in (trial for trial in trials(quick)[part::of] if not is_built(folder, trial.name)):
        result = {"name": trial.name}
        try:
            _build(trial, folder)
        except EdgetuneError as error:
            result["error"] = error.what
        print(json.dumps(result), flush=True)


def _build(item: Micro, folder: Path) -> None:
    """Lower one program and write it, without the comparison that `export` makes: it is only timed.

    Inputs stay outside the arena: copying those of a short chain would take as long as its operators.
    """
    model, inputs = item.module().eval(), item.inputs()
    if item.quantize:
        technique = technique_class(item.quantize)()
        model = technique.apply(model, Sample.of(inputs) if technique.needs == "batches" else None)
    lowered = lower(Positional(model, inputs).eval(), inputs, find(item.target), layout=Layout(io_in_plan=False))
    (folder / f"{item.name}.pte").write_bytes(lowered.data)
    torch.save([tensor.contiguous() for tensor in inputs], folder / f"{item.name}.pt")
    operators = [operator.model_dump(mode="json") for operator in lowered.executed]
    write_atomically(folder / f"{item.name}.json", json.dumps(operators))


if __name__ == "__main__":
    build_part(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "quick")
