"""edgetune: fine-tune and compress PyTorch models on and for small devices.

model = et.apply(model, [et.SparseUpdate(scheme="last-2"), et.LoRA(rank=8, targets=["*.query", "*.value"])])
... any training loop ...
model = et.finalize(model)
artifact = et.export(model, example_inputs, "model.pte", device="pixel-8")
profile = et.profile(artifact, device="pixel-8")
"""

from typing import TYPE_CHECKING

from edgetune.adapt.lora import LoRA, load_adapter, save_adapter
from edgetune.attach import apply, finalize
from edgetune.export import export
from edgetune.profile import profile
from edgetune.prune.structured import Prune
from edgetune.quant.int4 import Int4
from edgetune.quant.int8 import Int8
from edgetune.quant.nf4 import NF4
from edgetune.registry import TECHNIQUES
from edgetune.sparse.update import SparseUpdate
from edgetune.technique import EdgetuneError, Sample, Technique

__version__ = "0.1.0"

__all__ = [
    "NF4",
    "TECHNIQUES",
    "EdgetuneError",
    "Int4",
    "Int8",
    "LoRA",
    "Prune",
    "Sample",
    "SparseUpdate",
    "Technique",
    "apply",
    "export",
    "finalize",
    "load_adapter",
    "profile",
    "run",
    "save_adapter",
]

if TYPE_CHECKING:
    from edgetune.pipeline import run
else:

    def __getattr__(name: str) -> object:
        """`run` with all it needs, at its first use: a loop of one's own never pays for it."""
        if name == "run":
            from edgetune.pipeline import run

            return run
        raise AttributeError(f"module 'edgetune' has no attribute {name!r}")
