from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_table import BOUND, FAMILIES, KINDS, Linears, measure
from safetensors import safe_open
from torch import Tensor, nn

import edgetune as et
from edgetune.core.apply import active_techniques
from edgetune.core.carriers import is_wrapped
from edgetune.core.errors import EdgetuneError
from edgetune.core.packed_layers import is_nf4
from edgetune.core.peft_layers import is_peft
from support.laws import bert, fit, llama, logits, tokens

MERGED = set(FAMILIES) - {"LILY", "POLY"}  # the other two depend on their input, or on a task


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_family_of_peft_is_merged_into_linears_or_refused(family: str) -> None:
    cell = measure(family, "nn.Linear")
    if family in MERGED:
        assert cell.difference is not None, cell
        assert cell.difference <= BOUND
    else:
        assert "cannot be merged" in cell.refused


OTHERS = {
    "Conv1D": ("LORA", "ADALORA", "HIRA", "IA3", "RANDLORA"),
    "nn.Conv2d 3x3": (
        "LORA",
        "LORA use_dora",
        "LORA lora_bias",
        "ADALORA",
        "BOFT",
        "HIRA",
        "HRA",
        "LOHA",
        "LOKR",
        "IA3",
    ),
    "nn.Conv2d depthwise": ("LOHA", "LOKR", "IA3"),
    "nn.Embedding": ("LORA", "HIRA", "OFT"),
    "nn.Conv3d": ("LORA", "HIRA", "IA3"),
}


@pytest.mark.parametrize(
    ("kind", "family"), [(kind, family) for kind, families in OTHERS.items() for family in families]
)
def test_families_merge_into_other_layers(kind: str, family: str) -> None:
    difference = measure(family, kind).difference
    assert difference is not None
    assert difference <= BOUND


@pytest.mark.parametrize(
    ("family", "kind"),
    [("OFT", "nn.Conv2d 3x3"), ("LOKR", "dilated, by reflection"), ("HIRA", "dilated, by reflection")],
)
def test_what_peft_itself_merges_wrongly_is_refused(family: str, kind: str) -> None:
    assert "cannot be merged: no plain Conv2d" in measure(family, kind).refused


def test_no_family_is_wrong_on_any_kind_of_layer() -> None:
    cells = {(family, kind): str(measure(family, kind)) for family in FAMILIES for kind in KINDS}
    assert not {key: cell for key, cell in cells.items() if "WRONG" in cell}


def peft_model(model: nn.Module, **settings: Any) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))


def test_a_peft_model_is_taken_off_with_its_trained_layers_and_tokens() -> None:
    model = peft_model(
        bert(), target_modules=["query"], modules_to_save=["classifier"],
        trainable_token_indices={"word_embeddings": [3, 5]},
    )  # fmt: skip
    fit(model, tokens())
    expected = logits(model, tokens())
    plain = et.finalize(model)
    assert type(plain) is type(bert())
    assert plain.state_dict().keys() == bert().state_dict().keys()
    assert not hasattr(plain, "peft_config")
    torch.testing.assert_close(logits(plain, tokens()), expected, atol=1e-6, rtol=1e-5)
    assert (expected - logits(bert(), tokens())).abs().max() > 1e-3


def test_fused_experts_are_merged() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32,
        vocab_size=48, num_local_experts=2, use_cache=False,
    )  # fmt: skip
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = peft_model(MixtralForCausalLM(config).eval(), target_modules=[], target_parameters=names)
    fit(model, tokens())
    expected = logits(model, tokens())
    plain = et.finalize(model)
    assert not any(is_peft(module) for module in plain.modules())
    torch.testing.assert_close(logits(plain, tokens()), expected, atol=1e-5, rtol=1e-5)


def test_prompts_are_refused_by_name() -> None:
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(), config)
    with pytest.raises(EdgetuneError, match=r"changes no layer.*PROMPT_TUNING"):
        et.finalize(model)


def test_an_adapter_of_a_computed_weight_is_refused() -> None:
    import peft
    from torch.nn.utils.parametrizations import weight_norm

    net = Linears().eval()
    weight_norm(net.one)
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["one"]), net)
    with torch.no_grad():
        model.one.lora_B["default"].weight.fill_(0.1)
    x = torch.randn(3, 32)
    expected = model(x).detach()
    with pytest.raises(EdgetuneError, match=r"one: the weight of this .*Linear is computed at each call"):
        et.finalize(model)
    torch.testing.assert_close(model(x), expected, atol=0, rtol=0)


def test_export_refuses_an_adapter_that_nobody_merged(tmp_path: Path) -> None:
    import peft

    net = peft.inject_adapter_in_model(peft.IA3Config(target_modules=["one"], feedforward_modules=[]), Linears().eval())
    with pytest.raises(EdgetuneError, match="adapters or slices: one"):
        et.export(net, torch.randn(1, 32), tmp_path / "m.pte")


class Around(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class Beside(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.head = net, nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


def tuned() -> nn.Module:
    torch.manual_seed(0)
    model = et.apply(
        Linears().eval(), [et.SparseUpdate(scheme={"two": 0.25, "norm": "full"}), et.LoRA(rank=2, targets=["one"])]
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


WRAPPERS = {
    "own": Around,
    "own, beside a head": Beside,
    "twice": lambda model: Beside(Around(model)),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_finalize_reaches_what_is_open_inside(wrapper: str) -> None:
    outer, x = WRAPPERS[wrapper](tuned()), torch.randn(3, 32)
    with torch.no_grad():
        expected = outer(x)
        plain = et.finalize(outer)
        torch.testing.assert_close(plain(x), expected, atol=1e-6, rtol=1e-5)
    assert not any(
        is_wrapped(module) or active_techniques(module) or module._forward_hooks for module in plain.modules()
    )


@pytest.mark.parametrize("wrapper", ["own", "compiled", "DataParallel"])
def test_an_adapter_is_saved_under_the_models_own_names(wrapper: str, tmp_path: Path) -> None:
    model = WRAPPERS[wrapper](Linears().eval())
    targets = ["*one"]
    model = et.apply(model, et.LoRA(rank=2, targets=targets, also_train=["*norm"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    et.save_adapter(model, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert {key.split(".")[2] for key in file.keys()} == {"one", "norm"}  # noqa: SIM118
    plain = Linears().eval()
    plain.load_state_dict(
        {
            k.replace("module.", "").replace("_orig_mod.", "").replace("base_layer.", ""): v
            for k, v in model.state_dict().items()
            if "lora" not in k and "norm" not in k
        },
        strict=False,
    )
    x = torch.randn(3, 32)
    torch.testing.assert_close(et.load_adapter(plain, tmp_path)(x), model(x), atol=1e-6, rtol=1e-5)


def test_a_layer_compiled_by_itself_is_saved_under_its_own_name(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    net[1] = torch.compile(net[1], backend="eager")
    et.save_adapter(et.apply(net, et.LoRA(rank=2, targets=["1.*0"])), tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert all(key.startswith("base_model.model.1.0.lora_") for key in file.keys())  # noqa: SIM118
    et.load_adapter(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_a_16_bit_model_train_in_float32_and_merge_to_its_type(dtype: torch.dtype) -> None:
    model = et.apply(llama().to(dtype), et.LoRA(rank=2, alpha=32, targets=["*.up_proj", "*.v_proj"]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    fit(model, tokens(), steps=10)
    expected = logits(model, tokens())
    plain = et.finalize(model)
    assert {p.dtype for p in plain.parameters()} == {dtype}
    trained = (logits(llama().to(dtype), tokens()) - expected).abs().max()
    assert (logits(plain, tokens()) - expected).abs().max() < trained / 20


def test_a_group_convolution_is_refused_before_training_and_untouched() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(EdgetuneError, match="0 is a convolution in 2 groups"):
        et.apply(net, et.LoRA(rank=4, targets=["*"]))
    assert net.state_dict().keys() == before.keys()


def test_a_4_bit_model_of_others_is_unpacked() -> None:
    model = et.apply(llama().bfloat16(), et.NF4(block_size=32))
    del model.edgetune_techniques  # as a checkpoint that bitsandbytes packed
    assert any(is_nf4(module) for module in model.modules())
    assert not any(is_nf4(module) for module in et.finalize(model).modules())


def test_what_is_no_technique_is_named() -> None:
    with pytest.raises(EdgetuneError, match="not a technique"):
        et.apply(Linears(), [{"lora": 8}])  # type: ignore[list-item]
