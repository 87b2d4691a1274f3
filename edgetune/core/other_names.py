"""Other libraries' names for our settings and steps, so that an error can suggest the right one."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable
from pathlib import Path

SETTINGS = {  # peft, transformers, torch, ultralytics, torch-pruning, torchao -> ours, the likeliest first
    "r": ("rank",),
    "lora_r": ("rank",),
    "lora_rank": ("rank",),
    "lora_alpha": ("alpha",),
    "scaling": ("alpha",),
    "lora_dropout": ("dropout",),
    "p": ("dropout",),
    "target_modules": ("targets",),
    "modules": ("targets",),
    "layers": ("targets",),
    "target": ("targets",),
    "exclude_modules": ("skip",),
    "exclude": ("skip",),
    "ignore": ("skip",),
    "ignored_layers": ("skip",),
    "modules_to_save": ("also_train",),
    "use_dora": ("dora",),
    "use_rslora": ("rslora",),
    "lr": ("learning_rate",),
    "lr0": ("learning_rate",),
    "learningrate": ("learning_rate",),
    "loraplus_lr_ratio": ("learning_rate_ratio",),
    "bs": ("batch_size",),
    "batch": ("batch_size",),
    "batchsize": ("batch_size",),
    "train_batch_size": ("batch_size",),
    "per_device_train_batch_size": ("batch_size",),
    "epoch": ("epochs",),
    "n_epochs": ("epochs",),
    "num_epochs": ("epochs",),
    "max_epochs": ("epochs",),
    "num_train_epochs": ("epochs",),
    "steps": ("updates",),
    "max_steps": ("updates",),
    "num_steps": ("updates",),
    "iterations": ("updates",),
    "wd": ("weight_decay",),
    "decay": ("weight_decay",),
    "optim": ("optimizer",),
    "opt": ("optimizer",),
    "scheduler": ("schedule",),
    "lr_scheduler": ("schedule",),
    "lr_scheduler_type": ("schedule",),
    "warmup": ("warmup_pct",),
    "warmup_ratio": ("warmup_pct",),
    "warmup_steps": ("warmup_pct",),
    "grad_accum": ("accumulate",),
    "accumulate_grad_batches": ("accumulate",),
    "gradient_accumulation": ("accumulate",),
    "gradient_accumulation_steps": ("accumulate",),
    "clip": ("clip_norm",),
    "grad_clip": ("clip_norm",),
    "max_grad_norm": ("clip_norm",),
    "gradient_clip_val": ("clip_norm",),
    "load_best_model_at_end": ("keep_best",),
    "save_steps": ("checkpoint_every",),
    "temp": ("temperature",),
    "groupsize": ("group_size",),
    "group": ("group_size",),
    "q_group_size": ("group_size",),
    "blocksize": ("block_size", "group_size"),
    "sparsity": ("ratio",),
    "amount": ("ratio",),
    "pruning_ratio": ("ratio",),
    "path": ("source",),
    "name": ("source",),
    "id": ("source",),
    "model": ("source",),
    "dataset": ("source",),
    "file": ("source",),
    "max_len": ("max_length",),
    "max_seq_len": ("max_length",),
    "max_seq_length": ("max_length",),
    "seq_len": ("max_length",),
    "imgsz": ("image_px",),
    "image_size": ("image_px",),
    "img_size": ("image_px",),
    "text_column": ("text",),
    "label_column": ("label",),
    "labels": ("label",),
    "test_size": ("test_pct",),
    "val_size": ("validation_pct",),
    "backend": ("target",),
}
STEPS = {
    "dora": "lora",
    "qlora": "nf4",
    "peft": "lora",
    "finetune": "train",
    "fine-tune": "train",
    "fit": "train",
    "distill": "train",
    "evaluate": "eval",
    "test": "eval",
    "validate": "eval",
    "merge": "finalize",
    "quantize": "int8",
    "quantization": "int8",
    "8da4w": "int4",
    "8da8w": "int8_dynamic",
    "gptq": "int4",
    "smoothquant": "smooth",
    "cle": "equalize",
    "cross-layer-equalization": "equalize",
    "quarot": "rotate",
    "kmeans": "palettize",
    "codebook": "palettize",
    "lut": "palettize",
    "spinquant": "rotate",
    "fake-quantize": "qat",
    "sparsify": "sparse-update",
}


def nearest(name: str, allowed: Iterable[str], cutoff: float = 0.6) -> str:
    """The allowed name that was probably meant, by another library's name for it or by its spelling; else empty.

    >>> nearest("lr", ["epochs", "learning_rate"]), nearest("LoRA", ["lora"]), nearest("colour", ["rank"])
    ('learning_rate', 'lora', '')
    """
    plain = {_normalize(each): each for each in reversed(list(allowed))}
    for ours in (*SETTINGS.get(name.lower(), ()), STEPS.get(name.lower(), "")):
        if ours in plain.values():
            return ours
    wanted = _normalize(name)
    close = difflib.get_close_matches(wanted, plain, n=3, cutoff=cutoff)
    swapped = [each for each in close if sorted(each) == sorted(wanted)]  # two letters in the wrong order
    return plain[(swapped or close)[0]] if close else ""


def _normalize(name: str) -> str:
    return name.lower().replace("_", "-")


PREFIXES = {
    "huggingface": "hf",
    "hub": "hf",
    "transformers": "hf",
    "datasets": "hf",
    "json": "jsonl",
    "ndjson": "jsonl",
    "tsv": "csv",
    "table": "csv",
    "folder": "imagefolder",
    "images": "imagefolder",
    "image": "imagefolder",
    "python": "py",
    "torchvision": "timm",
}
NO_MODELS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".xlsx", ".onnx", ".tflite", ".gguf", ".h5", ".keras")
SUFFIXES = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}


def nearest_source(source: str, table: Iterable[str], data: bool) -> str:
    """The source of a model or data set that was probably meant by an unknown one; else empty.

    >>> models, tables = ["minilm", "hf", "timm"], ["tweets", "csv", "jsonl", "imagefolder"]
    >>> nearest_source("tinybert", models, False), nearest_source("minilmm", models, False)
    ('hf:tinybert', 'minilm')
    >>> nearest_source("cvs:a.csv", tables, True), nearest_source("a.jsonl", tables, True)
    ('csv:a.csv', 'jsonl:a.jsonl')
    """
    kinds = list(table)
    kind, colon, rest = source.partition(":")
    written = SUFFIXES.get(Path(source).suffix.lower(), "") if data and not colon else ""
    if written in kinds:
        return f"{written}:{source}"
    page = re.fullmatch(r"https?://huggingface\.co/(?:datasets/)?([\w.-]+/[\w.-]+)/?.*", source)
    if page and "hf" in kinds:
        return f"hf:{page[1]}"
    own = nearest_function(source) if "py" in kinds else ""
    if own:
        return own
    near = PREFIXES.get(kind.lower(), "") if colon else ""
    near = near if near in kinds else nearest(kind, kinds, cutoff=0.66)
    if near:
        return f"{near}{colon}{rest}"
    if colon:
        return ""
    folder = Path(source).expanduser().is_dir()
    kind = "imagefolder" if folder else "" if data or Path(source).suffix.lower() in NO_MODELS else "hf"
    kind = "hf" if folder and not data else kind
    return f"{kind}:{source}" if kind in kinds else ""


def nearest_function(source: str) -> str:
    """`py:FILE.py:FUNCTION` for your own file named in part, such as `net.py` or `net:build`; else empty."""
    file, _, function = source.removeprefix("py:").partition(":")
    path = Path(file if file.endswith(".py") else f"{file}.py").expanduser()
    if not path.is_file():
        return ""
    try:
        lines = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError):
        lines = []
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = [line.name for line in lines if isinstance(line, kinds) and not line.name.startswith("_")]
    return f"py:{path}:{function or ('build' if 'build' in names else (names or ['build'])[0])}"


def nearest_file(path: Path, folders: bool = False) -> str:
    """A file of the same kind (or a folder) next to the path with a similar name; else empty."""
    if not path.parent.is_dir():
        return ""
    beside = [each for each in sorted(path.parent.iterdir()) if each.is_dir() == folders and each.name != path.name]
    files = {each.stem: each.name for each in beside if each.suffix == path.suffix}
    near = nearest(path.stem, files, cutoff=0.75)
    # a slip of the finger seldom hits the first letter: "nothere" is not "other"
    slip = near[:1].lower() == path.stem[:1].lower() or difflib.SequenceMatcher(None, near, path.stem).ratio() > 0.9
    return files[near] if near and slip else ""
