"""Fused experts of a mixture: split into linears with the same outputs, quantized, and exported smaller."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from edgetune.core.apply import apply
from edgetune.core.technique import Technique
from edgetune.export import export
from edgetune.quant.experts import SplitExperts, split_experts
from edgetune.quant.int4 import Int4
from edgetune.quant.int8_dynamic import Int8Dynamic
from edgetune.quant.size import stored_bytes, weight_bits
from support.mixtures import IDS, mixture


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GptOss"])
def test_split_experts_compute_the_same(kind: str) -> None:
    model = mixture(kind)
    before, expected = sum(p.numel() for p in model.parameters()), model(IDS).logits
    split_experts(model, lambda name: name.endswith("0.down_proj"))
    assert sum(isinstance(module, SplitExperts) for module in model.modules()) == 2
    assert sum(p.numel() for p in model.parameters()) == before
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("technique", "bits"), [(Int4(algorithm="absmax"), 4), (Int8Dynamic(), 8)])
def test_a_mixture_shrinks_and_its_program_computes_the_same(tmp_path: Path, technique: Technique, bits: int) -> None:
    model = mixture("Mixtral")
    plain, example = copy.deepcopy(model), {"input_ids": IDS[:1]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gate.weight: these weights do not belong")  # the router
        quantized = apply(model, technique)
    experts = [m for n, m in quantized.named_modules() if ".experts." in n and isinstance(m, nn.Linear)]
    assert len(experts) == 2 * 4 * 2
    assert {weight_bits(layer.weight) for layer in experts} == {bits}
    assert technique.note(quantized).startswith("the 4 experts of 2 layers are linears now")
    sizes = []
    for name, each in (("plain", plain), ("quantized", quantized)):
        artifact = export(each, example, tmp_path / f"{name}.pte", check_inputs=[example])
        parity = artifact.manifest.main.parity
        assert parity is not None
        assert parity.max_relative_difference < 1e-5
        sizes.append((tmp_path / f"{name}.pte").stat().st_size)
    in_experts = 2 * 4 * 3 * 32 * 64
    assert sizes[0] - sizes[1] > in_experts * (32 - bits) / 8 * 0.9
    assert stored_bytes(plain) - stored_bytes(quantized) > in_experts * (32 - bits) / 8 * 0.9
    delegated = [o for o in artifact.manifest.main.operators if ".experts." in o.module and o.kind == "linear"]
    assert len(delegated) == 16
    assert all(operator.delegated for operator in delegated)


def test_experts_that_are_left_out_stay_fused() -> None:
    model = mixture("Mixtral")
    with pytest.warns(UserWarning, match=r"experts.gate_up_proj.*these weights do not belong to linear layers"):
        apply(model, Int8Dynamic(skip=("*.experts.*",)))
    assert not any(isinstance(module, SplitExperts) for module in model.modules())


def test_a_plain_mixture_gets_the_structure_of_a_stored_one() -> None:
    model, plain = mixture("Mixtral"), mixture("Mixtral")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gate.weight: these weights do not belong")
        quantized = apply(model, Int8Dynamic())
    state = quantized.state_dict()
    rebuilt = Int8Dynamic().rebuild(plain, state)
    rebuilt.load_state_dict(state, assign=True)
    torch.testing.assert_close(rebuilt(IDS).logits, quantized(IDS).logits, atol=0, rtol=0)
