"""The report: golden text for the terminal, structure and content of the page."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
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
    Quality,
    Row,
    Training,
)
from edgetune.core.widths import BitWidths, LayerWidth, MeasuredWidths
from edgetune.report import Terminal, page, report, text, write
from edgetune.report.drawing import BLUE
from edgetune.report.sentences import details
from edgetune.report.tables import step_table
from edgetune.report.width_figures import width_figure, width_table, width_tables
from support.reports import accuracy, example, left_out, read

GOLDEN = Path(__file__).with_name("golden") / "report.txt"


def test_text_at_80_columns_is_golden(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--update"):
        GOLDEN.write_text(text(example(), 80), encoding="utf-8")
    assert text(example(), 80) == GOLDEN.read_text(encoding="utf-8")


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
    Console(file=file, width=120, height=100, color_system=None, legacy_windows=False).print(Terminal(example()))
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


def test_page_holds_every_plot_with_the_numbers_of_the_ledger(tmp_path: Path) -> None:
    ledger = example()
    page(ledger, tmp_path / "report.html")
    reading, figures = read(tmp_path / "report.html")
    assert set(figures) == {
        "quality-size",
        "saved",
        "loss-0",
        "loss-1",
        "latency",
        "memory",
        "delegated",
        "undelegated",
    }
    divs = {div.get("id"): div for div in reading.named("div")}
    for key in figures:
        assert divs[f"plot-{key}"]["role"] == "img"
        assert divs[f"plot-{key}"]["aria-label"]
    data = {key: figure["spec"]["data"] for key, figure in figures.items()}
    assert data["quality-size"][0]["x"] == [row.size_mib for row in ledger.rows]
    assert data["quality-size"][0]["y"] == [row.quality.value for row in ledger.rows if row.quality]
    assert data["saved"][0]["x"] == [row.saved_for_backward_mib for row in ledger.rows[:-1]]
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


def mixed() -> Ledger:
    """The example, its last step with a precision for each layer."""
    measured = [
        ("this", 6.0, 17.0, 0.02), ("uniform", 5.0, 16.0, 0.09), ("random", 5.9, 16.8, 0.05),
        ("all in 8 bits", 8.5, 23.0, 0.001), ("all in 4 bits", 5.0, 16.0, 0.09),
    ]  # fmt: skip
    widths = BitWidths(
        layers=(
            LayerWidth(layer="encoder.query", width="int4", bits=4.5, share_pct=20.25, loss=0.0125),
            LayerWidth(layer="encoder.table", width="int8", bits=8.25, share_pct=61.5, loss=0.00375),
            LayerWidth(layer="head", width="int8", bits=None, share_pct=0.5, loss=0.001),
        ),
        loss="what rounding costs",
        measured=tuple(
            MeasuredWidths(name=name, average_bits=bits, size_mib=size, kl_divergence=kl)
            for name, bits, size, kl in measured
        ),
    )
    rows = example().rows
    return example().with_(rows=(*rows[:-1], rows[-1].model_copy(update={"widths": widths})))


def test_precisions_of_layers_are_drawn_beside_other_choices_and_listed(tmp_path: Path) -> None:
    page(mixed(), tmp_path / "report.html")
    reading, figures = read(tmp_path / "report.html")
    page(example(), tmp_path / "plain.html")
    assert set(figures) == {*read(tmp_path / "plain.html")[1], "widths-7"}
    spec = figures["widths-7"]["spec"]
    assert spec["layout"]["yaxis"]["title"]["text"] == "KL divergence on held-out batches, nats"
    assert spec["layout"]["yaxis"]["type"] == "log"
    (points,) = spec["data"]
    assert (points["x"], points["y"]) == ([17.0, 16.0, 16.8, 23.0], [0.02, 0.09, 0.05, 0.001])
    assert points["text"] == ["this choice", "best uniform<br>all in 4 bits", "random", "all in 8 bits"]
    assert [color for color in points["marker"]["color"] if color != points["marker"]["color"][1]] == [BLUE]
    table = width_tables(mixed())[0]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["encoder.query", "int4", "4.50", "0.0125", "20.2"],
        ["encoder.table", "int8", "8.25", "0.00375", "61.5"],
        ["head", "int8", "-", "0.00100", "0.5"],
        ["all else", "-", "-", "-", "17.8"],
    ]
    for words in ("Precision of the layers after 7 int4", "Predicted loss: what rounding costs", "only the scales"):
        assert words in reading.said


def test_precisions_that_were_written_are_listed_alone() -> None:
    (row,) = (row for row in mixed().rows if row.widths)
    assert row.widths is not None
    written = row.widths.model_copy(
        update={"loss": "", "measured": (), "layers": (LayerWidth(layer="a", width="float", bits=32, share_pct=100),)}
    )
    assert width_figure(written, "7 bits") is None
    assert [cell.text for cell in width_table(written, "7 bits").rows[0]] == ["a", "float", "32.0", "-", "100.0"]
    same = [one.model_copy(update={"kl_divergence": 0.0}) for one in row.widths.measured]
    figure = width_figure(row.widths.model_copy(update={"measured": tuple(same)}), "7 bits")
    assert figure is not None
    assert "type" not in figure.spec["layout"]["yaxis"]


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
        pytest.param(empty.with_(rows=(whole.rows[0], failed)), {"quality-size", "saved"},
                     "stopped at update 2: the loss is not finite", id="failed"),
        pytest.param(whole.with_(program=None, measured=(), predicted=(), verdicts=(), trainings=()),
                     {"quality-size", "saved"}, "no program was exported", id="no program"),
        pytest.param(whole.with_(rows=tuple(row.model_copy(update={"quality": None}) for row in whole.rows)),
                     {"saved", "loss-0", "loss-1", "latency", "memory", "delegated", "undelegated"},
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
            {"quality-size", "saved", "loss-0", "latency", "memory", "delegated", "undelegated"},
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
