"""Several adapters on one exported base, as inputs of the program and as files: each computes what eager does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.export import Artifact, export
from edgetune.export.inspect import inspect
from edgetune.program.manifest import AdapterForm
from edgetune.quant.int4 import Int4
from edgetune.runtime.run import run_in_child
from support import laws
from support.adapters import adapted, change, peft_logits, save_lora

TARGETS = {"bert": ["query", "value", "intermediate.dense"], "llama": ["q_proj", "v_proj", "up_proj"]}
MODELS: dict[str, Callable[[], nn.Module]] = {"bert": laws.bert, "llama": laws.llama}
CASES = [  # every pair of a model, a type and a form
    ("bert", "fp32", "inputs"), ("bert", "8da4w", "files"), ("llama", "fp32", "files"), ("llama", "8da4w", "inputs"),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A program with three adapters, its base, and the folders of the adapters."""

    artifact: Artifact
    base: nn.Module
    plain: nn.Module  # the base before it was quantized
    folders: dict[str, Path]
    inputs: dict[str, Tensor]

    def eager(self, name: str) -> Tensor:
        with adapted(self.base, self.folders[name]) as model, torch.no_grad():
            logits: Tensor = model(**self.inputs).logits
        return logits

    @property
    def allowed(self) -> float:
        parity = self.artifact.manifest.main.parity
        assert parity is not None
        assert parity.max_relative_allowed is not None
        return parity.max_relative_allowed


def adapters_for(model: nn.Module, kind: str, folder: Path) -> dict[str, Path]:
    """Of different ranks, scales and layers; one of them with two equal tensors and a B of zeros."""
    first, *_ = TARGETS[kind]
    saved = {
        "en": save_lora(model, folder / "en", TARGETS[kind], seed=1, alpha_pattern={first: 6}),
        "legal": save_lora(model, folder / "legal", TARGETS[kind][:2], seed=2, rank=2, use_rslora=True),
        "part": save_lora(model, folder / "part", TARGETS[kind][1:], seed=3, lora_alpha=12),
    }
    name = next(key for key in load_file(saved["part"] / "adapter_model.safetensors") if key.endswith("B.weight"))
    layer = name.removesuffix(".lora_B.weight").replace(".", "__")
    other = layer.replace("__0__", "__1__") if "__0__" in layer else layer.replace("__1__", "__0__")
    state = load_file(saved["part"] / "adapter_model.safetensors")
    equal = state[f"{layer}.lora_A.weight".replace("__", ".")]
    zero = torch.zeros_like(state[name])
    saved["part"] = change(
        saved["part"], folder / "odd", **{f"{other}__lora_A__weight": equal, f"{layer}__lora_B__weight": zero}
    )
    return saved


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Case]:
    made: dict[tuple[str, str, str], Case] = {}

    def make(kind: str, bits: str, form: AdapterForm) -> Case:
        if (kind, bits, form) not in made:
            folder = tmp_path_factory.mktemp("adapters")
            base, plain = MODELS[kind](), MODELS[kind]()
            folders = adapters_for(base, kind, folder)
            base = Int4().apply(base) if bits == "8da4w" else base
            inputs = laws.tokens()
            assert isinstance(inputs, dict)
            inputs = {name: tensor[:2] for name, tensor in inputs.items()}
            artifact = export(base, inputs, folder / "model.pte", adapters=folders, form=form)
            made[kind, bits, form] = Case(artifact, base, plain, folders, inputs)
        return made[kind, bits, form]

    return make


@pytest.mark.parametrize(("kind", "bits", "form"), CASES)
def test_every_adapter_computes_what_eager_does(case: Callable[..., Case], kind: str, bits: str, form: str) -> None:
    one = case(kind, bits, form)
    outputs = {name: one.artifact.run(one.inputs, adapter=name)[0] for name in one.folders}
    for name, output in outputs.items():
        expected = one.eager(name)
        assert float((output - expected).abs().max()) <= one.allowed * float(expected.abs().max())
        if bits == "fp32":
            assert torch.allclose(output, peft_logits(one.plain, one.folders[name], one.inputs), atol=1e-5)
    for name in ("legal", "part"):
        apart = float((outputs[name] - outputs["en"]).abs().max())
        assert apart > 2 * one.allowed * float(outputs["en"].abs().max())
    assert one.artifact.manifest.main.delegated_macs_pct == 100


@pytest.mark.parametrize(("kind", "bits", "form"), CASES)
def test_adapters_add_their_own_bytes(case: Callable[..., Case], kind: str, bits: str, form: str) -> None:
    one = case(kind, bits, form)
    manifest, spec = one.artifact.manifest, one.artifact.manifest.adapters
    assert spec is not None
    assert (spec.form, spec.rank, [file.name for file in spec.files]) == (form, 4, ["en", "legal", "part"])
    assert [file.rank for file in spec.files] == [4, 2, 4]
    files = [one.artifact.path, *(one.artifact.path.with_name(name) for name in manifest.files)]
    assert manifest.total_bytes == sum(file.stat().st_size for file in files)
    assert Artifact.load(one.artifact.path) == one.artifact
    own = sum((folder / "adapter_model.safetensors").stat().st_size for folder in one.folders.values())
    filled = sum(4 * layer.rank * (layer.inputs + layer.outputs) for layer in spec.layers)
    assert all(file.size_bytes <= filled + 2**12 for file in spec.files)
    if (kind, bits) == ("bert", "8da4w"):  # lowering the base alone takes as long as all the other tests of a case
        base = export(one.base, one.inputs, one.artifact.path.with_name("base.pte")).manifest.total_bytes
        assert manifest.total_bytes <= base + own + 2**16


def test_a_loaded_program_changes_its_adapter(case: Callable[..., Case]) -> None:
    one = case("bert", "fp32", "inputs")
    row = tuple(one.inputs.values())
    names = ["en", "legal", None, "part", "en"]
    rows = [one.artifact.with_adapter(row, name) for name in names]
    outputs = [output for (output,) in run_in_child(one.artifact.path, rows)]  # loads the program once
    with torch.no_grad():
        base = one.base(**one.inputs).logits
    expected = [base if name is None else one.eager(name) for name in names]
    for output, wanted in zip(outputs, expected, strict=True):
        assert torch.allclose(output, wanted, atol=1e-5)
    assert torch.equal(outputs[0], outputs[4])
    assert torch.equal(outputs[2], one.artifact.run(one.inputs)[0]), "no adapter is one of zeros"


def test_the_files_of_adapters_are_named_as_the_inputs(case: Callable[..., Case]) -> None:
    one = case("bert", "fp32", "inputs")
    spec = one.artifact.manifest.adapters
    assert spec is not None
    inputs = one.artifact.manifest.main.inputs
    assert [given.name for given in inputs[:2]] == ["input_ids", "attention_mask"]
    assert inputs[2:] == spec.inputs
    stored = load_file(one.artifact.path.with_name("model.legal.safetensors"))
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {i.name: i.shape for i in inputs[2:]}
    name = "bert.encoder.layer.0.intermediate.dense.lora_B"  # which this adapter does not have
    assert not stored[name].any()


@pytest.mark.parametrize(("kind", "bits", "form"), CASES[:2])
def test_an_inspection_states_adapters_sizes_and_memory(
    case: Callable[..., Case], kind: str, bits: str, form: str
) -> None:
    one = case(kind, bits, form)
    text = str(inspect(one.artifact.path))
    way = "given as inputs of the program" if form == "inputs" else "loaded from files beside the base's"
    assert f"3, {way}; rank up to 4 on 6 layers" in text
    assert "rank 2, within" in text
    assert text.count("checksum ok") == (3 if form == "inputs" else 4)
    assert "packs the base again, unless the runtime's weight cache is on" in text
    assert "all files" in text


@pytest.mark.parametrize("form", ["inputs", "files"])
def test_an_adapter_of_another_program_is_refused(case: Callable[..., Case], form: str) -> None:
    one, other = (case(*each) for each in CASES if each[2] == form)
    suffix = {"inputs": "safetensors", "files": "ptd"}[form]
    same = one.artifact.path.with_name(f"model.en.{suffix}")
    assert torch.equal(one.artifact.run(one.inputs, adapter=same)[0], one.artifact.run(one.inputs, adapter="en")[0]), (
        "a file beside the program is named, or given by its path"
    )
    with pytest.raises(EdgetuneError, match=r"model\.en\..*: the adapter is for another base"):
        one.artifact.run(one.inputs, adapter=other.artifact.path.with_name(same.name))
    with pytest.raises(EdgetuneError, match=r"no such adapter: got 'leagl'; allowed: en, legal, part.*'legal'"):
        one.artifact.run(one.inputs, adapter="leagl")
    if form == "files":
        with pytest.raises(EdgetuneError, match=r"needs one of its adapters: allowed: en, legal, part"):
            one.artifact.run(one.inputs)


@pytest.mark.parametrize(
    "settings", [{"form": "inputs", "dynamic": {"batch": (1, 4)}}, {"form": "files", "dtype": "fp16"}]
)
def test_sizes_that_differ_and_16_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    model, rows = laws.mlp(), laws.vectors()
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    folders = {f"{n}": save_lora(model, tmp_path / f"{n}", layers[: 2 - n], seed=n, rank=2 + n) for n in range(2)}
    assert isinstance(rows, Tensor)
    artifact = export(model, rows[:2], tmp_path / "model.pte", adapters=folders, **settings)
    for count in (1, 3) if "dynamic" in settings else (2,):
        for name, folder in folders.items():
            with adapted(model, folder), torch.no_grad():
                expected = model(rows[:count])
            (output,) = artifact.run(rows[:count], adapter=name)
            assert torch.allclose(output, expected, atol=1e-5 if "dynamic" in settings else 2e-2)


def test_a_program_without_adapters_takes_none(case: Callable[..., Case], tmp_path: Path) -> None:
    artifact = export(laws.mlp(), laws.vectors(), tmp_path / "model.pte")
    with pytest.raises(EdgetuneError, match="has no adapters: got 'en'"):
        artifact.run(laws.vectors(), adapter="en")
