"""Small checkpoints on disk, as transformers saves them, with a tokenizer of ten words; and folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edgetune as et
from edgetune.core.ledger import Ledger

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "text", "very"]


def save_tokenizer(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tokenizer = transformers.BertTokenizer(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_bert(folder: Path, kind: str = "SequenceClassification", **changes: Any) -> Any:
    import transformers

    save_tokenizer(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), **{"max_position_embeddings": 32, "num_labels": 2, **sizes, **changes}
    )
    model = getattr(transformers, "BertModel" if kind == "Model" else f"BertFor{kind}")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return model.eval()


def save_llama(folder: Path, **changes: Any) -> Any:
    import transformers

    save_tokenizer(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), max_position_embeddings=32, **{"num_key_value_heads": 1, **sizes, **changes}
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model.eval()


def save_rows(path: Path) -> None:
    """Sixty texts of two classes, of seven lengths."""
    rows = [f"{'good' if n % 2 else 'bad'} text {'very ' * (n % 7)}a,{n % 2}" for n in range(60)]
    path.write_text("\n".join(["text,label", *rows]), encoding="utf-8")


def save_images(folder: Path, count: int = 20) -> None:
    """Noise of two classes, "dark" and "light", in one folder each."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for number, name in enumerate(("dark", "light")):
        (folder / name).mkdir(parents=True)
        for n in range(count):
            pixels = generator.integers(120 * number, 120 * number + 60, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{n}.png")


def run_steps(steps: str) -> Ledger:
    """The ledger of a run of these steps with a small encoder, in the working directory."""
    save_bert(Path("encoder"), "Model", hidden_size=64, intermediate_size=128)
    save_rows(Path("rows.csv"))
    Path("r.yaml").write_text(
        f"model: {{source: 'hf:encoder', max_length: 8}}\ndata: csv:rows.csv\nsteps: [{steps}]", encoding="utf-8"
    )
    et.run("r.yaml", out="run")
    return Ledger.read(Path("run/ledger.json"))
