"""timm and torchvision, which lie in a folder of their own: `make test` puts there what tests/assets.txt names.

torchvision's wheel does not fit a CPU build of torch unless two operators are declared, and once it lies beside
Pillow, it breaks transformers.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

TIMM = Path(sys.prefix) / "timm"


def import_timm() -> Any:
    """timm, with what torchvision, which it imports, misses on a machine without its build of torch."""
    if not TIMM.is_dir():
        raise FileNotFoundError("timm: pip install --no-deps --target .venv/timm -r tests/assets.txt")
    if "timm" not in sys.modules:
        sys.path.append(str(TIMM))
        _operators()
    import timm

    return timm


@functools.lru_cache
def _operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def run_with_timm(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, which has `timm` already, and can import the tests' own modules."""
    code = f"from support.timm_apart import import_timm\ntimm = import_timm()\n{code}"
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
