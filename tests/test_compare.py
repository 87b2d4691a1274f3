"""One program on every known device, and what bounds its layers on one."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgetune.cli.main import main
from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import Ledger
from edgetune.export import export
from edgetune.profile import device, listing
from edgetune.profile.adding import copy
from edgetune.profile.calls import predict_calls
from edgetune.profile.device import Device
from edgetune.profile.layers import predict_layers
from edgetune.program.artifact import Artifact
from edgetune.report import report, write
from edgetune.report.compare import compare, text
from edgetune.report.compare_figures import by_device
from edgetune.report.layer_figures import roofline


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(16, 64, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = torch.relu(self.wide(torch.relu(self.stem(x))))
        return self.head(kept.amax((2, 3)))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    with warnings.catch_warnings():  # executorch warns of its own use of deprecated functions while it is imported
        warnings.simplefilter("ignore")
        importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    torch.manual_seed(0)
    return export(
        _Net().eval(), torch.randn(1, 3, 64, 64), tmp_path_factory.mktemp("net") / "net.pte", target="xnnpack"
    )


def small(described: Device, usable_mib: float | None) -> Device:
    """The device with so much memory for an app; `None`: nobody knows what it has."""
    memory = described.memory
    usable = memory.usable_app_memory_mib.model_copy(update={"value": usable_mib})
    changes: dict[str, Any] = {"usable_app_memory_mib": usable}
    if usable_mib is None:
        changes["ram_gib"] = memory.ram_gib.model_copy(update={"value": None})
    return described.model_copy(update={"memory": memory.model_copy(update=changes)})


def test_every_known_device_has_a_line_and_the_fastest_comes_first(artifact: Artifact) -> None:
    found = compare(artifact.path)
    left_out = dict(found.faults)
    assert {line.device for line in found.lines} | set(left_out) == set(device.device_ids())
    assert set(left_out) == {"raspberry-pi-2", "raspberry-pi-zero-w"}
    assert all(reason.startswith("no runtime: 32-bit Arm") for reason in left_out.values())
    predicted = [line.predicted[0].latency_ms for line in found.lines if line.predicted]
    assert predicted == sorted(predicted)
    assert len(predicted) >= 30
    assert found.lines[-1].predicted == ()
    for line in found.lines:
        if line.predicted:
            assert line.predicted == predict_calls(artifact, line.device)
            assert line.fits is True
            assert line.why == ""


def test_a_program_that_cannot_run_somewhere_gets_the_reason_and_no_figure(artifact: Artifact) -> None:
    (line,) = compare(artifact, ["alif-ensemble-e7"]).lines
    assert (line.predicted, line.fits) == ((), False)
    assert line.why == "cannot run xnnpack programs, only ethos-u"
    (row,) = [row for row in text(compare(artifact, ["alif-ensemble-e7"])).splitlines() if row.startswith("alif")]
    assert not any(character.isdigit() for character in row.removeprefix("alif-ensemble-e7").replace("ethos-u", ""))


def test_memory_is_held_against_what_an_app_gets(artifact: Artifact) -> None:
    pixel = device.load("pixel-8")
    (tight,) = compare(artifact, [small(pixel, 0.01)]).lines
    assert tight.fits is False
    assert tight.predicted, "a figure is still given"
    assert "MiB an app gets" in tight.why
    (unknown,) = compare(artifact, [small(pixel, None)]).lines
    assert (unknown.fits, unknown.why) == (None, "memory size unknown")


def test_named_devices_are_compared_once_and_an_unknown_one_is_refused(artifact: Artifact) -> None:
    assert len(compare(artifact, ["pixel-8", "pixel-8", "pixel-9"]).lines) == 2
    with pytest.raises(EdgetuneError, match="unknown device"):
        compare(artifact, ["pixel-8", "pixel8"])
    with pytest.raises(EdgetuneError, match="no device is named"):
        compare(artifact, [])


def test_devices_of_ones_own_are_there_and_a_broken_one_is_told(artifact: Artifact) -> None:
    path = copy("pixel-8", "my-phone")
    path.with_name("broken.yaml").write_text("format: 1\n", encoding="utf-8")
    found = compare(artifact)
    assert "my-phone" in {line.device for line in found.lines}
    assert "id: is missing" in dict(found.faults)["broken"]
    assert "left out\n  " in text(found)
    assert "\n  broken: " in text(found)


def test_what_cannot_be_predicted_is_left_out_and_the_others_stay(artifact: Artifact) -> None:
    found = compare(artifact, ["pixel-8", "host", "raspberry-pi-zero-w"])
    assert [line.device for line in found.lines] == ["pixel-8"]
    assert "edgetune devices calibrate" in dict(found.faults)["host"]
    with pytest.raises(EdgetuneError, match=r"no device is left to compare.*host: this host has no descriptor"):
        compare(artifact, ["host"])


def test_the_table_fits_80_columns_and_says_what_it_is_for(artifact: Artifact) -> None:
    table = text(compare(artifact), 80).split("\n\n")[1].splitlines()
    assert max(map(len, table)) <= 80
    assert table[0].split()[:3] == ["device", "threads", "ms"]
    (jetson,) = [row.split() for row in table if row.startswith("jetson-orin-nano ")]
    assert (jetson[1], jetson[-2:]) == ("6", ["GPU", "yes"])
    shown = listing.describe_device(device.load("jetson-orin-nano"))
    assert "predicted: CPU, 6 threads; GPU: not predicted" in shown
    assert "it has none: 32-bit Arm" in listing.describe_device(device.load("raspberry-pi-2"))


def test_profile_prints_a_table_and_measures_only_when_asked(
    artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["profile", str(artifact.path), "--device", "jetson-orin-nano"]
    assert main(given) == 0
    out = capsys.readouterr().out
    rows = {line[:13].strip(): line[13:].strip() for line in out.splitlines()}
    assert (rows["runs on"], rows["device"]) == ("CPU, 6 threads", "NVIDIA Jetson Orin Nano 8 GB")
    assert "GPU: not predicted" in out
    assert "Nothing was measured" in out
    assert max(map(len, out.splitlines())) <= 80
    assert main([*given, "--measure", "--seconds", "0.01", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "CPU, 1 thread\n" in out
    assert "this host" in out
    assert max(map(len, out.splitlines())) <= 80


def test_profile_measures_nothing_that_this_machine_cannot_run(
    artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "net.pte"
    shutil.copyfile(artifact.path, foreign)
    manifest = json.loads(artifact.path.with_suffix(".json").read_text())
    foreign.with_suffix(".json").write_text(json.dumps({**manifest, "target": "coreml"}))
    assert main(["profile", str(foreign), "--device", "iphone-15"]) == 0
    capsys.readouterr()
    assert main(["profile", str(foreign), "--device", "iphone-15", "--measure"]) == 5
    assert (
        "this machine cannot run coreml programs\n  next: pass --device for a prediction alone"
        in capsys.readouterr().err
    )


def test_the_command_prints_a_table_json_and_a_page(
    artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "page.html"
    given = ["devices", "compare", str(artifact.path), "--devices", "pixel-8,raspberry-pi-5,alif-ensemble-e7"]
    assert main([*given, "--html", str(written)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("net.pte: xnnpack, ")
    assert "predicted" in out
    assert [row.split()[0] for row in out.splitlines()[3:6]] == ["pixel-8", "raspberry-pi-5", "alif-ensemble-e7"]
    assert main([*given, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    first = told["devices"][0]
    assert first["predicted"][0]["latency_low_ms"] < first["predicted"][0]["latency_ms"]
    assert first["energy_j_per_1000"] == first["predicted"][0]["energy_mj"] > 0
    assert first["cold_start_ms"] > first["predicted"][0]["latency_ms"]
    assert (told["devices"][2]["predicted"], told["devices"][2]["fits"]) == ([], False)
    html = written.read_text(encoding="utf-8")
    assert "Predicted latency of one run" in html
    assert "cannot run xnnpack programs" in html
    assert 'http-equiv="Content-Security-Policy"' in html
    assert "<script src" not in html


def test_the_picture_marks_what_does_not_fit(artifact: Artifact) -> None:
    tight = small(device.load("pixel-8"), 0.01)
    (figure,) = by_device(compare(artifact, [tight, "pixel-9", "raspberry-pi-5", "alif-ensemble-e7"]))
    traces = {trace["name"]: trace for trace in figure.spec["data"]}
    assert set(traces) == {"phone", "phone, does not fit", "board"}
    assert traces["phone, does not fit"]["marker"]["symbol"] != traces["phone"]["marker"]["symbol"]
    assert traces["phone"]["marker"]["color"] != traces["board"]["marker"]["color"]
    assert figure.spec["layout"]["xaxis"]["type"] == "log"
    assert all(trace["error_x"]["array"][0] > 0 for trace in traces.values())
    assert "pixel-8" in figure.description
    assert "alif-ensemble-e7" not in figure.description


def test_the_comparison_imports_no_executorch(artifact: Artifact) -> None:
    code = (
        "import sys; from edgetune.cli.main import main; main(['devices', 'compare', sys.argv[1]]); "
        "heavy = {'executorch', 'torchao', 'transformers', 'plotly', 'pandas'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(artifact.path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["pixel-8", "raspberry-pi-zero-w"])
def test_layers_add_up_to_the_prediction_whatever_number_is_shown(artifact: Artifact, name: str) -> None:
    (whole,) = predict_layers(artifact, name)
    (cut,) = predict_layers(artifact, name, most=1)
    total = sum(layer.ms for layer in whole.layers) + whole.calls_ms
    assert total == pytest.approx(predict_calls(artifact, name)[0].latency_ms)
    assert whole.other is None
    assert cut.other is not None
    assert len(cut.layers) == 1
    assert cut.layers[0] == max(whole.layers, key=lambda layer: layer.ms)
    assert cut.layers[0].ms + cut.other.ms + cut.calls_ms == pytest.approx(total)
    assert cut.other.macs + cut.layers[0].macs == sum(layer.macs for layer in whole.layers)
    assert sum(whole.bounds_pct.values()) == pytest.approx(100)
    assert all(0 < layer.utilization_pct <= 100 for layer in whole.layers)


def test_the_intensity_of_a_layer_counts_its_bytes_as_stored(artifact: Artifact) -> None:
    (found,) = predict_layers(artifact, "pixel-8")
    wide = next(layer for layer in found.layers if layer.module == "wide")
    assert wide.macs == 32 * 32 * 16 * 64
    # fp32: 16 channels in, 64 out, and the weights with their bias
    assert wide.intensity == pytest.approx(wide.macs / (4 * (32 * 32 * (16 + 64) + 16 * 64 + 64)), rel=0.35)
    assert wide.gmacs == pytest.approx(wide.macs / wide.ms / 1e6)


def test_no_layer_of_the_roofline_stands_above_its_roof(artifact: Artifact) -> None:
    (found,) = predict_layers(artifact, "pixel-8")
    figure = roofline(found)
    assert figure is not None
    for layer in found.layers:
        if layer.macs:
            assert layer.gmacs <= found.roof.gmacs[layer.dtype] * 1.001
            assert layer.gmacs <= found.roof.cache_gb_s * layer.intensity * 1.001
    traces = figure.spec["data"]
    assert {t["name"].partition(",")[0] for t in traces if t["mode"] == "lines"} == {"memory", "last cache", "fp32"}
    assert (figure.spec["layout"]["xaxis"]["type"], figure.spec["layout"]["yaxis"]["type"]) == ("log", "log")
    points = [t for t in traces if t["mode"] == "markers"]
    assert sum(len(t["x"]) for t in points) == sum(1 for layer in found.layers if layer.macs)
    assert all(math.isfinite(x) and x > 0 for t in traces for x in (*t["x"], *t["y"]))


def test_the_report_needs_nothing_but_the_ledger(artifact: Artifact, tmp_path: Path) -> None:
    devices = ("pixel-8", "raspberry-pi-5")
    ledger = Ledger(
        recipe="r", seed=0, model="m", data="d", settings={}, environment={}, program=artifact.program(),
        predicted=tuple(call for device in devices for call in predict_calls(artifact, device)),
        layers=tuple(of for device in devices for of in predict_layers(artifact, device)), finished=True,
    )  # fmt: skip
    folder = tmp_path / "run"
    shutil.copytree(artifact.path.parent, folder)
    write(ledger, folder)
    first = (folder / "report.html").read_text(encoding="utf-8")
    assert "Roofline of the CPU, predicted: pixel-8" in first
    assert 'id="plot-roofline-0"' in first
    assert 'id="plot-roofline-1"' in first
    for path in folder.iterdir():
        if path.name != "ledger.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert report(folder).read_text(encoding="utf-8") == first
    before = {key: value for key, value in json.loads(ledger.dumps()).items() if key != "layers"}
    (folder / "ledger.json").write_text(json.dumps(before), encoding="utf-8")
    assert "plot-roofline-0" not in report(folder).read_text(encoding="utf-8"), "a ledger of before has none"


@pytest.mark.slow
def test_a_language_program_is_told_in_tokens(
    talking: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare(talking.path, ["pixel-8", "raspberry-pi-5"])
    assert found.prefill_tokens == talking.language.prefill_tokens
    assert found.cache_mib == talking.language.cache_bytes / 2**20
    for line in found.lines:
        token, piece = line.predicted
        assert line.speed is not None
        middle, low, high = line.speed.decode_tokens_s
        assert low < middle < high
        assert middle == pytest.approx(1000 / token.latency_ms)
        assert line.speed.prefill_tokens_s[0] == pytest.approx(found.prefill_tokens * 1000 / piece.latency_ms)
        assert line.speed.first_token_ms == (piece.latency_ms, piece.latency_low_ms, piece.latency_high_ms)
        assert line.cold_start_ms == piece.cold_start_ms
    assert (
        main(["devices", "compare", str(talking.path), "--devices", "pixel-8", "--html", str(tmp_path / "p.html")]) == 0
    )
    out = capsys.readouterr().out
    assert "J/1,000 tokens" in out
    assert "MiB of memory for its cache" in out
    assert "Predicted time to the first token" in (tmp_path / "p.html").read_text(encoding="utf-8")
    token_layers, piece_layers = predict_layers(talking, "pixel-8")
    predicted = compare(talking, ["pixel-8"]).lines[0].predicted
    assert [(of.call, of.latency_ms) for of in (token_layers, piece_layers)] == [
        (call.call, call.latency_ms) for call in predicted
    ]
    assert token_layers.roof == predict_layers(talking, "pixel-8", most=1)[0].roof
