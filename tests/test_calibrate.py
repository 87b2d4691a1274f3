"""Measured and calibrated on this host, for real: programs are lowered, run in child processes and timed."""

from __future__ import annotations

import importlib
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.export import Artifact, export
from edgetune.export.build_microbenchmarks import build_part
from edgetune.profile import calibrate, calibration, device, profile, trials
from edgetune.runtime import measure
from edgetune.runtime.hosts.host import Host
from edgetune.runtime.hosts.session import measure_on


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def test_a_timing_becomes_a_measurement() -> None:
    from edgetune.runtime.run import Timing

    def timing(*latencies_ms: float) -> Timing:
        return Timing(
            threads=2,
            load_ms=5.0,
            first_ms=9.0,
            latencies_ms=latencies_ms,
            warm_up_runs=1,
            peak_memory_mib=50.0,
            empty_memory_mib=40.0,
        )

    calm = measure.summarize_timing(timing(*[1.0 + 0.01 * i for i in range(11)]), 2)
    assert (calm.latency_ms, calm.latency_p10_ms, calm.latency_p90_ms) == pytest.approx((1.05, 1.01, 1.09))
    assert (calm.device, calm.runs, calm.threads, calm.peak_memory_mib) == ("this host", 11, 2, 10.0)
    assert calm.note == ""
    noisy = measure.summarize_timing(timing(*[1.0] * 8, 4.0, 4.0, 4.0), 2)
    assert "p90 is 4.0 times p10" in noisy.note


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        rows = self.table(tokens) * mask.unsqueeze(-1)
        out: Tensor = self.head(rows.sum(1))
        return out


@pytest.fixture(scope="module")
def compiler() -> None:
    """executorch imported: it warns of its own use of deprecated functions while it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, compiler: None) -> Artifact:
    inputs = {"tokens": torch.tensor([[0, 4, 1, 2]]), "mask": torch.ones(1, 4)}
    return export(_Small().eval(), inputs, tmp_path_factory.mktemp("program") / "small.pte", target="xnnpack")


Steps = list[tuple[str, int, int, str]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, compiler: None) -> Path:
    """The programs of a quick calibration, built by this process."""
    folder = tmp_path_factory.mktemp("programs")
    build_part(folder, 0, 1, quick=True)
    return folder


@pytest.fixture(scope="module")
def host_file(tmp_path_factory: pytest.TempPathFactory, built: Path) -> Path:
    """A calibration that was stopped after three of five programs and three timings, one of them half written."""
    path = tmp_path_factory.mktemp("calibration") / "host.yaml"
    said: Steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        folder = trials.folder_for(True)
        shutil.copytree(built, folder)
        for name in ("linear-64x256x256", "linear-64x512x512"):
            (folder / f"{name}.json").unlink()
        timings = [
            {"name": name, "us": 7.0, "load_ms": 0.5, "threads": threads, "instructions": []} for name, threads in KEPT
        ]
        lines = [json.dumps(line) for line in timings]
        (folder / trials.TIMINGS).write_text("\n".join([*lines, lines[0][:20]]) + "\n", encoding="utf-8")
        calibrate.calibrate(path, threads=1, quick=True, progress=lambda *step: said.append(step))
        assert not folder.exists()
    total = len(trials.trials(True))
    assert said[:2] == [("build", total - 1, total, ""), ("build", total, total, "")]  # by two children
    assert said[2:] == [("time", done, total, "") for done in range(2, total + 1)]  # one timing was kept
    return path


KEPT = (("add-1x65536", 1), ("tokens-16x96", 2))  # the second was made with other threads


def test_inputs_are_made_from_the_manifest(artifact: Artifact) -> None:
    tokens, mask = measure.inputs_of(artifact)
    assert (tokens.dtype, tuple(tokens.shape)) == (torch.int64, (1, 4))
    assert set(tokens.flatten().tolist()) == {1}  # a valid token in any table of two rows
    assert (mask.dtype, tuple(mask.shape)) == (torch.float32, (1, 4))


def test_a_program_is_predicted_for_a_phone_and_measured_here(artifact: Artifact) -> None:
    only = profile(artifact, "pixel-8")
    assert only.measured is None
    assert only.predicted.device == "pixel-8"
    assert profile(str(artifact.path)) == only
    (here,) = measure_on(Host(), artifact, threads=1, seconds=0.05)
    assert here.device == "this host"
    assert 0 < here.latency_p10_ms <= here.latency_ms <= here.latency_p90_ms
    assert here.runs >= 10


def test_a_host_that_was_never_calibrated_says_what_to_run(artifact: Artifact) -> None:
    with pytest.raises(EdgetuneError, match="edgetune devices calibrate"):
        profile(artifact, "host")


def test_calibrate_writes_a_descriptor_that_predicts_beside_the_measurement(
    host_file: Path, artifact: Artifact, own_folder: None
) -> None:
    described = device.load(host_file)
    found = described.calibration
    assert found is not None
    assert (found.device, found.threads, described.thread_count) == ("host", 1, 1)
    assert (found.programs, found.networks) == (3, 2)
    kinds = {(curve.kind, curve.delegated) for curve in found.curves.values()}
    assert {("linear", True), ("elementwise", True), ("normalization", False)} <= kinds
    assert found.versions["executorch"]
    assert any("quick calibration" in note for note in found.notes)
    assert {item.name for item in host_file.parent.iterdir()} == {"host.yaml", "host.calibration.json"}
    assert "calibration" not in yaml.safe_load(host_file.read_text(encoding="utf-8"))
    shutil.copytree(host_file.parent, device.user_folder())
    shown = profile(artifact, "host")
    assert shown.predicted.calibrated
    assert "aten.embedding.out fp32 was never calibrated" in shown.predicted.note  # quick leaves it out, and says so
    assert shown.measured is not None
    assert shown.measured.threads == 1
    assert set(shown.layers_ms) >= {"table", "head"}
    assert 0 < sum(shown.layers_ms.values()) < shown.predicted.latency_ms


def test_a_calibration_is_kept_whole(host_file: Path, tmp_path: Path) -> None:
    beside = calibration.calibration_path(host_file)
    assert beside.name == "host.calibration.json"
    found = calibration.read(beside)
    assert found is not None
    calibration.write(tmp_path / "again.json", found)
    assert (tmp_path / "again.json").read_bytes() == beside.read_bytes()
    assert calibration.read(tmp_path / "absent.json") is None


def test_a_calibration_in_the_descriptor_is_refused_with_what_to_do(host_file: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(host_file.read_text(encoding="utf-8"))
    content["calibration"] = {"threads": 1}
    (tmp_path / "host.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(EdgetuneError, match="calibration: it belongs in a separate file; run `edgetune devices calibr"):
        device.load(tmp_path / "host.yaml")


def test_a_calibration_of_another_device_is_refused(host_file: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(host_file.read_text(encoding="utf-8"))
    content["id"] = "other"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    shutil.copy(calibration.calibration_path(host_file), tmp_path / "other.calibration.json")
    with pytest.raises(EdgetuneError, match=r"another device's: got 'host'; allowed: other[\s\S]*calibrate` again"):
        device.load(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threads", 0),
        ("intervals", [{"from_us": 5.0, "log": 0.1}]),
        ("intervals", [{"from_us": 0.0, "log": float("inf")}]),
        ("curves", {}),
        ("format", 1),
        ("error_pct", None),
        ("date", "today"),
    ],
)
def test_a_calibration_with_a_fault_is_refused_by_field(
    host_file: Path, tmp_path: Path, field: str, value: object
) -> None:
    content = json.loads(calibration.calibration_path(host_file).read_text(encoding="utf-8"))
    (tmp_path / "host.calibration.json").write_text(json.dumps({**content, field: value}), encoding="utf-8")
    shutil.copy(host_file, tmp_path / "host.yaml")
    with pytest.raises(EdgetuneError, match=rf"cannot be read: {field}[\s\S]*calibrate` again"):
        device.load(tmp_path / "host.yaml")


def test_rates_that_are_negative_or_all_zero_are_refused(host_file: Path, tmp_path: Path) -> None:
    content = json.loads(calibration.calibration_path(host_file).read_text(encoding="utf-8"))
    name = next(iter(content["curves"]))
    for rates in ({"1": 0.0}, {"1": -1.0}, {}):
        content["curves"][name]["rates"] = rates
        (tmp_path / "x.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(EdgetuneError, match="cannot be read"):
            calibration.read(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b"{")
    with pytest.raises(EdgetuneError, match="cannot be read"):
        calibration.read(tmp_path / "x.json")


def test_what_is_built_is_not_built_again(built: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    said: Steps = []
    assert trials.build(built, True, lambda *step: said.append(step)) == []
    assert said == []
    assert {path.name: path.stat().st_mtime_ns for path in built.iterdir()} == before


def test_what_takes_the_timing_process_down_is_named_and_the_rest_is_timed(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "programs"
    shutil.copytree(built, folder)
    names = [trial.name for trial in trials.trials(True)][:5]
    fatal, rubbish = folder / "linear-64x256x256.pte", folder / "add-1x65536.pte"
    whole = fatal.read_bytes()
    fatal.write_bytes(whole[:200] + b"\xff" * 200 + whole[400:])  # offsets that lead out of the file
    rubbish.write_bytes(b"\0" * 256)
    said: Steps = []
    timed, failed = trials.clock(
        folder, names, threads=1, seconds=0.005, rounds=2, progress=lambda *step: said.append(step)
    )
    good = [name for name in names if name not in (fatal.stem, rubbish.stem)]
    assert sorted(one.name for one in timed) == sorted(2 * good)
    assert all(one.us > 0 and one.load_ms > 0 for one in timed)
    told = dict(line.split(": ", 1) for line in failed)
    assert set(told) == {fatal.stem, rubbish.stem}
    assert "crashed its process (status " in told[fatal.stem]
    assert "load" in told[rubbish.stem]
    again, _ = trials.clock(folder, good, threads=1, seconds=0.005, rounds=2)
    assert sorted(again, key=repr) == sorted(timed, key=repr)  # all from the file, nothing timed anew


def test_programs_lie_by_what_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    quick, whole = trials.folder_for(True), trials.folder_for(False)
    assert quick != whole
    assert quick.parent == whole.parent == tmp_path / "edgetune" / "calibrate"


def test_calibrate_refuses_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match="threads must be from 1"):
        calibrate.calibrate(tmp_path / "x.yaml", threads=4096)
    with pytest.raises(EdgetuneError, match=r"a \.yaml file"):
        calibrate.calibrate(tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_every_micro_program_computes() -> None:
    found = trials.trials(quick=False)
    assert len({trial.name for trial in found}) == len(found)
    assert len({trial.family for trial in found if trial.family}) >= 5
    with torch.no_grad():
        for item in found:
            outputs = item.module().eval()(*item.inputs())
            for output in outputs if isinstance(outputs, tuple) else (outputs,):
                # a logarithm may meet a zero among a quarter of a million values
                assert torch.isfinite(output).float().mean() > 0.9999, item.name


# --- a table of measurements made elsewhere ---

HEADER = "program,latency_us,load_ms,kind"


@pytest.fixture
def table(built: Path, tmp_path: Path) -> Path:
    """A table beside the programs, as long as the work is."""
    lines = [HEADER]
    for trial in trials.trials(True):
        (tmp_path / f"{trial.name}.pte").write_bytes((built / f"{trial.name}.pte").read_bytes())
        work = sum(operator.macs for operator in trials.operators_of(built, trial.name))
        lines.append(f"{trial.name}.pte,{20 + work / 1e4:.1f},0.8,{'network' if trial.family else ''}")
    (tmp_path / "pi.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "pi.csv"


def test_a_table_calibrates_a_device_that_was_described(table: Path) -> None:
    found = calibrate.calibrate_from(table, "raspberry-pi-5")
    assert (found.device, found.threads, found.programs, found.networks) == ("raspberry-pi-5", 4, 3, 2)
    assert any("pi.csv: 5 measurements" in note for note in found.notes)
    described = device.load("raspberry-pi-5")
    assert described.calibration == found
    assert [path.name for path in device.user_folder().iterdir()] == ["raspberry-pi-5.calibration.json"]


def test_a_table_may_go_to_a_file_and_to_a_descriptor_of_ones_own(table: Path, tmp_path: Path) -> None:
    content, _ = device.read("raspberry-pi-5")
    assert isinstance(content, dict)
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({**content, "id": "mine"}), encoding="utf-8")
    found = calibrate.calibrate_from(table, str(mine), threads=2)
    assert device.load(mine).calibration == found
    assert found.threads == 2
    calibrate.calibrate_from(table, "raspberry-pi-5", out=tmp_path / "elsewhere.json")
    assert calibration.read(tmp_path / "elsewhere.json") is not None
    assert not device.user_folder().exists()


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["program,load_ms", "{0},1"], r"lacks a column: got 'latency_us'[\s\S]*program,latency_us,load_ms,kind"),
        (["a,b", "1,2"], "lacks a column: got 'program, latency_us'"),
        ([], "lacks a column"),
        ([HEADER, "absent.pte,5"], r"line 2: no such program: got 'absent\.pte'"),
        ([HEADER, "{0},-5"], r"line 2: latency_us must be a positive number: got '-5'"),
        ([HEADER, "{0},nan"], "latency_us must be a positive number"),
        ([HEADER, "{0},0"], "latency_us must be a positive number"),
        ([HEADER, "{0}"], "latency_us must be a positive number"),
        ([HEADER, "{0},fast"], "got 'fast'"),
        ([HEADER, "{0},5,-1"], "load_ms must be a positive number"),
        (["latency_us,program", "5"], "line 2: no such program"),
        ([HEADER, "{0},5"], "too few programs"),
        ([HEADER], "too few programs"),
    ],
)
def test_a_table_with_a_fault_is_refused_by_line(table: Path, lines: list[str], match: str) -> None:
    text = "\n".join(lines).replace("{0}", "add-1x65536.pte")
    table.write_text(text, encoding="utf-8")
    with pytest.raises(EdgetuneError, match=match):
        calibrate.calibrate_from(table, "raspberry-pi-5")
    assert not device.user_folder().exists()


def test_what_is_no_program_or_no_table_is_refused(table: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.pte").write_bytes(b"\0" * 256)
    table.write_text(f"{HEADER}\nbad.pte,5\n", encoding="utf-8")
    with pytest.raises(EdgetuneError, match=r"line 2: .*program"):
        calibrate.calibrate_from(table, "raspberry-pi-5")
    with pytest.raises(EdgetuneError, match="the table cannot be read"):
        calibrate.calibrate_from(tmp_path / "absent.csv", "raspberry-pi-5")
    with pytest.raises(EdgetuneError, match="unknown device"):
        calibrate.calibrate_from(table, "raspberry-pie-5")
    with pytest.raises(EdgetuneError, match="threads must be"):
        calibrate.calibrate_from(table, "raspberry-pi-5", threads=0)
