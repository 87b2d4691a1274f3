"""Measured and calibrated on this host, for real: programs are lowered, run in child processes and timed."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgetune.export import Artifact, export
from edgetune.profile import calibrate, device, measure, micro, profile
from edgetune.technique import EdgetuneError


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def test_a_timing_becomes_a_measurement() -> None:
    from edgetune.export.run import Timing

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

    calm = measure.measured_of(timing(*[1.0 + 0.01 * i for i in range(11)]), 2)
    assert (calm.latency_ms, calm.latency_p10_ms, calm.latency_p90_ms) == pytest.approx((1.05, 1.01, 1.09))
    assert (calm.device, calm.runs, calm.threads, calm.peak_memory_mib) == ("this host", 11, 2, 10.0)
    assert calm.note == ""
    noisy = measure.measured_of(timing(*[1.0] * 8, 4.0, 4.0, 4.0), 2)
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


@pytest.fixture(scope="module")
def host_file(tmp_path_factory: pytest.TempPathFactory, compiler: None) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "host.yaml"
    said: list[tuple[str, int, int]] = []
    calibrate.calibrate(path, threads=1, quick=True, progress=lambda *step: said.append(step))
    assert [done for _, done, _ in said] == list(range(len(said)))
    assert said[-1] == ("fit", said[-1][2], said[-1][2])
    return path


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
    here = measure.measure(artifact, threads=1, seconds=0.05)
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
    section = described.calibration
    assert section is not None
    assert (section.threads, described.thread_count) == (1, 1)
    assert section.programs == 7
    kinds = {(e.kind, e.delegated) for e in section.efficiencies}
    assert {("linear", True), ("elementwise", True)} <= kinds
    assert section.versions["executorch"]
    assert any("quick calibration" in note for note in described.notes)
    assert [item.name for item in host_file.parent.iterdir()] == ["host.yaml"]
    here = device.user_folder() / "host.yaml"
    here.parent.mkdir(parents=True)
    here.write_bytes(host_file.read_bytes())
    found = profile(artifact, "host")
    assert found.predicted.calibrated
    assert "never calibrated: a guess" in found.predicted.note  # quick leaves embeddings out, and says so
    assert found.measured is not None
    assert found.measured.threads == 1


def test_calibrate_refuses_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match="threads must be from 1"):
        calibrate.calibrate(tmp_path / "x.yaml", threads=4096)
    with pytest.raises(EdgetuneError, match=r"a \.yaml file"):
        calibrate.calibrate(tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_every_micro_program_computes() -> None:
    programs = (*micro.tiny(), *micro.programs(), *micro.quick())
    assert 12 <= len(micro.programs()) <= 40
    assert len({item.name for item in programs}) == len(programs)
    with torch.no_grad():
        for item in programs:
            assert torch.isfinite(item.module().eval()(*item.inputs())).all(), item.name
