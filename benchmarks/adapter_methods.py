"""What bench_adapters.py tunes, and the ways in which it does: models, their data, and a method as steps of a recipe.

Each method adapts the linears of the blocks, or stands beside the blocks, with about 0.3 million parameters where its
settings allow that. The classifier is new and trains whole with every method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from quant_models import IMAGES, vit_tiny
from torch import nn

HERE = "py:benchmarks/adapter_methods.py"
PRETRAINED_CLASSES, TUNED_CLASSES = range(5, 10), range(5)  # of Fashion-MNIST
VIT = Path(__file__).resolve().parents[1] / "runs" / "bench-adapters" / "vit-tiny.pt"
PRETRAINING = {"epochs": 3, "batch_size": 64, "learning_rate": 1e-3}


def bert_base() -> tuple[nn.Module, dict[str, Any]]:
    """BERT of 12 blocks, 768 wide, with random weights, and what of its task differs from MiniLM's."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(num_labels=3)), {"blocks": 12, "sherl_width": 30}


@dataclass(frozen=True)
class Task:
    """A pretrained model, the data that it is tuned to, and the size of a training."""

    model: dict[str, Any]  # as in a recipe, like `data`
    data: dict[str, Any]
    updates: int
    batch_size: int
    linears: tuple[str, ...]  # of the blocks
    after: tuple[str, ...]  # the two modules of each block whose outputs its residual connections take
    head: str
    blocks: int
    classes: range | None = None  # of the data, if not all
    lokr: dict[str, int] = field(default_factory=dict)  # a factor that divides all widths, the rest in full
    vera_rank: int = 256
    sherl_width: int = 112
    # a larger model, whose bytes alone are measured, with the settings that it needs instead
    deeper: Callable[[], tuple[nn.Module, dict[str, Any]]] | None = None

    def describe(self) -> str:
        """The sizes, in a sentence."""
        length = f" of up to {self.model['max_length']} tokens" if "max_length" in self.model else ""
        return f"{self.blocks} blocks; trainings of {self.updates} updates of {self.batch_size} rows{length}."


TASKS = {
    "MiniLM": Task(  # on tweets
        model={"source": "minilm", "max_length": 32},
        data={"source": "tweets", "validation_rows": 500, "test_rows": 2000},
        updates=80, batch_size=16, blocks=6,
        linears=("*.query", "*.key", "*.value", "*.dense"), after=("*.output.dense",), head="classifier",
        lokr={"decompose_factor": 6, "rank": 128, "alpha": 128}, deeper=bert_base,
    ),
    "ViT-tiny": Task(  # pretrained on half of the classes of Fashion-MNIST, and tuned to the other half
        model={"source": f"{HERE}:pretrained_vit", "image_px": 32},
        data={**IMAGES, "validation_rows": 2000, "test_rows": 4000}, classes=TUNED_CLASSES,
        updates=80, batch_size=32, blocks=12,
        linears=("*.qkv", "*.attn.proj", "*.fc?"), after=("blocks.*.attn", "blocks.*.mlp"), head="head",
        lokr={"decompose_factor": 4, "rank": 96, "alpha": 96}, vera_rank=192, sherl_width=120,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """How a model is tuned."""

    steps: tuple[dict[str, Any], ...]  # techniques before the training, as in a recipe
    rate: float  # the middle of the learning rates that are tried first
    train: dict[str, Any] = field(default_factory=dict)  # settings of the training, beside its size and rate
    search: dict[str, Any] | None = None  # a technique in the middle of the training


FULL, LORA, DEPTH, GLORA, SHERL = "full", "lora", "lora, last half, lean", "glora, searched", "sherl"


def methods_of(task: Task) -> dict[str, Method]:
    """Every method, by its name in the table."""

    def on_linears(**settings: Any) -> dict[str, Any]:
        return {"targets": list(task.linears), **settings}

    def lora(rank: int = 8, **settings: Any) -> dict[str, Any]:
        return {"lora": on_linears(rank=rank, alpha=2 * rank, **settings)}

    search = {"max_parameters": 300_000, "population": 8, "generations": 4, "parents": 4, "batches": 2}
    return {
        FULL: Method((), 2e-4),
        LORA: Method((lora(),), 1e-3),
        "lora+": Method((lora(),), 2e-4, train={"learning_rate_ratio": 16}),
        DEPTH: Method(({"lean": {}}, lora(16, depth=0.5)), 1e-3),
        GLORA: Method(({"glora": on_linears(rank=8)},), 1e-3, search={"glora-search": search}),
        SHERL: Method(({"sherl": {"width": task.sherl_width}},), 2e-3),
        "dora": Method((lora(dora=True),), 1e-3),
        "lora, frozen A": Method((lora(16, frozen_a=True),), 1e-3),
        "loha": Method(({"loha": on_linears(rank=4)},), 2e-3),
        "lokr": Method(({"lokr": on_linears(**task.lokr)},), 2e-3),
        "hira": Method(({"hira": on_linears(rank=8)},), 2e-3),
        "oft": Method(({"oft": on_linears(oft_block_size=32)},), 1e-3),
        "bottleneck": Method(({"bottleneck": {"targets": list(task.after), "width": 32}},), 1e-3),
        "vera": Method(({"vera": on_linears(rank=task.vera_rank)},), 5e-3),
        "ia3": Method(({"ia3": on_linears()},), 5e-3),
    }


def pretrained_vit(classes: list[str]) -> nn.Module:
    """ViT-tiny with the weights that bench_adapters.py pretrained, and a new head."""
    model: Any = vit_tiny(classes)
    state = torch.load(VIT)
    model.load_state_dict({**state, **{key: value for key, value in model.state_dict().items() if "head." in key}})
    return model
