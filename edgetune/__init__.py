"""edgetune: fine-tune and compress PyTorch models on and for small devices.

model = et.apply(model, [et.SparseUpdate(scheme="last-2"), et.LoRA(rank=8, targets=["*.query", "*.value"])])
... any training loop ...
model = et.finalize(model)
artifact = et.export(model, example_inputs, "model.pte", device="pixel-8")
profile = et.profile(artifact, device="pixel-8")
"""

from typing import TYPE_CHECKING

from edgetune.adapt.files import load_adapter, save_adapter
from edgetune.adapt.lora import LoRA
from edgetune.attach import apply, finalize
from edgetune.export import export
from edgetune.profile import profile
from edgetune.prune.structured import Prune
from edgetune.quant.int4 import Int4
from edgetune.quant.int8 import Int8
from edgetune.quant.nf4 import NF4
from edgetune.registry import TECHNIQUES, load
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
    "export_language",
    "export_methods",
    "export_training",
    "finalize",
    "generate",
    "load_adapter",
    "profile",
    "pull",
    "run",
    "save_adapter",
    "train_pte",
]

if TYPE_CHECKING:
    from edgetune.export.language import export_language
    from edgetune.export.methods import export_methods
    from edgetune.export.training.run import pull, train_pte
    from edgetune.export.training.step import export_training
    from edgetune.generating import generate
    from edgetune.pipeline import run
else:
    _LATER = {
        "run": "edgetune.pipeline:run",
        "generate": "edgetune.generating:generate",
        "export_language": "edgetune.export.language:export_language",
        "export_methods": "edgetune.export.methods:export_methods",
        "export_training": "edgetune.export.training.step:export_training",
        "train_pte": "edgetune.export.training.run:train_pte",
        "pull": "edgetune.export.training.run:pull",
    }

    def __getattr__(name: str) -> object:
        """These with all they need, at their first use: a loop of one's own never pays for it."""
        if name in _LATER:
            return load(_LATER[name])
        raise AttributeError(f"module 'edgetune' has no attribute {name!r}")
