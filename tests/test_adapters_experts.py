"""Adapters on the fused experts of mixtures: reached by pattern, or refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import edgetune as et
from edgetune.core.peft_layers import is_tuner
from support.laws import fit, logits
from support.mixtures import IDS, ids, mixture

KINDS = ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GptOss", "DeepseekV3"]
MISREAD = "ignore:.*peft itself takes"  # of DeepSeek's shared expert


@pytest.mark.filterwarnings(MISREAD)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [("*_proj",), ("*.experts.down_proj",)])
def test_patterns_reach_fused_experts(kind: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    plain = mixture(kind)
    model = et.apply(mixture(kind), et.LoRA(rank=2, targets=targets))
    torch.testing.assert_close(logits(model, ids()), logits(plain, ids()), atol=0, rtol=0)
    assert set(model.state_dict()) > set(plain.state_dict())
    adapted = {name.removesuffix(".base_layer") for name, module in model.named_modules() if is_tuner(module)}
    experts = {n.removesuffix(".down_proj") for n, p in plain.named_parameters() if n.endswith(".experts.down_proj")}
    assert experts <= adapted
    fit(model, ids())
    trained = logits(model, ids())
    assert (trained - logits(plain, ids())).abs().max() > 1e-2
    et.save_adapter(model, tmp_path)
    loaded = et.load_adapter(mixture(kind), tmp_path)
    torch.testing.assert_close(logits(loaded, ids()), trained, atol=0, rtol=0)
    for merged in (et.finalize(model), et.finalize(loaded)):
        assert merged.state_dict().keys() == plain.state_dict().keys()
        torch.testing.assert_close(logits(merged, ids()), trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "DeepseekV3"])
def test_plain_peft_loads_what_was_trained_on_experts(kind: str, tmp_path: Path) -> None:
    import peft

    model = et.apply(mixture(kind), et.LoRA(rank=2, targets=["*_proj"]))
    fit(model, ids())
    et.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        theirs = peft.PeftModel.from_pretrained(mixture(kind), str(tmp_path))
    torch.testing.assert_close(logits(theirs, ids()), logits(model, ids()), atol=0, rtol=0)


def test_a_file_that_peft_misreads_is_named(tmp_path: Path) -> None:
    model = et.apply(mixture("DeepseekV3"), et.LoRA(rank=2, targets=["*.shared_experts.down_proj"]))
    with pytest.warns(UserWarning, match=r"peft itself takes .*shared_experts.down_proj for experts.*et.load_adapter"):
        et.save_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("technique", "action"),
    [
        (et.LoHa(targets=["*.down_proj"]), "use lora"),
        (et.GLoRA(targets=["*.down_proj"]), "use lora"),
        (et.Bottleneck(targets=["*.down_proj"]), r'target "\*.experts"'),
    ],
)
def test_techniques_that_miss_the_experts_say_so(technique: et.Technique, action: str) -> None:
    model = mixture("Qwen2Moe")
    with pytest.raises(et.EdgetuneError, match=rf"2 fused weights with 16,384 parameters(.|\n)*{action}(.|\n)*skip"):
        et.apply(model, technique)
    assert all(parameter.requires_grad for parameter in model.parameters())
    et.apply(model, technique.model_copy(update={"skip": ("*.experts.*",)}))
    adapted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert adapted
    assert all("shared_expert.down_proj" in name for name in adapted)


def test_names_of_before_the_fusion_are_explained() -> None:
    with pytest.raises(et.EdgetuneError, match=r"experts.gate_proj is a part of .*experts.gate_up_proj"):
        et.apply(mixture("Qwen2Moe"), et.LoRA(targets=["*.gate_proj"]))
    for settings in ({"targets": ["*.gate_proj"], "skip": ["*.gate_up_proj"]}, {"targets": ["*.shared*.gate_proj"]}):
        model = et.apply(mixture("Qwen2Moe"), et.LoRA(**settings))
        assert sum(is_tuner(module) for module in model.modules()) == 2


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"dropout": 0.1}, "dropout does not work"), ({"dora": True}, "dora does not work"), ({"init": "pissa"}, "pissa")],
)
def test_settings_that_fused_experts_do_not_take(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(et.EdgetuneError, match=rf"experts.*{problem}"):
        et.apply(mixture(), et.LoRA(targets=["*.experts.*"], **settings))


def test_a_bottleneck_stands_beside_all_experts() -> None:
    model = et.apply(
        mixture(), et.Bottleneck(targets=["*.experts"], form="parallel", width=4), et.Sample.of({"input_ids": IDS})
    )
    before = logits(model, ids())
    fit(model, ids())
    assert (logits(model, ids()) - before).abs().max() > 1e-3
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"down", "up"}
