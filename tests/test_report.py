"""The report: golden text for the terminal, structure and content of the page."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.ledger import (
    Baseline,
    Ledger,
    LossPoint,
    Measured,
    Parity,
    Predicted,
    Program,
    Quality,
    Row,
    Training,
    UndelegatedOperator,
    Verdict,
)
from edgetune.report import page, report, terminal, text, write
from edgetune.report.sentences import details
from edgetune.report.tables import step_table


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
        environment={"edgetune": "0.1.0", "torch": "2.13.0", "executorch": "1.4.1", "platform": "EXAMPLE, made up"},
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


GOLDEN = """\
example-minilm  minilm on tweets, seed 0
86.1 MiB and 33.5 % accuracy before, 17.4 MiB and 85.8 % after; 13.1 ms
predicted on the CPU of the Google Pixel 8.
! The budget for pixel-8 is not met: program size is 17.4 MiB, the limit is 16.0
MiB. The lowest value that this recipe can reach is 17.4 MiB.
! Step 5, prune, lost 7.73 points of accuracy (86.93 to 79.20 %); the run ends
at 85.80 %.

Budget of the recipe
                                                            lowest
budget                verdict  device   limit  this run  reachable
──────────────────────────────────────────────────────────────────
latency, ms           met      pixel-8   15.0      13.1       13.1
program size, MiB     missed   pixel-8   16.0      17.4       17.4
training memory, MiB  met      pixel-8    600       583        279
latency: predicted, uncalibrated

Step by step
                  acc.     vs.          train-  size          saved  time
step                 %    load  params    able   MiB    MACs    MiB     s
─────────────────────────────────────────────────────────────────────────
0 load           33.47       -  22.6 M  22.6 M  86.1  1.36 G    412  1.90
1 sparse-update  33.47    0.00  22.6 M  3.70 M  86.1  1.36 G    141  0.02
2 lora           33.47    0.00  22.6 M  3.77 M  86.4  1.37 G    150  0.11
3 train          86.93  +53.46  22.6 M  3.77 M  86.4  1.37 G    150  94.3
4 finalize       86.93  +53.46  22.6 M  3.70 M  86.1  1.36 G    141  0.06
5 prune          79.20  +45.73  18.4 M  18.4 M  70.3   953 M    302  4.40
6 train          86.40  +52.93  18.4 M  18.4 M  70.3   953 M    302  61.8
7 int4           85.80  +52.33  18.4 M       0  16.9   953 M      -  2.20
  1 sparse-update: scheme last-2
  2 lora: rank 8 on *.query, *.value
  3 train: 2 epochs, AdamW 2e-4
  5 prune: ratio 0.3, widths to 8
  6 train: 1 epoch, distilled from step 4
  7 int4: 8da4w group 32, embeddings int8
Accuracy on 1,500 test rows (95 % interval of the last: 83.9 to 87.5 %).
7: saved for backward not measured: 4-bit weights are not trained

Compared with baselines on the same test set
                              accuracy  this run minus baseline
baseline                             %                   points
───────────────────────────────────────────────────────────────
this run                         85.80                        -
TF-IDF + logistic regression     79.40                    +6.40
majority class                   46.20                   +39.60

Exported program
file                       model.pte, xnnpack, 17.4 MiB
delegated                  98.7 % of the MACs, 81.3 % of the operators
undelegated                12 operators, most often aten.gelu (6)
same prediction as PyTorch 99.8 % of 500 held-out rows
largest output difference  0.0213

Measured
                                          median    p10 to p90  load  peak
device                    runs on             ms            ms    ms   MiB  runs
────────────────────────────────────────────────────────────────────────────────
host (example, 2          CPU, 2 threads    17.7  16.9 to 21.4  38.0  61.2   200
threads)
Peak memory is that of the process, less that of an empty process.
host (example, 2 threads): another job was running

Predicted, not measured
                                   latency      interval  peak  cali-   not pre-
device                    runs on       ms            ms   MiB  brated  dicted
────────────────────────────────────────────────────────────────────────────────
pixel-8                   CPU, 5      13.1  8.70 to 19.6  44.0  no      GPU, NPU
                          threads
galaxy-s24                CPU         8.90  6.20 to 12.8  44.0  no      none
raspberry-pi-5            CPU         31.5  23.6 to 42.0  41.5  no      none
jetson-orin-nano          CPU, 6      22.8  17.1 to 30.4  41.5  no      GPU
                          threads
host (example, 2          CPU         16.4  14.8 to 18.1  58.0  yes     none
threads)
Computed from device descriptors for the CPU; nothing here was timed.
pixel-8: memory bandwidth not found
"""


def test_text_at_80_columns_is_golden() -> None:
    assert text(example(), 80) == GOLDEN


def test_text_fits_its_width_and_shows_more_where_there_is_room() -> None:
    for width in (80, 100, 120, 160):
        assert max(len(line) for line in text(example(), width).splitlines()) <= width
    header = next(line for line in text(example(), 160).splitlines() if line.startswith("step "))
    assert "settings" in header
    assert "saved for backward" in text(example(), 120)
    assert "change" not in text(example(), 80)
    assert "change" in text(example(), 120)


def test_predicted_and_measured_stand_in_different_tables() -> None:
    blocks = text(example(), 120).split("\n\n")
    measured = next(block for block in blocks if block.startswith("Measured\n"))
    predicted = next(block for block in blocks if block.startswith("Predicted, not measured"))
    assert "17.7" in measured
    assert "pixel-8" not in measured
    assert "17.7" not in predicted
    assert len(re.findall(r" no( |$)", predicted, re.M)) == 4


def test_terminal_is_what_text_prints() -> None:
    file = io.StringIO()
    Console(file=file, width=120, height=100, color_system=None, legacy_windows=False).print(terminal(example()))
    assert [line.rstrip() for line in file.getvalue().splitlines()] == text(example(), 120).splitlines()


def test_terminal_does_not_read_markup_or_control_characters() -> None:
    said = text(example().with_(model="[bold]x[/bold]\x1b[31m"), 120)
    assert "[bold]x[/bold]" in said
    assert "\x1b" not in said


def test_perplexity_falls_to_the_better() -> None:
    def row(index: int, value: float) -> Row:
        quality = Quality(metric="perplexity", value=value, rows=40)
        return Row(
            index=index, step="eval", quality=quality, parameters=9, trainable_parameters=0, size_mib=1, seconds=0
        )

    ledger = example().with_(rows=(row(0, 20.0), row(1, 12.5)), baselines=(Baseline(name="unigram", value=700.0),))
    cell = step_table(ledger).rows[1][3]
    assert (cell.text, cell.tone) == ("-7.50", "good")
    assert "perplexity 12.50 on 40 test rows. Baselines: unigram 700.00." in details(ledger)[0]


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


def test_page_holds_every_plot_with_the_numbers_of_the_ledger(tmp_path: Path) -> None:
    ledger = example()
    page(ledger, tmp_path / "report.html")
    reading, figures = read(tmp_path / "report.html")
    assert set(figures) == {"quality-size", "kept", "loss-0", "loss-1", "latency", "memory", "delegated", "undelegated"}
    divs = {div.get("id"): div for div in reading.named("div")}
    for key in figures:
        assert divs[f"plot-{key}"]["role"] == "img"
        assert divs[f"plot-{key}"]["aria-label"]
    data = {key: figure["spec"]["data"] for key, figure in figures.items()}
    assert data["quality-size"][0]["x"] == [row.size_mib for row in ledger.rows]
    assert data["quality-size"][0]["y"] == [row.quality.value for row in ledger.rows if row.quality]
    assert data["kept"][0]["x"] == [row.saved_for_backward_mib for row in ledger.rows[:-1]]
    for key, training in zip(("loss-0", "loss-1"), ledger.trainings, strict=True):
        curves = {trace["name"]: trace for trace in data[key]}
        assert curves["loss"]["y"] == [point.loss for point in training.losses]
        assert curves["learning rate"]["y"] == [point.learning_rate for point in training.losses]
        assert curves["learning rate"]["yaxis"] == "y2"
    assert data["delegated"][0]["x"] == [81.3, 98.7]
    assert dict(zip(data["undelegated"][0]["y"], data["undelegated"][0]["x"], strict=True)) == {
        "aten.gelu": 6, "aten.expand_copy": 3, "aten.native_layer_norm": 2, "aten.embedding": 1,
    }  # fmt: skip


def test_page_never_mixes_predicted_with_measured(tmp_path: Path) -> None:
    ledger = example()
    page(ledger, tmp_path / "report.html")
    _, figures = read(tmp_path / "report.html")
    for key, field in (("latency", "latency_ms"), ("memory", "peak_memory_mib")):
        bars = {trace["name"]: trace for trace in figures[key]["spec"]["data"] if trace["type"] == "bar"}
        assert bars["predicted"]["x"] == [getattr(line, field) for line in ledger.predicted]
        assert bars["measured"]["x"] == [getattr(line, field) for line in ledger.measured]
        assert bars["predicted"]["yaxis"] != bars["measured"]["yaxis"]
        assert bars["predicted"]["marker"]["color"] != bars["measured"]["marker"]["color"]
    bands = figures["latency"]["spec"]["data"][0]["error_x"]
    assert bands["array"] == pytest.approx([line.latency_high_ms - line.latency_ms for line in ledger.predicted])
    assert bands["arrayminus"] == pytest.approx([line.latency_ms - line.latency_low_ms for line in ledger.predicted])


def test_page_loads_nothing_and_names_its_tables(tmp_path: Path) -> None:
    page(example(), tmp_path / "report.html")
    reading, _ = read(tmp_path / "report.html")
    for tag, attributes in reading.elements:
        assert not {"src", "href", "srcset", "action"} & set(attributes), tag
    whole = (tmp_path / "report.html").read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert len(whole) < 200_000
    assert not re.search(r"https?://|@import|url\(", whole)
    policy = next(meta for meta in reading.named("meta") if "http-equiv" in meta)["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert len(reading.named("caption")) == len(reading.named("table")) == 9
    wanted = ("0123456789abcdef" * 4, "2.13.0", "learning_rate: 0.0002", "99.8 % of 500 held-out rows", "uncalibrated")
    for word in wanted:
        assert word in reading.said


EVIL = "<script>alert(1)</script></script><!--&amp;\"'"


def test_names_from_outside_stay_text(tmp_path: Path) -> None:
    ledger = example()
    assert ledger.program is not None
    ledger = ledger.with_(
        recipe=EVIL, model=EVIL, data=EVIL, settings={EVIL: EVIL}, environment={EVIL: EVIL}, notes=(EVIL,),
        baselines=(Baseline(name=EVIL, value=1.0),),
        rows=tuple(row.model_copy(update={"step": EVIL, "detail": EVIL, "note": EVIL}) for row in ledger.rows),
        program=ledger.program.model_copy(
            update={"path": EVIL, "target": EVIL, "undelegated": (left_out(EVIL, EVIL, 1),)}),
        measured=tuple(line.model_copy(update={"device": EVIL, "note": EVIL}) for line in ledger.measured),
        predicted=tuple(line.model_copy(update={"device": EVIL, "note": EVIL}) for line in ledger.predicted),
        verdicts=tuple(line.model_copy(update={"device": EVIL, "note": EVIL}) for line in ledger.verdicts),
    )  # fmt: skip
    page(ledger, tmp_path / "report.html")
    reading, figures = read(tmp_path / "report.html")
    assert len(reading.named("script")) == 3
    assert EVIL in reading.said
    # plotly reads a little HTML in its labels: there the names are escaped once more
    drawn = json.dumps([figure["spec"] for figure in figures.values()])
    assert "alert(1)" in drawn
    assert "<script" not in drawn


NAN = float("nan")


def partial() -> list[Any]:
    whole = example()
    assert whole.program is not None
    empty = Ledger(recipe="r", seed=0, model="m", data="d", settings={}, environment={})
    failed = Row(index=1, step="train", parameters=5, trainable_parameters=5, size_mib=1.0, seconds=3.0,
                 note="stopped at update 2: the loss is not finite")  # fmt: skip
    return [
        pytest.param(empty, set(), "no step was finished", id="empty"),
        pytest.param(empty.with_(rows=(whole.rows[0], failed)), {"quality-size", "kept"},
                     "stopped at update 2: the loss is not finite", id="failed"),
        pytest.param(whole.with_(program=None, measured=(), predicted=(), verdicts=(), trainings=()),
                     {"quality-size", "kept"}, "no program was exported", id="no program"),
        pytest.param(whole.with_(rows=tuple(row.model_copy(update={"quality": None}) for row in whole.rows)),
                     {"kept", "loss-0", "loss-1", "latency", "memory", "delegated", "undelegated"},
                     "No quality was measured", id="no quality"),
        pytest.param(
            whole.with_(
                rows=(whole.rows[0], whole.rows[1].model_copy(
                    update={"quality": accuracy(NAN), "size_mib": NAN, "saved_for_backward_mib": NAN, "seconds": NAN})),
                baselines=(Baseline(name="b", value=NAN),),
                trainings=(Training(row=1, losses=(LossPoint(update=1, loss=0.5, learning_rate=1.0),
                                                   LossPoint(update=2, loss=NAN, learning_rate=NAN)),
                                    optimizer_state_mib=NAN, gradients_mib=1.0),),
                program=whole.program.model_copy(update={"delegated_macs_pct": NAN, "size_mib": NAN}),
                predicted=tuple(line.model_copy(update={"latency_high_ms": NAN}) for line in whole.predicted),
                measured=tuple(line.model_copy(update={"latency_ms": math.inf}) for line in whole.measured),
            ),
            {"quality-size", "kept", "loss-0", "latency", "memory", "delegated", "undelegated"},
            "not finite", id="nan"),
    ]  # fmt: skip


@pytest.mark.parametrize(("ledger", "plots", "said"), partial())
def test_partial_ledgers_are_reported_as_far_as_they_go(
    ledger: Ledger, plots: set[str], said: str, tmp_path: Path
) -> None:
    write(ledger, tmp_path)
    reading, figures = read(tmp_path / "report.html")
    assert set(figures) == plots
    for shown in (reading.said, " ".join(text(ledger, 120).split())):
        assert said in shown
        assert not re.search(r"\b(nan|None|inf)\b", shown)


def test_an_unfinished_run_says_so() -> None:
    assert "This run is not finished" in text(example().with_(finished=False))
    assert "This run is not finished" not in text(example())


def test_devices_of_one_name_are_drawn_apart(tmp_path: Path) -> None:
    ledger = example()
    page(ledger.with_(measured=ledger.measured * 2), tmp_path / "report.html")
    _, figures = read(tmp_path / "report.html")
    bars = next(trace for trace in figures["latency"]["spec"]["data"] if trace["name"] == "measured")
    assert len(set(bars["y"])) == 2


def test_report_rebuilds_the_page_from_the_ledger(tmp_path: Path) -> None:
    write(example(), tmp_path)
    assert Ledger.read(tmp_path / "ledger.json") == example()
    first = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    assert report(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger.json", "report.html"]


def test_report_says_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match="no such run folder"):
        report(tmp_path / "absent")
    with pytest.raises(EdgetuneError, match=r"has no ledger\.json"):
        report(tmp_path)
    whole = example().dumps()
    for damaged in ("", whole[: len(whole) // 2], '{"format": 2}', "[]"):
        (tmp_path / "ledger.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(EdgetuneError, match="cannot be read as a ledger") as caught:
            report(tmp_path)
        assert caught.value.exit_code == Exit.DATA
    (tmp_path / "ledger.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EdgetuneError, match="cannot be read as a ledger"):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_without_plotly_the_ledger_is_still_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(EdgetuneError, match="the HTML report needs plotly") as caught:
        write(example(), tmp_path)
    assert "edgetune[report]" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.json"]


def test_a_write_that_fails_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("old", encoding="utf-8")

    def full(source: str, destination: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EdgetuneError, match="no space left on device"):
        page(example(), target)
    assert target.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
