"""Several methods in one program: what they share is stored once, and each computes what its eager method does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.quiet import silence_libraries
from edgetune.export.inspect import inspect
from edgetune.export.lower import lower
from edgetune.export.methods import MethodModule, export_methods
from edgetune.export.targets import find
from edgetune.program.artifact import Artifact
from edgetune.quant.int4 import Int4

with silence_libraries():  # libraries that these load warn on import
    from transformers import T5Config, T5ForConditionalGeneration


class Net(nn.Module):
    """A body with a table and a convolution, and a head: nearly all weights are the body's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 64)
        self.norm = nn.BatchNorm1d(64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.body = nn.Linear(64, 256)
        self.head = nn.Linear(256, 5)

    def features(self, ids: Tensor) -> Tensor:
        return torch.relu(self.body(self.norm(self.conv(self.table(ids).mT)).mT)).mean(1)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        found = self.features(ids)
        return {"features": found, "logits": self.head(found)}


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


IDS = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    model = net().train()
    path = tmp_path_factory.mktemp("methods") / "two.pte"
    artifact = export_methods({"forward": (model, IDS), "features": (model.features, (IDS,))}, path, device="pixel-8")
    assert all(module.training for module in model.modules()), "the model's mode is put back"
    return artifact


def test_shared_weights_are_stored_once(two: Artifact) -> None:
    model = net()
    alone = lower(MethodModule("forward", model, None, IDS), (IDS,), find("xnnpack"))
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert weights > 180_000
    assert two.manifest.size_bytes - len(alone.data) < 0.1 * weights
    assert two.path.stat().st_size == two.manifest.size_bytes


def test_each_method_computes_what_eager_does(two: Artifact) -> None:
    model, ids = net(), torch.randint(0, 300, (1, 12))
    with torch.no_grad():
        expected = model(ids)
    features, logits = two.run(ids, "forward")
    assert torch.allclose(features, expected["features"], atol=1e-5)
    assert torch.allclose(logits, expected["logits"], atol=1e-5)


def test_the_manifest_says_what_each_method_takes_and_gives(two: Artifact) -> None:
    known = two.manifest
    assert [method.name for method in known.calls] == ["forward", "features"]
    forward, features = known.calls
    assert [(o.name, o.shape) for o in forward.outputs] == [("features", (1, 256)), ("logits", (1, 5))]
    assert [(i.name, i.shape, i.dtype) for i in features.inputs] == [("input_0", (1, 12), "int64")]
    assert {operator.module for operator in features.operators} >= {"body", "table", "conv"}
    for method in known.calls:
        assert method.parity is not None
        assert method.parity.max_relative_difference < 1e-5
        assert method.plan_bytes > 0
        assert method.delegated_macs_pct == 100.0
    assert Artifact.load(two.path) == two


def test_inspection_names_every_method(two: Artifact) -> None:
    found = inspect(two.path)
    assert {method.name for method in found.methods} == {"forward", "features"}
    assert found.beside is not None
    assert found.beside.checksum_ok
    assert "forward: rows 1" in found.beside.parity
    assert "features: rows 1" in found.beside.parity
    assert sum(part.size_bytes for part in found.parts) == found.size_bytes


def test_inputs_of_other_shapes_and_other_methods_are_refused(two: Artifact) -> None:
    with pytest.raises(EdgetuneError, match=r"does not accept.*\(1, 13\).*int64 \(1, 12\)") as caught:
        two.run(torch.zeros(1, 13, dtype=torch.long), "features")
    assert caught.value.exit_code == Exit.EXPORT
    with pytest.raises(EdgetuneError, match=r"no such method: got 'feature'.*did you mean 'features'"):
        two.run(IDS, "feature")


def test_two_modules_with_weights_of_one_name_stay_apart(tmp_path: Path) -> None:
    """And the constants that passes make, of which every method's first has one name."""

    class Tower(nn.Module):
        def __init__(self, start: float) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 32)
            self.register_buffer("angles", torch.arange(start, start + 64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(self.layer(x + self.angles.cos() * 2.0), 1)

    torch.manual_seed(0)
    x = torch.randn(1, 64)
    methods = {"left": (Tower(0.0), x), "right": (Tower(50.0), x)}
    artifact = export_methods(methods, tmp_path / "pair.pte", external_data=True)
    for method in artifact.manifest.calls:
        assert method.parity is not None
        assert method.parity.max_relative_difference < 1e-5
    assert artifact.data_path is not None
    assert artifact.manifest.size_bytes < 2 * 64 * 32 * 4 < artifact.data_path.stat().st_size
    left = artifact.run(x, method="left")[0]
    assert torch.allclose(left, methods["left"][0](x), atol=1e-4)
    assert not torch.allclose(left, methods["right"][0](x), atol=1e-1)


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


class Decoder(nn.Module):
    """T5's decoder and head, given the encoder's states."""

    def __init__(self, model: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.whole = model

    def forward(self, decoder_input_ids: Tensor, states: Tensor) -> Tensor:
        return self.whole(encoder_outputs=(states,), decoder_input_ids=decoder_input_ids, use_cache=False).logits


@pytest.mark.slow
def test_the_encoder_and_decoder_of_a_quantized_t5(tmp_path: Path) -> None:
    model = Int4(group_size=32).apply(t5())
    ids, start = torch.randint(1, 128, (1, 10)), torch.randint(1, 128, (1, 6))
    with torch.no_grad():
        states = model.encoder(ids).last_hidden_state
    methods = {"encode": (model.encoder, {"input_ids": ids}), "decode": (Decoder(model), (start, states))}
    artifact = export_methods(methods, tmp_path / "t5.pte", max_relative_difference=0.05)
    encode, decode = artifact.manifest.calls
    assert [o.name for o in encode.outputs] == ["last_hidden_state"]
    assert decode.outputs[0].shape == (1, 6, 128)
    alone = export_methods({"decode": methods["decode"]}, tmp_path / "alone.pte", max_relative_difference=0.05)
    encoder_blocks = sum(p.numel() for p in model.encoder.block.parameters())
    assert artifact.manifest.size_bytes - alone.manifest.size_bytes < encoder_blocks + 60_000  # not the table again


def test_what_is_no_method_is_refused(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "m.pte"
    with pytest.raises(EdgetuneError, match="neither a module nor a method of one"):
        export_methods({"a": (F.relu, IDS)}, path)
    with pytest.raises(EdgetuneError, match="at least one method"):
        export_methods({}, path)
    with pytest.raises(EdgetuneError, match="an identifier: got 'a-b'"):
        export_methods({"a-b": (model, IDS)}, path)
    with pytest.raises(EdgetuneError, match="no such method: got 'forwards'"):
        export_methods({"forward": (model, IDS)}, path, check_inputs={"forwards": [IDS]})
    assert list(tmp_path.iterdir()) == []


class Exported(nn.Module):
    """Something else where it is captured: what a wrong lowering comes to."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inner(x)
        return x + 1, y * 1.01 if torch.compiler.is_exporting() else y


def test_a_method_further_off_than_allowed_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    methods = {"run": (Exported(nn.Linear(8, 4)).eval(), torch.randn(2, 8))}
    with pytest.raises(
        EdgetuneError, match=r"output output_1 of run differs from the model's by .* 0\.01 of .*allowed is 0\.001"
    ) as caught:
        export_methods(methods, tmp_path / "m.pte")
    assert caught.value.exit_code == Exit.EXPORT
    assert list(tmp_path.iterdir()) == []
    (method,) = export_methods(methods, tmp_path / "m.pte", max_relative_difference=0.02).manifest.calls
    assert method.parity is not None
    assert [output.name for output in method.parity.outputs] == ["output_0", "output_1"]
    assert method.parity.outputs[0].max_relative_difference < 1e-6
    assert 0.009 < method.parity.max_relative_difference < 0.011
