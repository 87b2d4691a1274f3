"""Programs whose inputs may have several sizes: right at the bounds and between them, and refused beyond."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgetune.capture.dynamic import axes_of, parse_bounds, resize_row, sizes_to_check
from edgetune.capture.graph import capture
from edgetune.capture.positional import as_program
from edgetune.cli.main import main
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.quiet import silence_libraries
from edgetune.export import export
from edgetune.export.inspect import inspect
from edgetune.export.lower import lower
from edgetune.export.targets import find
from edgetune.program.artifact import Artifact, validate_inputs
from edgetune.program.manifest import TensorSpec
from edgetune.quant.int4 import Int4
from edgetune.runtime.run import run_in_child

with silence_libraries():  # libraries that these load warn on import
    from transformers import BertConfig, BertForSequenceClassification


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def tokens(batch: int, length: int) -> dict[str, Tensor]:
    torch.manual_seed(batch * 100 + length)
    ids = torch.randint(1, 100, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Artifact]:
    model = Int4(group_size=32).apply(bert())
    path = tmp_path_factory.mktemp("dynamic") / "text.pte"
    return model, export(model, tokens(1, 8), path, dynamic={"tokens": (1, 16)})


def test_a_text_of_any_length_within_the_bounds(text: tuple[nn.Module, Artifact]) -> None:
    model, artifact = text
    rows = [tokens(1, length) for length in (7, 16, 1, 2, 15)]
    with torch.no_grad():
        expected = [model(**row).logits for row in rows]
    for want, (got,) in zip(expected, run_in_child(artifact.path, [tuple(r.values()) for r in rows]), strict=True):
        assert torch.allclose(got, want, atol=2e-2)
    assert torch.allclose(artifact.run(rows[0])[0], expected[0], atol=2e-2)


def test_the_program_itself_refuses_more_than_it_was_planned_for(text: tuple[nn.Module, Artifact]) -> None:
    with pytest.raises(EdgetuneError, match="does not run"):
        run_in_child(text[1].path, [tuple(tokens(1, 17).values())])


def test_sizes_outside_the_bounds_are_refused_before_the_program_runs(text: tuple[nn.Module, Artifact]) -> None:
    for inputs in (tokens(1, 17), tokens(2, 8)):
        with pytest.raises(EdgetuneError, match=r"does not accept.*input_ids: int64 \(1, 1 to 16\)") as caught:
            text[1].run(inputs)
        assert caught.value.exit_code == Exit.EXPORT
    untied = {"input_ids": tokens(1, 8)["input_ids"], "attention_mask": tokens(1, 7)["attention_mask"]}
    with pytest.raises(EdgetuneError, match="tokens must be the same everywhere"):
        text[1].run(untied)


def test_the_manifest_states_the_bounds(text: tuple[nn.Module, Artifact]) -> None:
    known = text[1].manifest
    assert [(i.name, i.smallest, i.shape, i.free) for i in known.main.inputs] == [
        ("input_ids", (1, 1), (1, 16), {1: "tokens"}),
        ("attention_mask", (1, 1), (1, 16), {1: "tokens"}),
    ]
    assert (known.main.outputs[0].shape, known.main.outputs[0].smallest) == ((1, 3), None)
    assert known.main.parity is not None
    assert known.main.parity.rows == 4  # the greatest, the least, halfway, the greatest again
    assert Artifact.load(text[1].path).manifest == known
    slots = inspect(text[1].path).methods[0].inputs
    assert [(slot.dynamic, slot.shape) for slot in slots] == [(True, (1, 16))] * 2


def test_memory_is_planned_for_the_greatest_size(text: tuple[nn.Module, Artifact]) -> None:
    assert text[1].manifest.main.delegated_macs_pct >= 95
    model, row = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 32)).eval(), {"input": torch.ones(1, 8).long()}
    plans = []
    for largest in (8, 16):
        with as_program(model, row) as program:
            axes = axes_of({"tokens": (1, largest)}, tuple(row), tuple(row.values()))
            plans.append(lower(program, tuple(row.values()), find("xnnpack"), axes).plan_bytes)
    assert plans[0] < 0.7 * plans[1]


class Heads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], 2, -1).transpose(1, 2).reshape(x.shape[0], 2, -1)


@pytest.mark.parametrize(("batch", "inferred"), [(1, True), (4, False)])
def test_a_view_with_one_free_size_infers_it(batch: int, inferred: bool) -> None:
    x = torch.randn(batch, 6, 8)
    sizes = {"tokens": (2, 6)} if inferred else {"tokens": (2, 6), "batch": (1, 4)}
    with silence_libraries():
        program = capture(Heads(), (x,), "xnnpack", axes_of(sizes, ("x",), [x]))
        module = program.module()
    views = [node for node in program.graph.nodes if "view" in str(node.target)]
    assert views
    assert all(isinstance(size, int) for node in views for size in node.args[1]) == inferred
    for length in (2, 5):
        row = torch.randn(1, length, 8)
        assert torch.equal(module(row), Heads()(row))


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.stem(pixels)).mean((2, 3))


@pytest.mark.slow
def test_batch_and_picture_size_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Picture().eval()
    sizes = {"batch": (1, 4), "input_0.2": (16, 32), "input_0.3": (16, 32)}
    checks = [torch.randn(3, 3, 20, 28)]
    artifact = export(
        model,
        torch.randn(2, 3, 24, 24),
        tmp_path / "p.pte",
        dynamic=sizes,
        check_inputs=checks,
        max_abs_difference=1e-4,
    )
    call = artifact.manifest.main
    assert (call.inputs[0].smallest, call.inputs[0].shape) == ((1, 3, 16, 16), (4, 3, 32, 32))
    assert (call.outputs[0].smallest, call.outputs[0].shape) == ((1, 4), (4, 4))
    assert call.parity is not None
    assert call.parity.rows == 3 + 3 + 1 + 1
    x = torch.randn(2, 3, 31, 17)
    with torch.no_grad():
        assert torch.allclose(artifact.run(x)[0], model(x), atol=1e-4)


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 12))


def test_a_model_that_fixes_a_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match="does not take every size within the bounds") as caught:
        export(Fixed(), torch.randn(1, 12), tmp_path / "m.pte", dynamic={"input_0.1": (4, 24)})
    assert caught.value.exit_code == Exit.EXPORT
    assert list(tmp_path.iterdir()) == []


def test_check_inputs_outside_the_bounds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match="check_inputs: shapes or types"):
        export(nn.Linear(4, 2), torch.randn(2, 4), tmp_path / "m.pte", dynamic={"batch": (1, 3)},
               check_inputs=[torch.randn(4, 4)])  # fmt: skip


def test_axes_by_name() -> None:
    names, example = ("ids", "mask", "pixels"), [torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(2, 3, 9, 9)]
    batch = axes_of({"batch": (1, 4)}, names, example)
    assert [(axis.place, axis.dim) for axis in batch] == [(0, 0), (1, 0), (2, 0)]
    tokens = axes_of({"tokens": (1, 8)}, names, example)
    assert [(axis.place, axis.dim) for axis in tokens] == [(0, 1), (1, 1)]
    tied = axes_of({"pixels.2,pixels.3": (3, 9)}, names, example)
    assert [(axis.place, axis.dim, axis.name) for axis in tied] == [
        (2, 2, "pixels.2,pixels.3"),
        (2, 3, "pixels.2,pixels.3"),
    ]
    assert [t.shape for t in resize_row(example, tied, {"pixels.2,pixels.3": 4})][2] == (2, 3, 4, 4)
    assert sizes_to_check((*batch, *tokens)) == [
        {"batch": 4, "tokens": 8}, {"batch": 1, "tokens": 1}, {"batch": 2, "tokens": 4}, {"batch": 1, "tokens": 8},
        {"batch": 4, "tokens": 1}, {"batch": 4, "tokens": 8},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"token": (1, 8)}, "no such axis: got 'token'.*did you mean 'tokens'"),
        ({"x.2": (1, 8)}, r"no such axis: got 'x\.2'; allowed: batch, tokens, x\.0, x\.1"),
        ({"tokens": (8, 8)}, "needs a minimum and a maximum size"),
        ({"tokens": (0, 8)}, "needs a minimum and a maximum size"),
        ({"tokens": 8}, "needs a minimum and a maximum size"),
        ({"tokens": (1, 8), "x.1": (1, 4)}, "axis 1 of x is asked for twice"),
    ],
)
def test_axes_that_are_none(asked: dict[str, tuple[int, int]], message: str) -> None:
    with pytest.raises(EdgetuneError, match=message):
        axes_of(asked, ("x",), [torch.zeros(1, 8)])


def test_inputs_by_name_may_come_in_any_order() -> None:
    specs = (TensorSpec(name="a", shape=(1, 2), dtype="float32"), TensorSpec(name="b", shape=(1, 3), dtype="float32"))
    a, b = validate_inputs(specs, {"b": torch.zeros(1, 3), "a": torch.ones(1, 2)})
    assert (a.shape, b.shape) == ((1, 2), (1, 3))
    with pytest.raises(EdgetuneError, match="shapes or types that the program does not accept"):
        validate_inputs(specs, (torch.zeros(1, 2), torch.zeros(1, 3, dtype=torch.long)))


def test_bounds_of_a_command_line() -> None:
    assert parse_bounds(["tokens=1:64", "x.2,x.3=8:16"]) == {"tokens": (1, 64), "x.2,x.3": (8, 16)}
    for one in (["tokens=64"], ["tokens=1:x"], ["=1:2"], ["tokens=1:2", "tokens=1:3"]):
        with pytest.raises(EdgetuneError, match="not a size with bounds"):
            parse_bounds(one)


@pytest.mark.slow
def test_the_command_line_frees_sizes_and_takes_weights_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    rows = torch.export.Dim("rows", min=1, max=8)
    torch.export.save(torch.export.export(net, (torch.randn(4, 8),), dynamic_shapes=({0: rows},)), "net.pt2")
    assert main(["export", "net.pt2", "--dynamic", "batch=1:8", "--ptd", "-o", "net.pte"]) == 0
    assert "same prediction on 100 %" in capsys.readouterr().out
    x = torch.randn(5, 8)
    with torch.no_grad():
        assert torch.allclose(Artifact.load("net.pte").run(x)[0], net(x), atol=1e-5)
    assert {file.name for file in tmp_path.iterdir()} == {"net.pt2", "net.pte", "net.ptd", "net.json"}
