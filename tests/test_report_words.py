"""What the report says in words: the first sentence, what is named at the top, what a prediction is for, the terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import tensor

from edgetune.core.ledger import Answers, Baseline, ClassFigures, Ledger, Predicted, Quality, Row, Verdict
from edgetune.data.rows import Rows
from edgetune.report import page, text
from edgetune.report.answer_tables import confusion_table
from edgetune.report.glossary import TERMS
from edgetune.report.sentences import as_sentence, headline, remarks
from edgetune.tasks.answers import count_answers
from support.reports import Reading, example

DEMO = Path(__file__).resolve().parents[1] / "docs" / "demo.json"


def row(index: int, step: str, value: float | None, rows: int = 1500, metric: Any = "accuracy_pct") -> Row:
    quality = None if value is None else Quality(metric=metric, value=value, rows=rows)
    return Row(index=index, step=step, quality=quality, parameters=9, trainable_parameters=0, size_mib=80.0, seconds=0)


def run(*rows: Row, **more: Any) -> Ledger:
    """A finished run with these rows and nothing else."""
    plain = {"baselines": (), "program": None, "measured": (), "predicted": (), "verdicts": (), "notes": ()}
    return example().with_(**{**plain, "rows": rows, **more})


def reading(ledger: Ledger, folder: Path) -> Reading:
    page(ledger, folder / "report.html")
    found = Reading()
    found.feed((folder / "report.html").read_text(encoding="utf-8"))
    return found


def test_the_first_sentence_is_one_that_a_colleague_understands() -> None:
    ledger = example()
    assert headline(ledger) == (
        "86.1 MiB and 33.5 % accuracy before, 17.4 MiB and 85.8 % after; "
        "13.1 ms predicted on the CPU of the Google Pixel 8."
    )
    assert text(ledger, 160).splitlines()[1] == headline(ledger)


@pytest.mark.parametrize(
    ("ledger", "sentence"),
    [
        (run(), "minilm: no step was finished."),
        (run(row(0, "load", 50.0)), "80.0 MiB and 50.0 % accuracy as loaded; no program was exported."),
        (
            run(row(0, "load", None), row(1, "int4", 50.0)),
            "80.0 MiB before, 80.0 MiB and 50.0 % accuracy after; no program was exported.",
        ),
        (
            run(row(0, "load", 9.5, metric="perplexity"), row(1, "train", 4.25, metric="perplexity")),
            "80.0 MiB and a perplexity of 9.50 before, 80.0 MiB and a perplexity of 4.25 after; "
            "no program was exported.",
        ),
        (
            example().with_(predicted=(), verdicts=()),
            "86.1 MiB and 33.5 % accuracy before, 17.4 MiB and 85.8 % after; "
            "17.7 ms measured on host (example, 2 threads) (CPU, 2 threads).",
        ),
        (
            example().with_(predicted=(), measured=(), verdicts=()),
            "86.1 MiB and 33.5 % accuracy before, 17.4 MiB and 85.8 % after.",
        ),
    ],
)
def test_the_first_sentence_of_other_runs(ledger: Ledger, sentence: str) -> None:
    assert headline(ledger) == sentence


LIMIT = Verdict(device="pixel-8", quantity="latency_ms", limit=5.0, value=13.1, least=8.7, holds=False)


@pytest.mark.parametrize(
    ("ledger", "remark"),
    [
        (run(row(0, "load", 33.0), baselines=(Baseline(name="always bad", value=45.0),)), "is below a simple baseline"),
        (run(row(0, "load", 45.0), baselines=(Baseline(name="always bad", value=45.0),)), "is no better than a simple"),
        (run(row(0, "load", 46.0), baselines=(Baseline(name="always bad", value=45.0),)), "is not clearly better than"),
        (
            run(row(0, "load", 9.0, metric="perplexity"), baselines=(Baseline(name="frequencies", value=8.0),)),
            'is below a simple baseline: "frequencies" reaches 8.00, this run 9.00.',
        ),
        (
            run(row(0, "load", 90.0, rows=20)),
            "only 20 rows, so the accuracy of 90.00 % is uncertain: its 95 % interval",
        ),
        (run(row(0, "load", 90.0), row(1, "int4", 87.9)), "Step 1, int4, lost 2.10 points of accuracy (90.00 to 87.90"),
        (
            run(row(0, "load", 90.0), row(1, "prune", 80.0), row(2, "train", 89.5)),
            "Step 1, prune, lost 10.00 points of accuracy (90.00 to 80.00 %); the run ends at 89.50 %.",
        ),
        (
            run(row(0, "load", 8.0, metric="perplexity"), row(1, "int4", 9.0, metric="perplexity")),
            "Step 1, int4, raised the perplexity by 12 % (8.00 to 9.00).",
        ),
        (
            example().with_(verdicts=(LIMIT,)),
            "latency is 13.1 ms, the limit is 5.00 ms. The lowest value that this recipe",
        ),
        (run(row(0, "load", 90.0), finished=False), "This run is not finished"),
    ],
)
def test_what_falls_short_is_said_at_the_top_of_terminal_and_page(ledger: Ledger, remark: str, tmp_path: Path) -> None:
    assert any(remark in one for one in remarks(ledger)), remarks(ledger)
    lines = text(ledger, 400).splitlines()
    at = next(place for place, line in enumerate(lines) if line.startswith("! ") and remark in line)
    assert at < lines.index("")
    whole = reading(ledger, tmp_path)
    kinds = [attributes.get("class") for tag, attributes in whole.elements]
    assert kinds.index("remark") < kinds.index("block names")


def test_a_program_that_quantizing_made_slower_is_named_with_both_times() -> None:
    float_ms = {"pixel-8": 12.0, "galaxy-s24": 9.5}
    before = tuple(
        line.model_copy(update={"latency_ms": float_ms[line.device]})
        for line in example().predicted
        if line.device in float_ms
    )
    ledger = example().with_(unquantized=before)
    expected = (
        "The quantized program is predicted to be slower than the model in floating point: 13.1 ms against 12.0 ms on "
        "pixel-8. Leave the quantization out, take int8_dynamic, or let edgetune export --fastest-form choose."
    )
    assert expected in remarks(ledger)
    assert not any("floating point" in remark for remark in remarks(example().with_(unquantized=before[1:])))


def test_a_good_run_has_no_remarks() -> None:
    better = run(
        row(0, "load", 40.0),
        row(1, "train", 90.0),
        row(2, "int4", 88.5),
        baselines=(Baseline(name="always bad", value=45.0),),
        verdicts=(LIMIT.model_copy(update={"holds": True}),),
    )
    assert remarks(better) == ()
    worse_by_training = run(row(0, "load", 40.0), row(1, "train", 30.0))
    assert not any("Step 1" in one for one in remarks(worse_by_training)), "training is judged by the baselines"


def test_accuracies_are_told_with_the_interval_of_their_rows() -> None:
    # Wilson's interval, as in R: prop.test(18, 20, correct = FALSE) and prop.test(0, 7, correct = FALSE)
    few = Quality(metric="accuracy_pct", value=90.0, rows=20).interval_pct
    none = Quality(metric="accuracy_pct", value=0.0, rows=7).interval_pct
    assert few == pytest.approx((69.896, 97.213), abs=0.01)
    assert none == pytest.approx((0.0, 35.433), abs=0.01)
    assert Quality(metric="perplexity", value=3.0, rows=20).interval_pct is None
    assert "(95 % interval of the last: 83.9 to 87.5 %)" in text(example(), 160)


def predicted(ledger: Ledger, width: int) -> str:
    blocks = text(ledger, width).split("\n\n")
    return next(block for block in blocks if block.startswith("Predicted, not measured"))


def test_a_prediction_says_what_it_is_for(tmp_path: Path) -> None:
    table = predicted(example(), 160)
    jetson = next(line for line in table.splitlines() if line.startswith("jetson-orin-nano"))
    assert "CPU, 6 threads" in jetson
    assert "GPU: not predicted" in jetson
    phone = next(line for line in table.splitlines() if line.startswith("pixel-8"))
    assert "GPU, NPU: not predicted" in phone
    for width in (80, 100):
        names = [line.split()[0] for line in predicted(example(), width).splitlines() if line[:1].isalpha()]
        assert {"pixel-8", "jetson-orin-nano"} <= set(names), "a device's name stays in one piece"
    whole = reading(example(), tmp_path)
    assert "CPU, 6 threads" in whole.said
    assert "GPU: not predicted" in whole.said
    assert "jetson-orin-nano CPU" in whole.figures


def test_a_real_prediction_knows_threads_and_accelerators() -> None:
    from edgetune.profile.cost import predict
    from edgetune.profile.device import load
    from edgetune.program.operators import Operator

    linear = Operator(
        operator="linear", module="", kind="linear", dtype="fp32", delegated=True, macs=1000, weight_bytes=4000,
        activation_bytes=400, output_shape=(1, 10),
    )  # fmt: skip
    board = predict([linear], load("jetson-orin-nano"))
    assert (board.name, board.runs_on) == ("NVIDIA Jetson Orin Nano 8 GB", "CPU, 6 threads")
    assert board.not_predicted == "GPU: not predicted"
    old = Predicted(device="x", latency_ms=1, latency_low_ms=1, latency_high_ms=1, peak_memory_mib=1, calibrated=False)
    assert (old.runs_on, old.not_predicted) == ("CPU", ""), "a ledger of before"


def answers(classes: int = 3) -> Answers:
    """Twelve rows of which the model gets some wrong, surely."""
    names = [f"class {place}" for place in range(classes)]
    logits = tensor([[float(3 * (place % 4 == column)) for column in range(classes)] for place in range(12)])
    rows = [f"<b>text</b> {place} " + "very long " * 40 for place in range(12)]
    return count_answers(names, Rows(rows, [place % classes for place in range(12)]), logits)


def test_answers_stand_in_terminal_and_page(tmp_path: Path) -> None:
    ledger = example().with_(answers=answers())
    shown = text(ledger, 80)
    assert max(map(len, shown.splitlines())) <= 80
    assert "Classes" in shown
    assert "Most often confused: class 1 predicted as class 0 (2 rows)." in shown
    whole = reading(ledger, tmp_path)
    for heading in ("Classes", "Confusion matrix", "The most confident mistakes"):
        assert heading in whole.said
    assert "<b>text</b>" in whole.said, "escaped"
    assert whole.said.count("very long") > 100
    assert Ledger.model_validate_json(ledger.dumps()) == ledger


def test_thumbnails_are_inlined(tmp_path: Path) -> None:
    import numpy as np

    images = Rows(np.zeros((2, 28, 28), np.uint8), [0, 1])
    ledger = example().with_(answers=count_answers(("a", "b"), images, tensor([[0.0, 2.0], [0.0, 2.0]]), images=True))
    whole = reading(ledger, tmp_path)
    (image,) = [attributes for tag, attributes in whole.elements if tag == "img"]
    assert str(image["src"]).startswith("data:image/png;base64,")
    assert image["alt"] == ""


def test_many_classes_are_told_by_their_confusions() -> None:
    table = confusion_table(answers(13))
    assert table is not None
    assert [column.heading for column in table.columns] == ["true", "prediction", "rows"]
    right = Answers(classes=tuple(ClassFigures(name=str(n), rows=1, predicted=1, right=1) for n in range(13)))
    assert confusion_table(right) is None
    small = confusion_table(answers(3))
    assert small is not None
    assert [cell.text for cell in small.rows[0]] == ["class 0", "2", "1", "1"]


def test_every_term_is_explained_where_it_stands_and_in_the_glossary(tmp_path: Path) -> None:
    whole = reading(example().with_(answers=answers()), tmp_path)
    titles = {attributes["title"] for tag, attributes in whole.elements if tag == "abbr"}
    for term in ("MACs", "points", "saved for backward", "delegated", "calibrated", "interval", "precision", "recall"):
        assert TERMS[term] in titles, term
    for term in ("ledger", "program", "finalize", "MiB", *TERMS):
        assert TERMS[term] in whole.said


def test_a_narrow_screen_shows_every_figure(tmp_path: Path) -> None:
    """Each row of a wide table becomes a card: its cells carry their own headings, the verdict among the first."""
    whole = reading(example(), tmp_path)
    cells = [attributes for tag, attributes in whole.elements if tag == "td"]
    assert all(attributes.get("data-name") is not None for attributes in cells)
    names = [attributes["data-name"] for attributes in cells]
    assert names.index("verdict") < names.index("limit")
    assert [attributes.get("class") for tag, attributes in whole.elements if tag == "table"].count("stacked") >= 4


def test_notes_are_sentences() -> None:
    shown = text(example().with_(notes=("random weights", "hf:tiny was changed.")), 120)
    assert "Random weights." in shown
    assert "hf:tiny was changed." in shown
    assert as_sentence("new weights, not in the checkpoint: a") == "New weights, not in the checkpoint: a."


def test_the_ledger_of_the_readme_is_still_read(tmp_path: Path) -> None:
    ledger = Ledger.read(DEMO)
    lines = text(ledger, 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 80, "make demo prints at most 120 lines, progress included"
    assert not any(line.startswith("step") and "change" in line for line in lines)
    assert "load  params" in text(ledger, 80), "the change from load stays at 80 columns"
    page(ledger, tmp_path / "report.html")
