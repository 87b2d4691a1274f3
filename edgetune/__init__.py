"""edgetune: fine-tune and compress PyTorch models on and for small devices.

model = et.apply(model, [et.SparseUpdate(scheme="last-2"), et.LoRA(rank=8, targets=["*.query", "*.value"])])
... any training loop ...
model = et.finalize(model)
artifact = et.export(model, example_inputs, "model.pte", device="pixel-8")
profile = et.profile(artifact, device="pixel-8")
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "BEFT",
    "BOFT",
    "C3A",
    "DEFT",
    "HRA",
    "IA3",
    "NF4",
    "OFT",
    "OSF",
    "PERFT",
    "PSOFT",
    "QAT",
    "SHERL",
    "TECHNIQUES",
    "AdaMSS",
    "AdaptionPrompt",
    "Bits",
    "Bottleneck",
    "DeLoRA",
    "Depth",
    "EdgetuneError",
    "Equalize",
    "FRoD",
    "FourierFT",
    "GLoRA",
    "GLoRASearch",
    "GraLoRA",
    "HiRA",
    "Int4",
    "Int8",
    "Int8Dynamic",
    "LNTuning",
    "Lean",
    "Lily",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAGuard",
    "Lock",
    "MiSS",
    "Offsets",
    "Outliers",
    "PEANuT",
    "PVeRA",
    "Palettize",
    "PeftGLoRA",
    "Poly",
    "Prompt",
    "Prune",
    "Quik",
    "RandLoRA",
    "RoAd",
    "Rotate",
    "SHiRA",
    "Sample",
    "Share",
    "Smooth",
    "SparseUpdate",
    "SuperTuning",
    "Technique",
    "Ternary",
    "TinyLoRA",
    "Train",
    "TrainableTokens",
    "UniLoRA",
    "VBLoRA",
    "VeRA",
    "WaveFT",
    "apply",
    "combine_adapters",
    "contrastive_loss",
    "evaluate",
    "export",
    "export_language",
    "export_methods",
    "export_training",
    "finalize",
    "generate",
    "load_adapter",
    "load_guard",
    "load_pretrained",
    "locked_features",
    "open_run",
    "penalty",
    "predict",
    "profile",
    "pull",
    "run",
    "save_adapter",
    "save_guard",
    "save_pretrained",
    "split_tasks",
    "train_pte",
]

if TYPE_CHECKING:
    from edgetune.adapt.adaption_prompt import AdaptionPrompt
    from edgetune.adapt.bottleneck import Bottleneck
    from edgetune.adapt.combine import combine_adapters
    from edgetune.adapt.families import (
        BEFT,
        BOFT,
        C3A,
        DEFT,
        HRA,
        IA3,
        OFT,
        OSF,
        PSOFT,
        AdaMSS,
        DeLoRA,
        FourierFT,
        FRoD,
        GraLoRA,
        HiRA,
        Lily,
        LNTuning,
        LoHa,
        LoKr,
        MiSS,
        PEANuT,
        PeftGLoRA,
        PVeRA,
        RandLoRA,
        RoAd,
        SHiRA,
        SuperTuning,
        TinyLoRA,
        TrainableTokens,
        UniLoRA,
        VBLoRA,
        VeRA,
        WaveFT,
    )
    from edgetune.adapt.files import save_adapter
    from edgetune.adapt.glora import GLoRA
    from edgetune.adapt.glora_search import GLoRASearch
    from edgetune.adapt.guard_files import load_guard, save_guard
    from edgetune.adapt.loading import load_adapter
    from edgetune.adapt.lock import Lock, locked_features
    from edgetune.adapt.lora import LoRA
    from edgetune.adapt.lora_guard import LoRAGuard
    from edgetune.adapt.perft import PERFT
    from edgetune.adapt.poly import Poly, split_tasks
    from edgetune.adapt.prompt import Prompt
    from edgetune.adapt.sherl import SHERL
    from edgetune.core.apply import apply, finalize, penalty
    from edgetune.core.errors import EdgetuneError
    from edgetune.core.registry import TECHNIQUES
    from edgetune.core.technique import Sample, Technique
    from edgetune.export import export
    from edgetune.export.language import export_language
    from edgetune.export.methods import export_methods
    from edgetune.export.training.pull import pull
    from edgetune.export.training.step import export_training
    from edgetune.lean.technique import Lean
    from edgetune.profile import profile
    from edgetune.prune.checkpoint import load_pretrained, save_pretrained
    from edgetune.prune.depth import Depth
    from edgetune.prune.structured import Prune
    from edgetune.quant.bits import Bits
    from edgetune.quant.equalize import Equalize
    from edgetune.quant.int4 import Int4
    from edgetune.quant.int8 import Int8
    from edgetune.quant.int8_dynamic import Int8Dynamic
    from edgetune.quant.nf4 import NF4
    from edgetune.quant.offsets import Offsets
    from edgetune.quant.outliers import Outliers
    from edgetune.quant.palettize import Palettize
    from edgetune.quant.qat import QAT
    from edgetune.quant.quik import Quik
    from edgetune.quant.rotate import Rotate
    from edgetune.quant.share import Share
    from edgetune.quant.smooth import Smooth
    from edgetune.quant.ternary import Ternary
    from edgetune.run.finished import open_run
    from edgetune.run.pipeline import run
    from edgetune.run.predicting import evaluate, predict
    from edgetune.runtime.generating import generate
    from edgetune.runtime.training import train_pte
    from edgetune.sparse.update import SparseUpdate
    from edgetune.tasks.pairs import contrastive_loss
    from edgetune.train.settings import Train
else:
    import importlib
    import sys
    from types import ModuleType

    _HOMES = {
        "AdaptionPrompt": "adapt.adaption_prompt",
        "Bits": "quant.bits",
        "Bottleneck": "adapt.bottleneck",
        "Depth": "prune.depth",
        "EdgetuneError": "core.technique",
        "Equalize": "quant.equalize",
        "GLoRA": "adapt.glora",
        "GLoRASearch": "adapt.glora_search",
        "Int4": "quant.int4",
        "Int8": "quant.int8",
        "Int8Dynamic": "quant.int8_dynamic",
        "Lean": "lean.technique",
        "LoRA": "adapt.lora",
        "LoRAGuard": "adapt.lora_guard",
        "Lock": "adapt.lock",
        "NF4": "quant.nf4",
        "Offsets": "quant.offsets",
        "Outliers": "quant.outliers",
        "Palettize": "quant.palettize",
        "QAT": "quant.qat",
        "PERFT": "adapt.perft",
        "Poly": "adapt.poly",
        "Prompt": "adapt.prompt",
        "Prune": "prune.structured",
        "Quik": "quant.quik",
        "Rotate": "quant.rotate",
        "SHERL": "adapt.sherl",
        "Sample": "core.technique",
        "Share": "quant.share",
        "Smooth": "quant.smooth",
        "SparseUpdate": "sparse.update",
        "TECHNIQUES": "core.registry",
        "Technique": "core.technique",
        "Ternary": "quant.ternary",
        "Train": "train.settings",
        "apply": "core.apply",
        "contrastive_loss": "tasks.pairs",
        "combine_adapters": "adapt.combine",
        "evaluate": "run.predicting",
        "export": "export",
        "export_language": "export.language",
        "export_methods": "export.methods",
        "export_training": "export.training.step",
        "finalize": "core.apply",
        "generate": "runtime.generating",
        "load_adapter": "adapt.loading",
        "load_guard": "adapt.guard_files",
        "load_pretrained": "prune.checkpoint",
        "locked_features": "adapt.lock",
        "open_run": "run.finished",
        "penalty": "core.apply",
        "predict": "run.predicting",
        "profile": "profile",
        "pull": "export.training.pull",
        "run": "run.pipeline",
        "save_adapter": "adapt.files",
        "save_guard": "adapt.guard_files",
        "save_pretrained": "prune.checkpoint",
        "split_tasks": "adapt.poly",
        "train_pte": "runtime.training",
    }
    _FAMILIES = (
        "BEFT", "BOFT", "C3A", "DEFT", "HRA", "IA3", "OFT", "OSF", "PSOFT", "AdaMSS", "DeLoRA", "FRoD",
        "FourierFT", "GraLoRA", "HiRA", "LNTuning", "Lily", "LoHa", "LoKr", "MiSS", "PEANuT", "PVeRA",
        "PeftGLoRA", "RandLoRA", "RoAd", "SHiRA", "SuperTuning", "TinyLoRA", "TrainableTokens", "UniLoRA", "VBLoRA",
        "VeRA", "WaveFT",
    )  # fmt: skip
    _HOMES |= dict.fromkeys(_FAMILIES, "adapt.families")

    def __getattr__(name: str) -> object:
        """Each name is imported at its first use: `--version` needs no torch, a loop of one's own no compiler."""
        if name not in _HOMES:
            raise AttributeError(f"module 'edgetune' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"edgetune.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

    class _Package(ModuleType):
        """Keeps `et.export` and `et.profile` the functions: the packages of those names are imported, not assigned."""

        def __setattr__(self, name: str, value: object) -> None:
            if not (name in _HOMES and isinstance(value, ModuleType)):
                super().__setattr__(name, value)

    sys.modules[__name__].__class__ = _Package
