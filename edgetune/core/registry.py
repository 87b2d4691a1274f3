"""Tables from a name to `module:attribute`. Nothing is imported before it is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib import metadata
from typing import Any

from edgetune.core.errors import EdgetuneError
from edgetune.core.other_names import nearest_source
from edgetune.core.quiet import silence_libraries
from edgetune.core.technique import Technique

# peft's own families of adapters: the class is made from peft's config at its first use
PEFT_FAMILIES = {
    "adamss": "AdaMSS",
    "beft": "BEFT",
    "boft": "BOFT",
    "c3a": "C3A",
    "deft": "DEFT",
    "delora": "DeLoRA",
    "fourierft": "FourierFT",
    "frod": "FRoD",
    "gralora": "GraLoRA",
    "hira": "HiRA",
    "hra": "HRA",
    "ia3": "IA3",
    "lily": "Lily",
    "ln_tuning": "LNTuning",
    "loha": "LoHa",
    "lokr": "LoKr",
    "miss": "MiSS",
    "oft": "OFT",
    "osf": "OSF",
    "peanut": "PEANuT",
    "peft-glora": "PeftGLoRA",
    "psoft": "PSOFT",
    "pvera": "PVeRA",
    "randlora": "RandLoRA",
    "road": "RoAd",
    "shira": "SHiRA",
    "supertuning": "SuperTuning",
    "tinylora": "TinyLoRA",
    "trainable_tokens": "TrainableTokens",
    "unilora": "UniLoRA",
    "vblora": "VBLoRA",
    "vera": "VeRA",
    "waveft": "WaveFT",
}

TECHNIQUES = {
    "lora": "edgetune.adapt.lora:LoRA",
    "glora": "edgetune.adapt.glora:GLoRA",
    "glora-search": "edgetune.adapt.glora_search:GLoRASearch",
    "poly": "edgetune.adapt.poly:Poly",
    "prompt": "edgetune.adapt.prompt:Prompt",
    "adaption-prompt": "edgetune.adapt.adaption_prompt:AdaptionPrompt",
    "sherl": "edgetune.adapt.sherl:SHERL",
    "perft": "edgetune.adapt.perft:PERFT",
    "bottleneck": "edgetune.adapt.bottleneck:Bottleneck",
    "lora_guard": "edgetune.adapt.lora_guard:LoRAGuard",
    "lock": "edgetune.adapt.lock:Lock",
    "sparse-update": "edgetune.sparse.update:SparseUpdate",
    "lean": "edgetune.lean.technique:Lean",
    "prune": "edgetune.prune.structured:Prune",
    "depth": "edgetune.prune.depth:Depth",
    "bits": "edgetune.quant.bits:Bits",
    "equalize": "edgetune.quant.equalize:Equalize",
    "int4": "edgetune.quant.int4:Int4",
    "int8": "edgetune.quant.int8:Int8",
    "int8_dynamic": "edgetune.quant.int8_dynamic:Int8Dynamic",
    "outliers": "edgetune.quant.outliers:Outliers",
    "offsets": "edgetune.quant.offsets:Offsets",
    "quik": "edgetune.quant.quik:Quik",
    "qat": "edgetune.quant.qat:QAT",
    "ternary": "edgetune.quant.ternary:Ternary",
    "nf4": "edgetune.quant.nf4:NF4",
    "palettize": "edgetune.quant.palettize:Palettize",
    "rotate": "edgetune.quant.rotate:Rotate",
    "share": "edgetune.quant.share:Share",
    "smooth": "edgetune.quant.smooth:Smooth",
    **{name: f"edgetune.adapt.families:{title}" for name, title in PEFT_FAMILIES.items()},
}

# Steps of a recipe that are no techniques.
STEPS = {
    "train": "edgetune.train.settings:Train",
    "eval": "edgetune.run.fold:Eval",
    "finalize": "edgetune.recipe.sections:Finalize",
}

# name or prefix (before the first colon) -> loader
MODELS = {
    "minilm": "edgetune.models.text:minilm",
    "smollm2": "edgetune.models.causal:smollm2",
    "effnet-lite0": "edgetune.models.vision:effnet_lite0",
    "hf": "edgetune.models.text:hugging_face",
    "timm": "edgetune.models.vision:timm_model",
    "py": "edgetune.models.own:own_model",
}

DATASETS = {
    "tweets": "edgetune.data.text:tweets",
    "tweet-entities": "edgetune.data.text:tweet_entities",
    "word-sentiment": "edgetune.data.text:word_sentiment",
    "conversations": "edgetune.data.text:conversations",
    "fashion-mnist": "edgetune.data.vision:fashion_mnist",
    "csv": "edgetune.data.tables:from_csv",
    "jsonl": "edgetune.data.tables:from_jsonl",
    "conll": "edgetune.data.tables:from_conll",
    "imagefolder": "edgetune.data.vision:from_imagefolder",
    "hf": "edgetune.data.tables:from_hub",
    "py": "edgetune.data.own:own_splits",
}

TASKS = {
    "text-classification": "edgetune.tasks.text_classification:TextClassification",
    "image-classification": "edgetune.tasks.image_classification:ImageClassification",
    "causal-lm": "edgetune.tasks.causal_lm:CausalLM",
    "regression": "edgetune.tasks.regression:Regression",
    "token-classification": "edgetune.tasks.token_classification:TokenClassification",
}

# what a missing import needs
EXTRAS = {
    "peft": "lora",
    "bitsandbytes": "nf4",
    "torchao": "export",
    "executorch": "export",
    "flatbuffers": "export",
    "transformers": "text",
    "PIL": "vision",
    "timm": "timm",
    "sklearn": "baselines",
    "scipy": "export",
    "datasets": "hub",
    "plotly": "report",
    "lightning": "lightning",
}


def load(path: str) -> Any:
    """Import `module:attribute`."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def loader(table: Mapping[str, str], kind: str, source: str) -> Callable[..., Any]:
    """The loader of a source such as `tweets` or `csv:rows.csv`; the part after the colon is its first argument."""
    name, _, argument = source.partition(":")
    if name not in table:
        raise unknown_source_error(table, kind, source)
    load_source = load(table[name])

    def load_quietly(*rest: Any) -> Any:
        with nullcontext() if name == "py" else silence_libraries():  # libraries import more while they load
            return load_source(argument, *rest)

    return load_quietly


def unknown_source_error(table: Mapping[str, str], kind: str, source: str) -> EdgetuneError:
    """The error for a source of an unknown kind, with what was probably meant."""
    near = nearest_source(source, table, table is DATASETS)
    action = "download the file first, and give its path" if "://" in source and not near else ""
    return EdgetuneError(f"unknown {kind}", got=source, allowed=sorted(table), near=near, action=action)


def technique_class(name: str) -> type[Technique]:
    """The technique class of a recipe name."""
    if name not in TECHNIQUES:
        raise EdgetuneError("unknown technique", got=name, allowed=sorted(TECHNIQUES))
    kind: type[Technique] = load(TECHNIQUES[name])
    return kind


def require(module: str, purpose: str) -> Any:
    """Import an optional dependency; the error names the extra that installs it."""
    try:
        with silence_libraries():
            return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        package = module.partition(".")[0]
        action = f'pip install "edgetune[{EXTRAS.get(package, "all")}]"'
        if isinstance(error, RuntimeError):
            if "torchvision" not in str(error):
                raise
            # an ordinary torchvision beside a torch without CUDA says "operator torchvision::nms does not exist"
            action = "install torch and torchvision from the same index, both for the CPU or both for CUDA"
        raise EdgetuneError(
            f"{purpose} needs {package}, which could not be imported ({error})", action=action
        ) from error


def installed_version(package: str) -> str | None:
    """The version of an installed package; `None` if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
