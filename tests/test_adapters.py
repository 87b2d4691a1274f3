"""Adapters of peft's families as techniques: their settings, where they end, and what they refuse before any work."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune.adapt import families
from edgetune.adapt.adapter import Adapter
from edgetune.adapt.families import FAMILIES, LEFT_OUT, FamilyAdapter
from edgetune.adapt.layer_kinds import kind_of, widths_of
from edgetune.adapt.lora import LoRA
from edgetune.core.apply import active_techniques, apply, finalize
from edgetune.core.errors import EdgetuneError
from edgetune.core.peft_layers import is_peft, is_tuner
from edgetune.core.registry import PEFT_FAMILIES, technique_class
from edgetune.lean.saved import saved_bytes
from edgetune.lean.technique import Lean
from edgetune.quant.nf4 import NF4
from support.family_cases import BASES, EXPORTED, small
from support.laws import BLOCKS, bert, cnn, fit, llama, logits, loss_of, mlp, pictures, tokens, vectors

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # FRoD's

DEPTHWISE = ("ia3", "loha", "lokr")


def test_every_weight_family_of_peft_is_a_technique_or_named() -> None:
    """The rest of `PeftType` changes inputs, tokens or whole models, or routes between adapters."""
    import peft
    from peft.tuners.tuners_utils import BaseTuner

    other = {"ADAPTION_PROMPT", "CARTRIDGE", "SHADOW", "XLORA"}
    tuners = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.items()
    weights = {str(t.value) for t, kind in tuners if isinstance(kind, type) and issubclass(kind, BaseTuner)} - other
    own = {"POLY"}  # a technique in a file of its own, since it needs the task of each row
    assert weights == {*families.peft_types(), *own, *(name.upper() for name in LEFT_OUT)}
    assert list(FAMILIES) == sorted(FAMILIES)
    assert set(FAMILIES) == set(PEFT_FAMILIES)


@pytest.mark.parametrize("name", PEFT_FAMILIES)
def test_settings_are_those_of_pefts_config(name: str) -> None:
    kind = technique_class(name)
    assert issubclass(kind, FamilyAdapter)
    assert getattr(et, PEFT_FAMILIES[name]) is kind
    for setting, field in kind.model_fields.items():
        assert (field.description or "").endswith("."), f"{name}.{setting}"
    with pytest.raises(EdgetuneError, match="unknown field"):
        kind(targets=["*"], nonsense=1, **({"token_indices": [1]} if name == "trainable_tokens" else {}))


@pytest.mark.parametrize(
    ("name", "settings", "problem"),
    [
        ("loha", {"rank": 0}, "rank: must be at least 1"),
        ("road", {"group_size": 3}, "peft refuses these settings: The group_size must be divisible by 2"),
        ("road", {"variant": "road_3"}, "must be one of the allowed values"),
        ("boft", {"boft_block_num": 2}, "peft refuses these settings"),
        ("supertuning", {"sparsity": 1.5}, "peft refuses these settings: sparsity must be in"),
        ("trainable_tokens", {}, "token_indices"),
        ("trainable_tokens", {"token_indices": []}, "token_indices: .*at least 1"),
        ("loha", {"depth": "last4"}, "depth"),
        ("loha", {"depth": 1.5}, "depth"),
    ],
)
def test_wrong_settings(name: str, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(EdgetuneError, match=problem):
        technique_class(name)(targets=["*"], **settings)


def refused(model: nn.Module, technique: Adapter, problem: str) -> None:
    """Applying raises, and the model is as it was."""
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(EdgetuneError, match=problem):
        apply(model, technique)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {n: b[0] for n, b in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert not any(is_peft(m) or m._forward_hooks for m in model.modules())
    assert not [name for name in vars(model) if name.startswith(("edgetune", "peft"))]


@pytest.mark.parametrize(
    ("name", "settings", "problem"),
    [
        ("c3a", {"block_size": 24}, "blocks.1.up: block_size must divide the input width 32: got 24"),
        ("vblora", {"vector_length": 64}, "vector_length must divide the input width 32"),
        ("gralora", {"rank": 3, "gralora_k": 3}, "gralora_k must divide the input width"),
        ("road", {"group_size": 48}, "group_size must divide the output width 64"),
        ("boft", {"boft_block_size": 12}, "boft_block_size must divide the input width 32"),
        ("oft", {"oft_block_size": 20}, "oft_block_size must divide the input width 32"),
        ("hra", {"rank": 3}, "must divide the rank 3"),
        ("loha", {"rank": 33}, "blocks.1.up is 32 wide and gives 64: the rank is above that: got 33"),
        ("miss", {"rank": 5, "init_weights": "bat"}, "peft refused: The weight matrix must be fully divisible"),
        ("loha", {"targets": ("*.upp",)}, r"matches no layer: got '\*.upp'.*did you mean '\*.up'"),
        ("ln_tuning", {"targets": ("*.up",)}, "matches no layer"),
        ("loha", {"depth": "last-4"}, "the model has 3 blocks"),
        ("loha", {"targets": ("stem",), "depth": "last-1"}, "all layers of targets are before"),
        ("ia3", {"feedforward": ("*.stem",)}, "feedforward: the pattern matches no layer of targets"),
        ("lily", {"skip": ("blocks.0.up",)}, "lily shares factors between all layers of a name"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(name: str, settings: dict[str, Any], problem: str) -> None:
    refused(mlp(), small(name, **settings) if "targets" not in settings else _with_targets(name, settings), problem)


def _with_targets(name: str, settings: dict[str, Any]) -> FamilyAdapter:
    settings = dict(settings)
    return small(name, settings.pop("targets"), **settings)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([3, 50], "token_indices: .*word_embeddings has 50 tokens: got .50"),
        ([-1], "has 50 tokens"),
        ([3, 3], "twice"),
    ],
)
def test_tokens_that_the_table_has_not(rows: list[int], problem: str) -> None:
    refused(bert(), small("trainable_tokens", ("*.word_embeddings",), token_indices=rows), problem)


def test_only_the_named_tokens_change() -> None:
    model = apply(llama(), small("trainable_tokens"))
    torch.testing.assert_close(logits(model, tokens()), logits(llama(), tokens()), atol=0, rtol=0)
    assert [p.shape for p in model.parameters() if p.requires_grad] == [(2, 32)]
    fit(model, tokens())
    table = finalize(model).get_parameter("model.embed_tokens.weight")
    moved = (table - llama().get_parameter("model.embed_tokens.weight")).any(1)
    assert moved.nonzero().flatten().tolist() == [5, 30]


def test_a_4_bit_base_is_refused_where_it_breaks() -> None:
    model = apply(mlp(), NF4(block_size=32))
    others = ("ln_tuning", "trainable_tokens")  # of layers that are not packed
    for name in [name for name, family in FAMILIES.items() if not family.four_bit and name not in others]:
        with pytest.raises(EdgetuneError, match=rf"has a 4-bit weight, which peft's {name} cannot adapt.*lora, beft"):
            apply(model, small(name))
        assert not any(is_tuner(module) for module in model.modules())
    apply(model, small("ln_tuning"))  # of other layers


@pytest.mark.parametrize("name", [name for name, f in FAMILIES.items() if f.four_bit and f.merges])
def test_on_a_4_bit_base_it_merges_exactly(name: str) -> None:
    model = apply(mlp(), [NF4(block_size=32), small(name)])
    before = logits(model, vectors())
    fit(model, vectors())
    trained = logits(model, vectors())
    assert (trained - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(finalize(model), vectors()), trained, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*DEPTHWISE, "boft", "hra", "hira"])
def test_convolutions_train_and_merge(name: str) -> None:
    """Of a mobile network, the depthwise ones where the family has them."""
    targets = ("stem", "*.pointwise", "*.depthwise") if name in DEPTHWISE else ("*.pointwise",)
    model = apply(cnn(), small(name, targets, feedforward=()) if name == "ia3" else small(name, targets))
    fit(model, pictures())
    trained = logits(model, pictures())
    torch.testing.assert_close(logits(finalize(model), pictures()), trained, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "targets", "problem"),
    [
        ("oft", ("stem",), "stem: oft cannot adapt a Conv2d of this kind.*conv2d 1x1"),
        ("oft", ("*.depthwise",), "in 16 groups"),
        ("boft", ("*.depthwise",), "in 16 groups"),
        ("c3a", ("*.pointwise",), "c3a cannot adapt a Conv2d"),
        ("osf", ("*.pointwise",), "osf cannot adapt a Conv2d"),
        ("lora", ("*.depthwise",), "in 16 groups"),
    ],
)
def test_layers_on_which_it_is_wrong_are_refused(name: str, targets: tuple[str, ...], problem: str) -> None:
    technique = LoRA(targets=targets) if name == "lora" else small(name, targets)
    refused(cnn(), technique, problem)  # type: ignore[arg-type]


def test_a_start_that_rewrites_weights_leaves_them_when_it_is_refused() -> None:
    refused(cnn(), LoRA(rank=2, targets=("classifier", "stem"), init="pissa"), "init pissa cannot start on a Conv2d")
    nf4 = apply(mlp(), NF4(block_size=32))
    with pytest.raises(EdgetuneError, match="cannot start on a 4-bit weight"):
        apply(nf4, LoRA(targets=BLOCKS, init="olora"))
    for settings in (
        {"init": "pissa", "dora": True},
        {"init": "olora", "rslora": True},
        {"init": "orthogonal", "rank": 3},
    ):
        with pytest.raises(EdgetuneError):
            LoRA(targets=BLOCKS, **settings)  # type: ignore[arg-type]


def test_lily_trains_and_is_saved_but_not_merged(tmp_path: Path) -> None:
    model = apply(mlp(), small("lily"))
    up, last = (model.get_submodule(f"blocks.{n}.up").lily_B["default"] for n in (0, 2))
    assert up is last  # peft groups layers by the ends of their names
    before = logits(model, vectors())
    fit(model, vectors())
    trained = logits(model, vectors())
    assert (trained - before).abs().max() > 1e-3
    et.save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(et.load_adapter(mlp(), tmp_path), vectors()), trained, atol=1e-6, rtol=0)
    with pytest.raises(EdgetuneError, match="lily cannot be merged"):
        finalize(model)
    torch.testing.assert_close(logits(model, vectors()), trained, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["vera", "pvera", "vblora", "unilora", "tinylora", "frod", "lily"])
def test_what_layers_share_is_there_once_and_gone_after_the_merge(name: str) -> None:
    plain, model = mlp(), apply(mlp(), small(name))
    fit(model, vectors())
    shared = [*model.parameters(), *model.buffers()]
    assert len({id(p) for p in shared}) == len(shared)
    if FAMILIES[name].merges:
        model = finalize(model)
        assert [n for n, _ in (*model.named_parameters(), *model.named_buffers())] == [
            n for n, _ in (*plain.named_parameters(), *plain.named_buffers())
        ]
        assert vars(model).keys() == vars(plain).keys()


@pytest.mark.parametrize("depth", ["last-1", 0.34])
@pytest.mark.parametrize(
    "make", [lambda **s: LoRA(rank=2, **s), lambda targets, **s: small("loha", targets, **s)], ids=["lora", "loha"]
)
def test_backward_ends_at_the_first_adapted_block(make: Any, depth: Any) -> None:
    whole, last = (apply(mlp(), make(targets=("*.up", "*.down", "classifier"), depth=d)) for d in (None, depth))
    assert [n for n, m in last.named_modules() if is_tuner(m)] == ["blocks.2.up", "blocks.2.down", "classifier"]
    assert 0 < saved_bytes(last, vectors(), loss_of) < 0.6 * saved_bytes(whole, vectors(), loss_of)


def test_a_frozen_first_factor_saves_no_input_and_comes_back(tmp_path: Path) -> None:
    plain, frozen = (apply(mlp(), LoRA(rank=2, targets=BLOCKS, frozen_a=f)) for f in (False, True))
    downs = [p for name, p in frozen.named_parameters() if ".lora_A." in name]
    assert len(downs) == 6
    assert not any(p.requires_grad for p in downs)
    assert saved_bytes(frozen, vectors(), loss_of) < 0.8 * saved_bytes(plain, vectors(), loss_of)
    fit(frozen, vectors())
    expected = logits(frozen, vectors())
    et.save_adapter(frozen, tmp_path)
    loaded = et.load_adapter(mlp(), tmp_path)
    torch.testing.assert_close(logits(loaded, vectors()), expected, atol=1e-6, rtol=0)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in frozen.named_parameters() if p.requires_grad
    }
    (technique,) = active_techniques(loaded)
    assert technique.frozen_a  # type: ignore[attr-defined]
    torch.testing.assert_close(logits(finalize(frozen), vectors()), expected, atol=2e-5, rtol=1e-4)


def test_a_frozen_first_factor_with_lean_operators() -> None:
    model = apply(mlp(), [Lean(), LoRA(rank=2, targets=BLOCKS, frozen_a=True)])
    other = apply(mlp(), LoRA(rank=2, targets=BLOCKS, frozen_a=True))
    fit(model, vectors())
    fit(other, vectors())
    torch.testing.assert_close(logits(model, vectors()), logits(other, vectors()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["loha", "vera", "ia3"])
def test_an_adapter_on_a_16_bit_model_trains_in_float32(name: str) -> None:
    model = apply(
        llama().bfloat16(), small(name, ("*.q_proj", "*.v_proj"), **({"feedforward": ()} if name == "ia3" else {}))
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    fit(model, tokens())
    assert {p.dtype for p in finalize(model).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("layer", "kind", "widths"),
    [
        (nn.Linear(4, 6), "linear", (4, 6)),
        (nn.Conv2d(4, 6, 1), "conv2d 1x1", (4, 6)),
        (nn.Conv2d(4, 6, (1, 3)), "conv2d", (12, 6)),
        (nn.Conv2d(4, 8, 3, groups=4), "grouped conv", (9, 8)),
        (nn.Conv1d(4, 6, 3), "conv1d", (12, 6)),
        (nn.Conv3d(4, 6, 1), "conv3d", (4, 6)),
        (nn.Embedding(9, 3), "embedding", (9, 3)),
        (nn.LayerNorm(4), "norm", (0, 0)),
        (nn.ReLU(), None, (0, 0)),
        (nn.Sequential(nn.Linear(2, 2)), None, (0, 0)),
    ],
)
def test_kinds_and_widths(layer: nn.Module, kind: str | None, widths: tuple[int, int]) -> None:
    assert kind_of(layer) == kind
    assert widths_of(layer) == widths


COLUMNS = {
    "nn.Linear": "linear", "Conv1D": "Conv1D", "nn.Conv1d": "conv1d", "nn.Conv2d 1x1": "conv2d 1x1",
    "nn.Conv2d 3x3": "conv2d", "nn.Conv2d depthwise": "grouped conv", "nn.Conv3d": "conv3d",
    "nn.Embedding": "embedding",
}  # fmt: skip


def test_the_kinds_of_layers_are_those_that_merge_exactly() -> None:
    """The table of facts beside docs/peft.md, which is measured."""
    page = (Path(__file__).parents[1] / "docs" / "peft.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    head, measured = rows[0], {row[0]: row for row in rows[2:]}
    for name, family in FAMILIES.items():
        if name == "ln_tuning":
            continue
        row = measured[re.sub("^PEFT-", "", name.upper())]
        exact = {COLUMNS[head[i]] for i, cell in enumerate(row) if cell == "exact" and head[i] in COLUMNS}
        assert exact == set(family.adapts if family.merges else ()), name


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.merges and n not in EXPORTED])
def test_every_merged_family_exports(name: str, tmp_path: Path) -> None:
    """Those of `EXPORTED` are in the laws."""
    make, inputs = BASES.get(name, (mlp, vectors))
    model = apply(make(), small(name))
    fit(model, inputs())
    artifact = et.export(finalize(model), inputs(), tmp_path / "model.pte", target="xnnpack", one_row=True)
    assert artifact.manifest.main.parity.same_prediction_pct == 100
    assert artifact.manifest.main.parity.max_abs_difference < 1e-3


def test_an_adapter_leaves_the_compilers_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setenv("CC", "cc")
    monkeypatch.delenv("CC")
    apply(mlp(), small("boft"))
    assert (os.environ.get("CC"), os.environ["CXX"]) == (None, "c++")
