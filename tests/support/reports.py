"""An example of a run's ledger, and its page as a reader of HTML sees it."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from edgetune.core.ledger import (
    Baseline,
    Ledger,
    LossPoint,
    Measured,
    Predicted,
    Program,
    Quality,
    Row,
    Training,
    UndelegatedOperator,
    Verdict,
)
from edgetune.core.parity import Parity


def left_out(operator: str, module: str, count: int) -> UndelegatedOperator:
    """An operator that the backend did not take."""
    return UndelegatedOperator(operator=operator, module=module, count=count)


def accuracy(value: float) -> Quality:
    return Quality(metric="accuracy_pct", value=value, rows=1500)


def losses(updates: int, start: float, end: float, rate: float) -> tuple[LossPoint, ...]:
    """A made-up curve: falls, wobbles a little, warm-up then cosine."""
    points = []
    for update in range(1, updates + 1):
        done = update / updates
        wobble = 0.12 * math.sin(update * 2.3) * math.cos(update * 0.7)
        warm = min(1.0, update / (0.1 * updates))
        loss = end + (start - end) * math.exp(-4 * done) + wobble * (1 - 0.5 * done)
        points.append(
            LossPoint(update=update, loss=loss, learning_rate=rate * warm * 0.5 * (1 + math.cos(math.pi * done)))
        )
    return tuple(points)


def example() -> Ledger:
    """An EXAMPLE: every number here is made up to look like a run. None was measured."""
    rows = (
        Row(index=0, step="load", detail="minilm, 3 classes", quality=accuracy(33.47), parameters=22_565_379,
            trainable_parameters=22_565_379, size_mib=86.08, macs=1_361_000_000,
            saved_for_backward_mib=412.5, seconds=1.9),
        Row(index=1, step="sparse-update", detail="scheme last-2", quality=accuracy(33.47), parameters=22_565_379,
            trainable_parameters=3_697_155, size_mib=86.08, macs=1_361_000_000,
            saved_for_backward_mib=141.2, seconds=0.02),
        Row(index=2, step="lora", detail="rank 8 on *.query, *.value", quality=accuracy(33.47), parameters=22_639_107,
            trainable_parameters=3_770_883, size_mib=86.36, macs=1_365_700_000,
            saved_for_backward_mib=149.8, seconds=0.11),
        Row(index=3, step="train", detail="2 epochs, AdamW 2e-4", quality=accuracy(86.93), parameters=22_639_107,
            trainable_parameters=3_770_883, size_mib=86.36, macs=1_365_700_000,
            saved_for_backward_mib=149.8, seconds=94.3),
        Row(index=4, step="finalize", detail="lora merged", quality=accuracy(86.93), parameters=22_565_379,
            trainable_parameters=3_697_155, size_mib=86.08, macs=1_361_000_000,
            saved_for_backward_mib=141.2, seconds=0.06),
        Row(index=5, step="prune", detail="ratio 0.3, widths to 8", quality=accuracy(79.2), parameters=18_442_371,
            trainable_parameters=18_442_371, size_mib=70.35, macs=952_700_000,
            saved_for_backward_mib=301.7, seconds=4.4),
        Row(index=6, step="train", detail="1 epoch, distilled from step 4", quality=accuracy(86.4),
            parameters=18_442_371, trainable_parameters=18_442_371, size_mib=70.35, macs=952_700_000,
            saved_for_backward_mib=301.7, seconds=61.8),
        Row(index=7, step="int4", detail="8da4w group 32, embeddings int8", quality=accuracy(85.8),
            parameters=18_442_371, trainable_parameters=0, size_mib=16.9, macs=952_700_000, saved_for_backward_mib=None,
            seconds=2.2, note="saved for backward not measured: 4-bit weights are not trained"),
    )  # fmt: skip
    return Ledger(
        recipe="example-minilm",
        seed=0,
        finished=True,
        model="minilm",
        data="tweets",
        settings={
            "model": "minilm", "data": "tweets", "seed": 0,
            "steps": [{"sparse-update": {"scheme": "last-2"}}, {"lora": {"rank": 8, "targets": ["*.query", "*.value"]}},
                      {"train": {"epochs": 2, "learning_rate": 2e-4}}, {"prune": {"ratio": 0.3, "round_to": 8}},
                      {"train": {"epochs": 1, "distill": True}}, {"int4": {"group": 32}}],
            "export": {"target": "xnnpack"}, "budget": {"device": "pixel-8", "latency_ms": 15.0, "size_mib": 16.0},
        },
        environment={"edgetune": "0.1.0", "torch": "2.13.0", "executorch": "1.5.1", "platform": "EXAMPLE, made up"},
        baselines=(
            Baseline(name="majority class", value=46.2), Baseline(name="TF-IDF + logistic regression", value=79.4),
        ),
        rows=rows,
        trainings=(
            Training(row=3, losses=losses(240, 1.12, 0.34, 2e-4), optimizer_state_mib=28.8, gradients_mib=14.4,
                     peak_memory_mib=279.3),
            Training(row=6, losses=losses(120, 0.71, 0.38, 1e-4), optimizer_state_mib=140.7, gradients_mib=70.4,
                     peak_memory_mib=583.1),
        ),
        program=Program(
            path="model.pte", target="xnnpack", size_mib=17.4, plan_kib=388.0, sha256="0123456789abcdef" * 4,
            delegated_macs_pct=98.7, delegated_operators_pct=81.3,
            undelegated=(
                left_out("aten.native_layer_norm", "encoder.layer.0.attention.LayerNorm", 1),
                left_out("aten.native_layer_norm", "encoder.layer.0.output.LayerNorm", 1),
                left_out("aten.embedding", "embeddings.word_embeddings", 1),
                left_out("aten.gelu", "encoder.layer.0.intermediate", 6),
                left_out("aten.expand_copy", "", 3),
            ),
            parity=Parity(rows=500, same_prediction_pct=99.8, max_abs_difference=0.0213),
        ),
        measured=(
            Measured(device="host (example, 2 threads)", latency_ms=17.7, latency_p10_ms=16.9, latency_p90_ms=21.4,
                     load_ms=38.0, peak_memory_mib=61.2, runs=200, threads=2, note="another job was running"),
        ),
        predicted=(
            Predicted(device="pixel-8", name="Google Pixel 8", threads=5, accelerators=("gpu", "npu"),
                      latency_ms=13.1, latency_low_ms=8.7, latency_high_ms=19.6, peak_memory_mib=44.0,
                      calibrated=False, note="memory bandwidth not found"),
            Predicted(device="galaxy-s24", latency_ms=8.9, latency_low_ms=6.2, latency_high_ms=12.8,
                      peak_memory_mib=44.0, calibrated=False),
            Predicted(device="raspberry-pi-5", latency_ms=31.5, latency_low_ms=23.6, latency_high_ms=42.0,
                      peak_memory_mib=41.5, calibrated=False),
            Predicted(device="jetson-orin-nano", threads=6, accelerators=("gpu",),
                      latency_ms=22.8, latency_low_ms=17.1, latency_high_ms=30.4,
                      peak_memory_mib=41.5, calibrated=False),
            Predicted(device="host (example, 2 threads)", latency_ms=16.4, latency_low_ms=14.8, latency_high_ms=18.1,
                      peak_memory_mib=58.0, calibrated=True),
        ),
        verdicts=(
            Verdict(device="pixel-8", quantity="latency_ms", limit=15.0, value=13.1, least=13.1, holds=True,
                    note="predicted, uncalibrated"),
            Verdict(device="pixel-8", quantity="size_mib", limit=16.0, value=17.4, least=17.4, holds=False),
            Verdict(device="pixel-8", quantity="train_memory_mib", limit=600.0, value=583.1, least=279.3, holds=True),
        ),
    )  # fmt: skip


class Reading(HTMLParser):
    """The page as a reader of HTML sees it: balanced elements, text by element, attributes."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.figures = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            if dict(self.elements[-1][1]).get("id") == "figures":
                self.figures += data
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def said(self) -> str:
        return " ".join("".join(self.words).split())


def read(path: Path) -> tuple[Reading, dict[str, Any]]:
    reading = Reading()
    reading.feed(path.read_text(encoding="utf-8"))
    reading.close()
    assert reading.open == []
    figures: dict[str, Any] = json.loads(reading.figures)
    return reading, figures
