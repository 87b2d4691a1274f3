"""Published measurements: the file, what is learned from them, and that leaving a device out leaves it out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from edgetune.cli.main import main
from edgetune.core.errors import EdgetuneError
from edgetune.profile import device, prior, published, validate
from edgetune.profile.published import Published, PublishedColumn
from edgetune.profile.reference import NETWORKS
from edgetune.profile.reference.language import ARCHITECTURES, QUANTIZATION_SCHEMES, decode, prefill

PHONES = ("oneplus-12", "galaxy-s22")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def known() -> dict[str, device.Device]:
    return {name: device.load(name) for name in device.device_ids()}


@pytest.fixture(scope="module")
def whole(known: dict[str, device.Device]) -> validate.Validation:
    return validate.validate(known)


def table(rows: dict[str, list[float | None]], *devices: str, **changes: Any) -> dict[str, Any]:
    return {
        "engine": "XNNPACK", "setting": "shell", "quantity": "latency_ms", "dtype": "fp32", "source": "made up",
        "columns": [{"device": name} for name in devices], "rows": rows, **changes,
    }  # fmt: skip


def made_up(*tables: dict[str, Any]) -> Published:
    return published.parse({"format": 2, "tables": list(tables)}, "published.yaml")


def bases(known: dict[str, device.Device], networks: tuple[str, ...], names: tuple[str, ...]) -> dict[str, list[float]]:
    """What the predictor says by itself."""
    dummy = made_up(table({network: [1.0] * len(names) for network in networks}, *names))
    found: dict[str, list[float]] = {network: [] for network in networks}
    for row in published.figures_of(dummy):
        found[row.name].append(published.predict_figure(row, known[row.column.device]))
    return found


# --- the file ---


def test_every_shipped_row_is_predicted_or_named(whole: validate.Validation) -> None:
    figures = len(list(published.figures_of(published.load_published())))
    others = len(published.load_published().unpredicted)
    assert len(whole.rows) + sum(one.figures for one in whole.missing) == figures + others
    assert len(whole.rows) > 200
    assert all(one.why and one.source for one in whole.missing)


def test_no_prediction_is_zero_negative_or_infinite(whole: validate.Validation) -> None:
    for row in whole.rows:
        for told in (row.left_out, row.one_row):
            if told is not None:
                assert 0 < told.low <= told.predicted <= told.high < math.inf
                assert told.inside == (told.low <= row.published <= told.high)
                assert told.error_pct == pytest.approx(100 * (told.predicted / row.published - 1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows": {"mobilenet-v9": [1.0]}}, "no such network"),
        ({"rows": {"resnet-18": [1.0, 2.0]}}, "2 figures for 1 columns"),
        ({"rows": {"resnet-18": [0.0]}}, "a figure is positive"),
        ({"rows": {"resnet-18": [float("nan")]}}, "finite"),
        ({"rows": {}}, "at least 1"),
        ({"dtype": None}, "dtype"),
        ({"columns": []}, "at least 1"),
        ({"columns": [{"device": "pixel-8", "threads": 0}]}, "threads"),
        ({"setting": "lab"}, "setting"),
        ({"source": ""}, "source"),
        ({"quantity": "prefill_tokens_per_s", "dtype": None, "rows": {"llama-3.2-1b bf16": [1.0]}}, "its prompt"),
        ({"quantity": "decode_tokens_per_s", "dtype": None, "rows": {"llama-3.2-1b 3-bit": [1.0]}}, "model and scheme"),
        ({"spead": 1}, "spead"),
    ],
)
def test_a_faulty_table_is_refused_with_its_place(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(EdgetuneError, match=rf"published\.yaml: .*{reason}"):
        made_up({**table({"resnet-18": [1.0]}, "pixel-8"), **changes})


def test_a_file_of_another_format_is_refused() -> None:
    with pytest.raises(EdgetuneError, match="format"):
        published.parse({"format": 1, "tables": [table({"resnet-18": [1.0]}, "pixel-8")]}, "published.yaml")
    with pytest.raises(EdgetuneError, match="mapping"):
        published.parse([1], "published.yaml")


def test_a_column_runs_the_device_as_the_source_did(known: dict[str, device.Device]) -> None:
    pi = known["raspberry-pi-4"]
    one, four = (published.device_as_run(pi, PublishedColumn(device=pi.id, threads=threads)) for threads in (1, 4))
    assert (one.thread_count, four.thread_count) == (1, 4)
    slow = published.device_as_run(pi, PublishedColumn(device=pi.id, ghz=0.75))
    assert slow.clusters[0].ghz.value == 0.75
    assert published.device_as_run(pi, PublishedColumn(device=pi.id)) is pi
    columns = [{"device": pi.id, "threads": 1}, {"device": pi.id}]
    rows = published.figures_of(made_up(table({"resnet-18": [1.0, 1.0]}, pi.id, columns=columns)))
    alone, all_cores = (published.predict_figure(row, pi) for row in rows)
    assert alone > all_cores
    with pytest.raises(EdgetuneError, match="cores"):
        published.device_as_run(pi, PublishedColumn(device=pi.id, threads=5))


# --- leaving out ---


def test_a_device_left_out_teaches_nothing_about_itself(known: dict[str, device.Device]) -> None:
    own = bases(known, ("resnet-18", "mobilenet-v1"), PHONES)
    before = validate.validate(known, made_up(table(own, *PHONES)))
    changed = {network: [3 * first, second] for network, (first, second) in own.items()}
    after = validate.validate(known, made_up(table(changed, *PHONES)))
    for old, new in zip(before.rows, after.rows, strict=True):
        same = new.left_out.predicted == pytest.approx(old.left_out.predicted)
        assert same == (new.device == PHONES[0])  # its own rows do not move it, and move the other
        if new.device != PHONES[0]:
            assert new.left_out.predicted == pytest.approx(3 * old.left_out.predicted)


def test_one_row_of_the_device_moves_the_others(known: dict[str, device.Device]) -> None:
    names = (*PHONES, "pixel-8")
    own = bases(known, ("resnet-18", "mobilenet-v1"), names)
    own = {network: [2.5 * first, 1.2 * second, third] for network, (first, second, third) in own.items()}
    found = validate.validate(known, made_up(table(own, *names)))
    used, other = (row for row in found.rows if row.device == PHONES[0])
    assert used.one_row is None
    assert other.one_row is not None
    assert abs(other.one_row.error_pct) < abs(other.left_out.error_pct)


def test_shares_of_a_small_file(known: dict[str, device.Device]) -> None:
    """One phone as predicted, one half as fast again: each predicts the other, 50 % too slow and a third too fast."""
    own = bases(known, ("resnet-18", "mobilenet-v1"), PHONES)
    rows = {network: [first, 1.5 * second] for network, (first, second) in own.items()}
    found = validate.validate(known, made_up(table(rows, *PHONES)))
    assert [row.left_out.error_pct for row in found.rows] == pytest.approx([50, -100 / 3, 50, -100 / 3])
    share = next(s for s in found.shares if s.basis == "device left out" and not s.same_rows)
    assert share.subject == "vision, same engine"
    assert (share.rows, share.within_20_pct, share.within_40_pct) == (4, 0, 50)
    both = [s for s in found.shares if s.same_rows]
    assert [s.rows for s in both] == [2, 2]


def test_a_coarse_or_lonely_row_is_shown_and_not_counted(known: dict[str, device.Device]) -> None:
    own = bases(known, ("resnet-18",), PHONES)
    coarse = table({"resnet-18": [4.0, 4.0]}, *PHONES, rounded_to=1)
    alone = table({"resnet-50": [900.0]}, PHONES[0], engine="Abacus")
    found = validate.validate(known, made_up(table(own, *PHONES), coarse, alone))
    assert [row.counted for row in found.rows] == [True, True, False, False, False]
    assert "too coarse" in found.rows[2].note
    assert "no other device" in found.rows[4].note
    assert {share.subject: share.rows for share in found.shares} == {"vision, same engine": 2}


def test_a_device_without_descriptor_is_named(known: dict[str, device.Device]) -> None:
    found = validate.validate(known, made_up(table({"resnet-18": [1.0, 2.0]}, "pixel-8", "abacus-1")))
    assert [(one.label, one.figures) for one in found.missing] == [("abacus-1", 1)]
    assert len(found.rows) == 1


# --- the prior ---


def test_the_shipped_prior_is_that_of_the_shipped_rows() -> None:
    fresh, shipped = validate.refit(), prior.load_prior()
    for terms in ("offsets", "widths"):
        again = "run `python -m edgetune.profile.validate devices/prior.json`"
        assert getattr(shipped, terms) == pytest.approx(getattr(fresh, terms), abs=1e-3), again


def test_programs_are_told_apart_by_their_products() -> None:
    model = ARCHITECTURES["llama-3.2-1b"]
    assert prior.group_of(NETWORKS["mobilenet-v2"](dtype="fp32")) == "vision fp32"
    assert prior.group_of(NETWORKS["resnet-50"](dtype="int8")) == "vision int8"
    assert prior.group_of(decode(model, QUANTIZATION_SCHEMES["8da4w-g32"], 64)) == "decode 4-bit"
    assert prior.group_of(decode(model, QUANTIZATION_SCHEMES["bf16"])) == "decode 16-bit"
    assert prior.group_of(prefill(model, QUANTIZATION_SCHEMES["8da4w-g32"], 64)) == "prefill 4-bit"
    movement = [o for o in NETWORKS["shufflenet-v2"](dtype="fp32") if o.kind == "data-movement"]
    assert prior.group_of(movement) == "vision fp32"


@pytest.mark.parametrize("name", device.device_ids())
def test_every_device_gets_an_offset_and_a_width(name: str) -> None:
    for group in ("decode 4-bit", "decode 16-bit", "prefill 4-bit", "vision fp32", "vision int8", "vision 16-bit"):
        log, sigma = prior.load_prior().offset(device.load(name), group)
        assert abs(log) < 2
        assert 0.05 < sigma < 2


def test_a_kind_nobody_measured_is_left_as_predicted_and_unsure(known: dict[str, device.Device]) -> None:
    nothing = prior.Prior(offsets={}, widths={})
    assert nothing.offset(known["pixel-8"], "vision fp32") == (0.0, pytest.approx(0.7 / 1.2816))
    assert not nothing.has_data_for(prior.keys_of("vision fp32", known["pixel-8"], "shell"))


def test_one_device_with_many_rows_counts_once() -> None:
    keys = ("kind", "class", "type")
    rows = [prior.Seen("many", keys, 1.0)] * 50 + [prior.Seen("few", keys, 0.0)]
    assert sum(prior.fit_offsets(rows).values()) == pytest.approx(0.5)
    assert sum(prior.fit_offsets(rows[50:]).values()) == pytest.approx(0.0)


def test_the_band_holds_what_it_claims_where_errors_are_alike() -> None:
    import random

    draw = random.Random(5)
    rows = [
        prior.Seen(f"device {n}", ("kind", "class", "type"), draw.gauss(0.2, 0.3)) for n in range(60) for _ in range(3)
    ]
    held = 0
    for name in {row.device for row in rows[:60]}:
        fitted = prior.fit_prior([row for row in rows if row.device != name])
        log, width = fitted.offset_and_width(rows[0].keys)
        held += sum(abs(row.log - log) <= width for row in rows if row.device == name)
    assert 100 * held / 60 == pytest.approx(100 * prior.COVERAGE, abs=10)


# --- what it is held to ---


def test_published_rows_are_predicted_with_their_device_left_out(whole: validate.Validation) -> None:
    left = {s.subject: s for s in whole.shares if s.basis == "device left out" and not s.same_rows}
    assert left["language models, from a shell"].within_20_pct >= 80
    assert left["vision, same engine"].within_40_pct >= 75
    assert left["file size"].within_10_pct == 100
    one = {s.subject: s for s in whole.shares if s.basis == "one row used"}
    same = {s.subject: s for s in whole.shares if s.basis == "device left out" and s.same_rows}
    assert one["vision, same engine"].within_20_pct > same["vision, same engine"].within_20_pct


def test_the_command_tells_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "validate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["valid"] == list(device.device_ids())
    assert {"published", "missing", "shares", "errors"} < set(found)
    assert found["published"][0]["left_out"]["predicted"] > 0
    assert main(["devices", "validate"]) == 0
    text = capsys.readouterr().out
    assert "Not predicted:" in text
    assert "oneplus-12 llama-3.2-1b bf16 decode: 19.2 tokens/s | " in text
    assert "language models, from a shell, device left out: of " in text
