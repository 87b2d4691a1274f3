"""Files of every family: edgetune's in plain peft, plain peft's in edgetune, and finalize on peft's own model."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgetune.adapt.families import FamilyAdapter, from_config, peft_types
from edgetune.adapt.files import save_adapter
from edgetune.adapt.loading import load_adapter
from edgetune.adapt.lora import LoRA
from edgetune.core.apply import apply, finalize
from edgetune.core.errors import EdgetuneError
from edgetune.core.registry import PEFT_FAMILIES
from support.family_cases import BASES, small
from support.laws import ATTENTION, bert, fit, logits, mlp, tokens, vectors

torch.set_num_threads(1)
pytestmark = [  # of plain peft: FRoD, BOFT, LN tuning
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

families = pytest.mark.parametrize("name", PEFT_FAMILIES)


@pytest.fixture(autouse=True)
def _compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain peft's BOFT leaves CC and CXX at gcc."""
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, os.environ.get(name, "c++"))


def plain_peft(technique: FamilyAdapter, model: nn.Module) -> Any:
    import peft

    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[technique.peft_name]
    settings: dict[str, Any] = {theirs: getattr(technique, ours) for ours, theirs in technique.peft_fields.items()}
    settings |= {"feedforward_modules": ["blocks.1.down"]} if technique.name == "ia3" else {}
    return peft.get_peft_model(
        model,
        config(target_modules=[t.removeprefix("blocks.*.").removeprefix("*.") for t in technique.targets], **settings),
    ).eval()


@families
def test_plain_peft_loads_ours(name: str, tmp_path: Path) -> None:
    import peft

    make, inputs = BASES.get(name, (mlp, vectors))
    model = apply(make(), small(name, also_train=("lm_head" if name in BASES else "classifier",)))
    fit(model, inputs(), steps=5)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    expected = logits(model, inputs())
    assert (expected - logits(make(), inputs())).abs().max() > 1e-3
    torch.testing.assert_close(logits(theirs, inputs()), expected, atol=1e-6, rtol=1e-5)


@families
def test_ours_loads_plain_pefts_and_finalizes_both(name: str, tmp_path: Path) -> None:
    technique, (make, inputs) = small(name), BASES.get(name, (mlp, vectors))
    theirs = plain_peft(technique, make())
    fit(theirs, inputs(), steps=5)
    theirs.save_pretrained(str(tmp_path))
    expected = logits(theirs, inputs())
    model = load_adapter(make(), tmp_path)
    torch.testing.assert_close(logits(model, inputs()), expected, atol=1e-6, rtol=1e-5)
    for adapted in (model, theirs) if technique.merges else ():
        plain = finalize(adapted)
        assert [type(m) for m in plain.modules()] == [type(m) for m in make().modules()]
        assert set(plain.state_dict()) == set(make().state_dict())
        torch.testing.assert_close(logits(plain, inputs()), expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["loha", "ln_tuning", "randlora", "unilora", "vblora", "vera"])
def test_every_key_is_compared(name: str, tmp_path: Path) -> None:
    save_adapter(apply(mlp(), small(name)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    save_file(dict(list(state.items())[1:]), file)
    plain = mlp()
    with pytest.raises(EdgetuneError, match="does not fit this model: tensors are missing"):
        load_adapter(plain, tmp_path)
    save_file({**state, "base_model.model.blocks.0.up.surplus": torch.ones(1)}, file)
    with pytest.raises(EdgetuneError, match="does not belong to any layer"):
        load_adapter(plain, tmp_path)
    assert [type(m) for m in plain.modules()] == [type(m) for m in mlp().modules()]
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_pefts_own_model_is_saved_with_what_its_layers_share(tmp_path: Path) -> None:
    theirs = plain_peft(small("vblora"), mlp())
    fit(theirs, vectors(), steps=5)
    expected = logits(theirs, vectors())
    save_adapter(theirs, tmp_path)
    torch.testing.assert_close(logits(load_adapter(mlp(), tmp_path), vectors()), expected, atol=1e-6, rtol=0)
    assert vars(finalize(theirs)).keys() == vars(mlp()).keys()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_taken_out_of_the_weight_is_saved_as_a_plain_lora(init: str, tmp_path: Path) -> None:
    import peft

    model = apply(bert(), LoRA(rank=2, targets=ATTENTION, init=init))  # type: ignore[arg-type]
    torch.testing.assert_close(logits(model, tokens()), logits(bert(), tokens()), atol=1e-6, rtol=0)
    fit(model, tokens(), steps=10)
    config = json.loads((save_adapter(model, tmp_path) / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (4, True)
    expected = logits(model, tokens())
    assert (expected - logits(bert(), tokens())).abs().max() > 1e-4
    torch.testing.assert_close(logits(load_adapter(bert(), tmp_path), tokens()), expected, atol=2e-6, rtol=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        theirs = peft.PeftModel.from_pretrained(bert(), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs, tokens()), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("peft_name", "settings", "problem"),
    [
        ("ADALORA", {"total_step": 10}, "of no family that is a technique"),
        ("C3A", {"block_size": 16, "bias": "all"}, "more than C3A: got .*bias=all"),
    ],
)
def test_what_edgetune_cannot_train_on_is_not_loaded(
    peft_name: str, settings: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    import peft

    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_name](target_modules=["up"], **settings)
    peft.get_peft_model(mlp(), config).save_pretrained(str(tmp_path))
    with pytest.raises(EdgetuneError, match=problem):
        load_adapter(mlp(), tmp_path)


def test_a_config_becomes_the_technique_that_made_it() -> None:
    for name in PEFT_FAMILIES:
        technique, model = small(name), BASES.get(name, (mlp, vectors))[0]()
        chosen = technique.choose(model)
        config = technique.config(model, chosen, list(chosen))
        assert config.peft_type in peft_types()
        again = from_config(config, list(chosen))
        settings = set(technique.peft_fields)
        assert again.model_dump(include=settings) == technique.model_dump(include=settings)
