"""Several adapters on one base as methods of one program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.program.artifact import Artifact
from support import decoders
from support.adapters import adapted, save_lora
from support.laws import bert, llama, logits, tokens

TARGETS = {"bert": ["query", "value", "intermediate.dense"], "llama": ["q_proj", "v_proj", "up_proj"]}


def base_of(kind: str) -> nn.Module:
    return bert() if kind == "bert" else llama()


def saved(kind: str, folder: Path) -> dict[str, Path]:
    """Of different ranks and layers."""
    *_, last = targets = TARGETS[kind]
    return {
        "en": save_lora(base_of(kind), folder / "en", targets, seed=1),
        "legal": save_lora(base_of(kind), folder / "legal", [last], seed=2, rank=2),
    }


@pytest.mark.parametrize(("kind", "bits"), [("bert", "fp32"), ("llama", "8da4w")])
def test_each_adapter_is_a_method_over_one_base(kind: str, bits: str, tmp_path: Path) -> None:
    base, inputs, folders = base_of(kind), tokens(), saved(kind, tmp_path)
    if bits == "8da4w":
        et.apply(base, et.Int4(algorithm="absmax"))
    before = logits(base, inputs)
    artifact = et.export(base, inputs, tmp_path / "model.pte", adapters=folders, form="methods")
    assert artifact.manifest.kind == "methods"
    assert [call.name for call in artifact.manifest.calls] == ["base", "en", "legal"]
    assert [path.name for path in sorted(tmp_path.glob("model.*"))] == ["model.json", "model.pte"]
    allowed = max(call.parity.max_relative_allowed or 0 for call in artifact.manifest.calls if call.parity)
    outputs = {name: Artifact.load(artifact.path).run(inputs, method=name)[0] for name in ("base", *folders)}
    for name, folder in folders.items():
        with adapted(base, folder) as model:
            expected = logits(model, inputs)
        torch.testing.assert_close(outputs[name], expected, rtol=0, atol=allowed * float(expected.abs().max()))
        assert (outputs[name] - outputs["base"]).abs().max() > 0.1 * expected.abs().max()
    torch.testing.assert_close(outputs["base"], before, rtol=0, atol=allowed * float(before.abs().max()))
    assert torch.equal(logits(base, inputs), before), "the base stays as it is"
    assert not any(module._forward_hooks for module in base.modules())
    alone = et.export(base, inputs, tmp_path / "alone.pte", min_same_prediction_pct=0)
    added = sum(file.stat().st_size for folder in folders.values() for file in folder.glob("*.safetensors"))
    assert artifact.manifest.size_bytes < alone.manifest.size_bytes + added + 2**20


def test_the_program_takes_one_row_and_is_compared_on_all(tmp_path: Path) -> None:
    folders = saved("bert", tmp_path)
    artifact = et.export(bert(), tokens(), tmp_path / "model.pte", adapters=folders, form="methods", one_row=True)
    for call in artifact.manifest.calls:
        assert call.inputs[0].shape == (1, 10)
        assert call.parity is not None
        assert call.parity.rows == 4


def test_what_methods_cannot_be_is_refused(tmp_path: Path) -> None:
    folders = saved("bert", tmp_path)
    named = {"base": folders["en"]}
    with pytest.raises(EdgetuneError, match="the method base is the model without an adapter"):
        et.export(bert(), tokens(), tmp_path / "model.pte", adapters=named, form="methods")
    with pytest.raises(EdgetuneError, match="adapters as methods compute in fp32: got 'bf16'"):
        et.export(bert(), tokens(), tmp_path / "model.pte", adapters=folders, form="methods", dtype="bf16")
    with pytest.raises(EdgetuneError, match="a method's name must be an identifier: got 'en-US'"):
        et.export(bert(), tokens(), tmp_path / "model.pte", adapters={"en-US": folders["en"]}, form="methods")
    writer, tokenizer = decoders.llama(), decoders.tokenizer()
    with pytest.raises(EdgetuneError, match="would each have a cache"):
        et.export_language(writer, tokenizer, tmp_path / "model.pte", max_tokens=64, adapters=folders, form="methods")
    assert not list(tmp_path.glob("model.*"))
