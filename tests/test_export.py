"""Export: real programs, lowered, run in a child process and compared; and what happens where that fails."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgetune.capture.graph import capture, prepare
from edgetune.capture.positional import Positional
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.parity import Parity
from edgetune.core.quiet import silence_libraries
from edgetune.core.technique import Sample
from edgetune.export import export
from edgetune.export.lower import compile_program
from edgetune.export.targets import TARGETS, for_device, lowerable_targets
from edgetune.program.artifact import Artifact
from edgetune.quant.int4 import Int4
from edgetune.quant.int8 import Int8
from edgetune.runtime.child_failures import child_error
from edgetune.runtime.hosts.host import Host
from edgetune.runtime.hosts.place import TimingRequest
from edgetune.runtime.run import run_in_child
from edgetune.runtime.verify import compare

with silence_libraries():  # libraries that these load warn on import
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def tokens(rows: int = 8) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(rows, 16, dtype=torch.long)
    for row in range(rows):
        mask[row, 4 + row :] = 0
    return {"input_ids": torch.randint(1, 100, (rows, 16)), "attention_mask": mask}


@pytest.fixture(scope="module")
def int4_bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Artifact]:
    model = Int4().apply(bert()).train()
    path = tmp_path_factory.mktemp("export") / "model.pte"
    artifact = export(model, tokens(1), path, device="pixel-8", check_inputs=[tokens()], one_row=True)
    assert all(module.training for module in model.modules()), "the model's mode is put back"
    return model.eval(), artifact


def test_the_program_equals_the_quantized_model(int4_bert: tuple[nn.Module, Artifact]) -> None:
    model, artifact = int4_bert
    inputs = tokens()
    rows = [(inputs["input_ids"][i : i + 1], inputs["attention_mask"][i : i + 1]) for i in range(8)]
    got = torch.cat([out for (out,) in run_in_child(artifact.path, rows)])
    with torch.no_grad():
        expected = model(**inputs).logits
    assert torch.allclose(got, expected, atol=2e-2)
    assert not torch.allclose(got[0], got[7]), "the rows must tell apart"
    assert artifact.manifest.main.parity is not None
    assert artifact.manifest.main.parity.rows == 8
    assert artifact.manifest.main.parity.same_prediction_pct == 100.0


def test_the_manifest_says_what_the_program_is(int4_bert: tuple[nn.Module, Artifact]) -> None:
    _, artifact = int4_bert
    known = artifact.manifest
    assert [(i.name, i.shape, i.dtype) for i in known.main.inputs] == [
        ("input_ids", (1, 16), "int64"),
        ("attention_mask", (1, 16), "int64"),
    ]
    assert [(o.shape, o.dtype) for o in known.main.outputs] == [((1, 3), "float32")]
    assert (known.target, known.device) == ("xnnpack", "pixel-8")
    assert known.size_bytes == artifact.path.stat().st_size
    assert known.main.plan_bytes > 0
    assert known.versions["executorch"] != "not installed"
    assert artifact.program().sha256 == known.sha256
    assert Artifact.load(artifact.path) == artifact


def test_operators_carry_macs_bytes_types_and_modules(int4_bert: tuple[nn.Module, Artifact]) -> None:
    call = int4_bert[1].manifest.main
    linears = {o.module: o for o in call.operators if o.kind == "linear"}
    assert len(linears) == 6 + 2
    query = linears["bert.encoder.layer.0.attention.self.query"]
    assert (query.dtype, query.macs, query.delegated) == ("8da4w", 16 * 64 * 64, True)
    assert query.weight_bytes == 64 * 64 // 2 + 64 * 2 * 2 + 64 * 4  # 4 bits, scales of 16 bits, bias
    assert query.activation_bytes == 2 * 16 * 64 * 4
    products = [o for o in call.operators if o.kind == "matmul"]
    assert [o.macs for o in products] == [2 * 16 * 16 * 32] * 2
    norms = [o for o in call.operators if o.kind == "normalization"]
    assert len(norms) == 3
    assert not any(o.delegated for o in norms)
    table = next(o for o in call.operators if o.kind == "embedding")
    assert (table.dtype, table.weight_bytes) == ("int8", 16 * 64 + 16 * 4)
    assert not any("quant" in o.operator or "qparams" in o.operator for o in call.operators)
    assert call.delegated_macs_pct == 100.0
    left = {(o.operator, o.module): o.count for o in call.undelegated}
    assert left["aten.native_layer_norm.out", "bert.embeddings.LayerNorm"] == 1


def test_attention_is_not_split_by_its_mask(int4_bert: tuple[nn.Module, Artifact]) -> None:
    call = int4_bert[1].manifest.main
    assert call.delegates == 2 + 2  # one between any two layer norms, nothing else cuts the graph
    assert not any("logical_not" in o.operator or "any" in o.operator for o in call.undelegated)


class Block(nn.Module):
    """One of each thing that the passes handle: a table, attention, a norm, a linear, a convolution with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.norm = nn.LayerNorm(32)
        self.conv = nn.Sequential(nn.Conv1d(32, 32, 3, padding=1), nn.BatchNorm1d(32), nn.ReLU())
        self.head = nn.Linear(32, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = self.norm(x + F.scaled_dot_product_attention(x, x, x, is_causal=True))
        return self.head(self.conv(x.mT).mT)


def test_the_fast_lowering_gives_the_bytes_of_the_stock_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    from edgetune.export import lower as lowering

    inputs = (torch.randint(0, 20, (1, 6)),)

    def data(quantized: bool) -> bytes:
        torch.manual_seed(0)
        model = Positional(Int4().apply(Block()) if quantized else Block(), inputs).eval()
        with silence_libraries(), torch.no_grad():
            program = capture(model, inputs)
            prepare(program)
            return compile_program(program, TARGETS["xnnpack"]).data

    fast, plain = data(True), data(False)
    assert data(True) == fast, "with what the first ones left behind"
    monkeypatch.setattr(lowering, "fast_lowering", contextlib.nullcontext)
    assert data(True) == fast
    assert data(False) == plain


def test_timing_comes_from_a_fresh_process(int4_bert: tuple[nn.Module, Artifact]) -> None:
    inputs = tuple(value[:1] for value in tokens().values())
    (timing,) = Host().time(TimingRequest(int4_bert[1].path, [inputs], threads=1, seconds=0.05, energy=False))
    assert len(timing.latencies_ms) >= 10
    assert min(timing.latencies_ms) > 0
    assert timing.peak_memory_mib >= timing.empty_memory_mib > 20
    assert timing.load_ms > 0
    assert timing.threads == 1


def test_a_tampered_program_does_not_pass_for_the_exported_one(
    int4_bert: tuple[nn.Module, Artifact], tmp_path: Path
) -> None:
    source = int4_bert[1].path
    (tmp_path / "model.pte").write_bytes(source.read_bytes() + b"\0")
    (tmp_path / "model.json").write_bytes(source.with_suffix(".json").read_bytes())
    with pytest.raises(EdgetuneError, match="not the one that its manifest describes"):
        Artifact.load(tmp_path / "model.pte")


def test_a_language_model_gives_logits_for_a_window(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    model = Int4().apply(LlamaForCausalLM(config).eval())
    assert model.config.tie_word_embeddings is False
    window = {"input_ids": torch.randint(0, 96, (3, 12)), "attention_mask": torch.ones(3, 12, dtype=torch.long)}
    window["attention_mask"][1, 9:] = 0
    artifact = export(model, window, tmp_path / "lm.pte", one_row=True)
    call = artifact.manifest.main
    assert call.outputs[0].shape == (1, 12, 96)
    assert call.parity is not None
    assert call.parity.same_prediction_pct == 100.0
    assert call.delegated_macs_pct > 99
    assert model.config.use_cache is True


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU6())
        self.depth = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.point = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self.point(self.depth(self.stem(pixels)))
        return self.head(F.adaptive_avg_pool2d(hidden, 1).flatten(1))


def small() -> Small:
    """With norms that leave every layer a bias to round."""
    torch.manual_seed(0)
    model = Small().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return model


@pytest.mark.parametrize("per_channel", [True, False])
def test_an_int8_program_computes_the_bits_that_its_model_does(tmp_path: Path, per_channel: bool) -> None:
    images = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = Int8(per_channel=per_channel).apply(small(), Sample(images[:1], lambda: iter([images])))
    call = export(model, images, tmp_path / "cnn.pte", one_row=True).manifest.main
    assert call.inputs[0].shape == (1, 3, 16, 16)
    assert call.parity is not None
    assert call.parity.max_abs_difference == 0.0
    assert call.delegated_macs_pct == 100.0
    layers = [(o.module, o.kind, o.dtype) for o in call.operators if o.macs]
    assert layers == [
        ("stem.0", "conv", "int8"), ("depth.0", "depthwise-conv", "int8"), ("point", "pointwise-conv", "int8"),
        ("head", "linear", "int8"),
    ]  # fmt: skip
    depth = next(o for o in call.operators if o.kind == "depthwise-conv")
    assert depth.macs == 16 * 8 * 8 * 9
    assert depth.activation_bytes == 2 * 16 * 8 * 8  # a byte each


def test_a_layer_that_int8_skips_stays_float_in_the_program(tmp_path: Path) -> None:
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    model = Int8(skip=("head",)).apply(small(), Sample(images[:1], lambda: iter([images])))
    call = export(model, images, tmp_path / "cnn.pte", one_row=True, max_abs_difference=0.01).manifest.main
    layers = {o.module: (o.dtype, o.delegated) for o in call.operators if o.macs}
    assert layers == {
        "stem.0": ("int8", True), "depth.0": ("int8", True), "point": ("int8", True), "head": ("fp32", True),
    }  # fmt: skip


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"gate": Gate()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["gate"](x)


class Gate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_control_flow_by_values_names_the_module(tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match=r"module inner\.gate: .*values of a tensor[\s\S]*torch\.where") as caught:
        export(Branching(), torch.randn(1, 4), tmp_path / "model.pte")
    assert caught.value.exit_code == Exit.EXPORT
    assert list(tmp_path.iterdir()) == []


class Rooted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.odd = Odd()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(self.first(x))


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.edgetune_test.twice(x)


@pytest.fixture(scope="module")
def _twice() -> object:
    library = torch.library.Library("edgetune_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    return library


@pytest.mark.usefixtures("_twice")
def test_an_operator_without_a_kernel_is_named_with_its_module(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(b"what was here before")
    with pytest.raises(EdgetuneError, match=r"edgetune_test::twice.*edgetune_test\.twice\.default in odd") as caught:
        export(Rooted(), torch.randn(1, 4), path)
    assert caught.value.exit_code == Exit.EXPORT
    assert path.read_bytes() == b"what was here before"
    assert [file.name for file in tmp_path.iterdir()] == ["model.pte"]


class Finite(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x - x)


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match="not finite"):
        export(Finite(), torch.ones(1, 4), tmp_path / "model.pte", target="portable")
    assert list(tmp_path.iterdir()) == []


def test_a_program_further_off_than_allowed_gets_no_name() -> None:
    from edgetune.runtime.verify import Bounds, check

    parity = Parity(rows=200, same_prediction_pct=98.5, max_abs_difference=0.3)
    check(parity, Bounds(min_same_prediction_pct=98))
    with pytest.raises(EdgetuneError, match=r"98\.50 % of 200 rows, below 99 %") as caught:
        check(parity, Bounds())
    assert caught.value.exit_code == Exit.EXPORT
    with pytest.raises(EdgetuneError, match=r"differs by 0\.3, more than 0\.1"):
        check(parity, Bounds(min_same_prediction_pct=98, max_abs_difference=0.1))


class PerToken(nn.Module):
    """Logits for each token; `elsewhere` changes those that the mask hides, or all."""

    def __init__(self, hidden: bool, shown: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 5)
        self.elsewhere = (hidden, shown)
        nn.init.normal_(self.table.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden, shown = self.elsewhere
        off = hidden * (1 - attention_mask) + shown * attention_mask
        return self.table(input_ids) * (1 - 2 * off.unsqueeze(-1))


def test_what_the_mask_hides_is_not_compared(tmp_path: Path) -> None:
    artifact = export(PerToken(False, False), tokens(1), tmp_path / "model.pte", check_inputs=[tokens()], one_row=True)
    parity = artifact.manifest.main.parity
    assert parity is not None
    assert (parity.rows, parity.same_prediction_pct, parity.max_abs_difference) == (8, 100, 0)
    inputs = tokens()
    rows = [(inputs["input_ids"][i : i + 1], inputs["attention_mask"][i : i + 1]) for i in range(8)]
    padded = compare(artifact.path, PerToken(True, False), rows, mask=1)
    assert padded.same == padded.predictions > 0
    every = compare(artifact.path, PerToken(True, False), rows)
    assert every.same < 0.6 * every.predictions
    assert compare(artifact.path, PerToken(False, True), rows, mask=1).same == 0


def test_rubbish_does_not_load(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(b"\0" * 256)
    with pytest.raises(EdgetuneError, match="does not run") as caught:
        run_in_child(path, [(torch.zeros(1),)])
    assert caught.value.exit_code == Exit.EXPORT


def test_a_child_that_dies_by_a_signal_is_an_error(tmp_path: Path) -> None:
    done = subprocess.CompletedProcess(args=[], returncode=-11, stdout="", stderr="")
    assert "ended by SIGSEGV" in str(child_error(tmp_path / "model.pte", done, None))


def test_layers_that_are_still_wrapped_are_refused(tmp_path: Path) -> None:
    from edgetune.core.wrapped import Wrapped

    model = nn.Sequential(Wrapped(nn.Linear(4, 4)))
    with pytest.raises(EdgetuneError, match=r"adapters or slices: 0[\s\S]*et\.finalize"):
        export(model, torch.randn(1, 4), tmp_path / "model.pte")


def test_rows_of_other_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match="shapes or types that the program does not accept"):
        export(nn.Linear(4, 2), torch.randn(1, 4), tmp_path / "m.pte", check_inputs=[torch.randn(1, 5)])


def test_targets_say_what_they_are_and_what_is_missing() -> None:
    assert for_device("pixel-8", None).name == "xnnpack"
    assert for_device(None, None).name == "xnnpack"
    with pytest.raises(EdgetuneError, match="did you mean 'xnnpack'"):
        for_device(None, "xnpack")
    with pytest.raises(EdgetuneError, match="pixel-8 does not run this target: got 'coreml'"):
        for_device("pixel-8", "coreml")
    assert lowerable_targets()["xnnpack"] == "lowers and runs here"
