"""The time of each operator: what XNNPACK names and runs in its own way is matched with the operators of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgetune.cli.main import main
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.technique import Sample
from edgetune.export import export
from edgetune.program.artifact import Artifact
from edgetune.program.operators import Operator
from edgetune.quant.int8 import Int8
from edgetune.runtime.clock.events import DELEGATE, Instruction
from edgetune.runtime.hosts.host import Host
from edgetune.runtime.hosts.place import TimingRequest
from edgetune.runtime.hosts.session import measure_on
from edgetune.runtime.operator_times import operator_times_us


def of(name: str) -> Operator:
    return Operator(
        operator=name, module="", kind="other", dtype="fp32", output_shape=(), macs=0, weight_bytes=0,
        activation_bytes=0, delegated=True,
    )  # fmt: skip


def delegate(*kernels: tuple[str, float]) -> Instruction:
    return (DELEGATE, sum(us for _, us in kernels), list(kernels))


KERNELS = {
    "xnnpack.conv2d": "Convolution (NHWC, F32) IGEMM", "xnnpack.fully-connected": "Fully Connected (NC, F32) GEMM",
    "xnnpack.add": "Add (ND)", "xnnpack.static-reshape": "Static Reshape (NC)", "xnnpack.softmax": "Softmax (NC, F32)",
    "xnnpack.static-transpose": "Transpose (ND, X32)", "xnnpack.gelu": "GELU (NC)",
}  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(sorted(KERNELS)), st.booleans()), min_size=1, max_size=30))
@settings(deadline=None)
def test_a_second_kernel_belongs_to_its_operator_and_a_fused_operator_takes_none(cases: list[tuple[str, bool]]) -> None:
    recorded: list[tuple[str, float]] = []
    expected: list[float] = []
    for place, (name, odd) in enumerate(cases):
        fused = odd and name == "xnnpack.static-reshape"
        clamped = odd and name == "xnnpack.add"
        us = 10.0 * (place + 1)
        recorded += [] if fused else [(f"{KERNELS[name]} #1", us)]
        recorded += [("Clamp (NC) #1", 1.0)] if clamped else []
        expected.append(0.0 if fused else us + clamped)
    if recorded:
        times = operator_times_us([delegate(*recorded)], [of(name) for name, _ in cases])
        assert sum(times) == pytest.approx(sum(expected))
        for (name, _), time_us, expected_us in zip(cases, times, expected, strict=True):
            if name != "xnnpack.static-reshape":  # of several in a row, any one may be the fused one
                assert time_us == pytest.approx(expected_us), cases


def test_operators_outside_of_the_backend_separate_its_calls() -> None:
    operators = [of("xnnpack.add"), of("aten.native_layer_norm.out"), of("xnnpack.add"), of("xnnpack.gelu")]
    recorded: list[Instruction] = [
        delegate(("Add (ND) #1", 5.0)), ("native_layer_norm.out", 7.0, []), ("view_copy.out", 0.1, []),
        delegate(("Add (ND) #1", 2.0)), delegate(("GELU (NC) #1", 3.0)),
    ]  # fmt: skip
    assert operator_times_us(recorded, operators) == (5.0, 7.0, 2.0, 3.0)
    for other in (recorded[:1], [*recorded, ("mul.out", 1.0, [])]):
        with pytest.raises(EdgetuneError, match="not those of the program's manifest") as caught:
            operator_times_us(other, operators)
        assert caught.value.exit_code == Exit.EXPORT


def test_conversions_and_lookups_are_kernels_like_others() -> None:
    names = [
        "convert-fp32-qint8",
        "conv2d",
        "lookup",
        "convert-qint8-fp32",
        "sigmoid",
        "multiply",
        "convert-fp32-qint8",
    ]
    kernels = ["Convert (NC) #1", "Fully Connected (NC, QS8, QC8W) GEMM #1", "Invalid Unary Op #1", "Convert (NC) #2",
               "Sigmoid (NC) #1", "Multiply (ND) #1", "Convert (NC) #3"]  # fmt: skip
    times = [float(place + 1) for place in range(len(names))]
    recorded = delegate(*zip(kernels, times, strict=True))
    assert operator_times_us([recorded], [of(f"xnnpack.{name}") for name in names]) == tuple(times)


def test_what_rounding_took_comes_back() -> None:
    rounded: Instruction = (DELEGATE, 9.0, [("Add (ND) #1", 5.0), ("GELU (NC) #1", 3.0)])
    assert operator_times_us([rounded], [of("xnnpack.add"), of("xnnpack.gelu")]) == (5.5, 3.5)
    outside: Instruction = (DELEGATE, 100.0, [("Add (ND) #1", 5.0)])  # of a kernel at most one microsecond
    assert operator_times_us([outside], [of("xnnpack.add")]) == (6.0,)


class Gated(nn.Module):
    """In 8 bits: one function whose operand nothing else reads, and one whose operand is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 1)
        self.gelu = nn.GELU()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.second(self.gelu(self.first(pixels))))


def test_a_function_between_eight_bit_values_is_one_kernel_unless_more_is_read_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 64, 64)
    model = Int8().apply(Gated().eval(), Sample.of(pixels))
    artifact = export(model, (pixels,), tmp_path / "gated.pte", min_same_prediction_pct=0.0)
    operators = artifact.manifest.main.executed
    assert operators is not None
    assert [one.module for one in operators if one.operator == "xnnpack.lookup"] == ["gelu"]
    assert [one.dtype for one in operators if one.operator == "xnnpack.sigmoid"] == ["fp32"]
    request = TimingRequest(artifact.path, [(pixels,)], threads=1, seconds=0.05, energy=False, record=True)
    (timing,) = Host().time(request)
    assert timing.instructions is not None
    assert [len(kernels) for _, _, kernels in timing.instructions] == [len(operators)]
    assert all(us > 0 for us in operator_times_us(timing.instructions, operators))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 32, 3, padding=1), nn.LayerNorm(256), nn.Linear(256, 512)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(torch.relu(self.first(pixels)).flatten(2)))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    return export(Parts().eval(), (torch.randn(1, 3, 16, 16),), tmp_path_factory.mktemp("parts") / "parts.pte")


def test_each_module_has_its_time(parts: Artifact) -> None:
    (measured,) = measure_on(Host(), parts, threads=1, seconds=0.1, by_layer=True)
    assert set(measured.layers_ms) >= {"first", "norm", "last"}
    assert all(measured.layers_ms[name] > 0 for name in ("first", "norm", "last"))


def test_the_command_measures_the_layers_of_a_host_that_was_not_calibrated(
    parts: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    asked = ["profile", str(parts.path), "--layers", "--seconds", "0.1"]
    assert main(asked) == 0
    printed = capsys.readouterr().out
    assert "measured by layer: this host" in printed
    assert "Nothing is predicted: `edgetune devices calibrate` describes this host" in printed
    assert main([*asked, "--device", "pixel-8", "--measure", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer["measured"]["layers_ms"]) >= {"first", "norm", "last"}
    assert {layer["module"] for layer in answer["layers"]["layers"]} >= {"first", "norm", "last"}
    assert main([*asked, "--device", "pixel-8", "--measure"]) == 0
    printed = capsys.readouterr().out
    assert "predicted by layer: pixel-8" in printed
    assert "; measured: this host" in printed


def test_a_program_for_another_runtime_is_not_run(parts: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    older = parts.manifest.model_copy(update={"versions": {**parts.manifest.versions, "executorch": "1.4.1"}})
    with pytest.raises(EdgetuneError, match=r"made for executorch 1\.4\.1") as caught:
        Artifact(parts.path, older).run((torch.randn(1, 3, 16, 16),))
    assert 'pip install "executorch==1.4.1"' in caught.value.action
    with pytest.raises(EdgetuneError, match=r"made for executorch 1\.4\.1"):
        measure_on(Host(), Artifact(parts.path, older), threads=1, seconds=0.1)
