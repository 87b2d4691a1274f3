"""The laws that hold for every technique, each crossed with the cases of laws.py."""

from __future__ import annotations

import copy
import pickle
from itertools import takewhile
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from edgetune.adapt.files import save_adapter
from edgetune.adapt.loading import load_adapter
from edgetune.core.apply import apply, finalize
from edgetune.core.carriers import is_wrapped, plain_layer, plain_tensors
from edgetune.core.errors import EdgetuneError
from edgetune.core.experts import is_fused
from edgetune.core.inputs import call, tensors_of
from edgetune.core.layers import unwrapped_name
from edgetune.core.peft_layers import is_peft
from edgetune.core.probe import outputs_of, probe_inputs, relative_difference
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.lean.saved import saved_bytes
from edgetune.quant.size import stored_bytes
from edgetune.train.resume import changing_tensors, restore_tensors
from support.adapter_cases import ADAPTER_CASES
from support.family_cases import FAMILY_CASES
from support.laws import CASES as OTHER_CASES
from support.laws import Case, fit, logits, loss_of

torch.set_num_threads(1)  # tiny models: more threads only wait for each other

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # FRoD's
CASES = [*OTHER_CASES, *ADAPTER_CASES, *FAMILY_CASES]


def named(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


EXACT = [case for case in CASES if case.exact]
LOSSY = [case for case in CASES if not case.exact]
TRAINED = [case for case in CASES if case.trains]


def base_name(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(".base.", ".")


@named(EXACT)
def test_apply_leaves_the_outputs(case: Case) -> None:
    outputs = logits(case.as_before(case.applied()), case.inputs())
    torch.testing.assert_close(outputs, logits(case.model(), case.inputs()), atol=case.tolerance, rtol=0)


@named(LOSSY)
def test_apply_stays_within_its_error(case: Case) -> None:
    plain, lossy = (logits(m, case.inputs()) for m in (case.model(), case.as_before(case.applied())))
    error = ((plain - lossy).norm() / plain.norm()).item()
    assert 0 < error <= case.error


@named([case for case in LOSSY if case.size])
def test_size_is_exact(case: Case) -> None:
    assert case.size is not None
    assert stored_bytes(case.applied()) == case.size(case.model()) < stored_bytes(case.model())


@named(TRAINED)
def test_a_wrapped_layer_computes_with_its_dense_weight_and_bias(case: Case) -> None:
    model = case.applied()
    fit(model, case.inputs())
    wrapped = {name: module for name, module in model.named_modules() if is_wrapped(module)}
    assert wrapped or not case.merges or not case.leaves & (Trait.ADAPTED | Trait.PACKED)
    inner = {name for name in wrapped if any(name.startswith(outer + ".") for outer in wrapped)}
    for name in wrapped.keys() - inner:
        layer = wrapped[name]
        plain, tensors = plain_layer(layer), plain_tensors(layer)
        inputs = probe_inputs(plain)
        assert inputs is not None
        with torch.no_grad():
            if isinstance(plain, nn.Conv2d):
                expected = plain._conv_forward(*inputs, tensors["weight"], tensors.get("bias"))
            elif isinstance(plain, nn.LayerNorm):
                expected = functional.layer_norm(*inputs, plain.normalized_shape, **tensors)
            elif is_fused(plain):
                expected = functional_call(plain, tensors, inputs)
            elif isinstance(plain, nn.Embedding):
                expected = functional.embedding(*inputs, **tensors)
            else:
                expected = functional.linear(*inputs, **tensors)
        allowed = 2e-2 if Trait.ROUNDED in case.leaves else max(1e-5, case.tolerance)  # of rounded activations
        assert relative_difference(expected, outputs_of(layer, inputs)) <= allowed, name


@named([case for case in CASES if case.same_keys])
def test_state_dict_keys(case: Case) -> None:
    plain, model = set(case.model().state_dict()), case.applied()
    assert not case.keeps_weights or set(model.state_dict()) >= plain
    assert set(finalize(model).state_dict()) == plain


@named([case for case in TRAINED if case.same_shapes])
def test_a_plain_checkpoint_loads_and_a_wrapped_one_comes_back(case: Case) -> None:
    plain, model = case.model(), case.applied()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.1)
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert not set(result.missing_keys) & set(plain.state_dict())
    state, other = model.state_dict(), case.applied()
    other.load_state_dict(state)
    torch.testing.assert_close(logits(other, case.inputs()), logits(model, case.inputs()), atol=0, rtol=0)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in state.items())


@named(TRAINED)
def test_finalize_keeps_what_was_trained(case: Case) -> None:
    inputs, model = case.inputs(), case.applied()
    before = logits(model, inputs)
    fit(model, inputs)
    trained = logits(model, inputs)
    assert (trained - before).abs().max() > 20 * case.tolerance  # else the next line proves nothing
    plain = finalize(model)
    torch.testing.assert_close(logits(plain, inputs), trained, atol=case.tolerance, rtol=1e-4)
    assert not any(is_wrapped(module) for module in plain.modules())
    if case.same_keys:
        assert [type(m) for m in plain.modules()] == [type(m) for m in case.model().modules()]


CUTS = {"edgetune_cuts", "edgetune_config_before_cuts", "edgetune_grouping"}  # what et.save_pretrained keeps of cuts


@named(TRAINED)
def test_finalize_puts_back_what_trains(case: Case) -> None:
    model = case.model()
    frozen = next(iter(dict(model.named_parameters())))
    model.get_parameter(frozen).requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model = finalize(apply(model, case.techniques, Sample.of(case.inputs())))
    after = {unwrapped_name(name): p.requires_grad for name, p in model.named_parameters()}
    kept = [name for name in before if name in after]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert frozen in kept
    assert not case.same_keys or after.keys() == before.keys()
    assert not case.merges or not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {name for name in vars(model) if name.startswith("edgetune")} <= CUTS


@named([case for case in TRAINED if case.exact and case.same_weights])
def test_gradients_only_where_declared_and_equal_to_autograds(case: Case) -> None:
    plain, model = case.model(), case.applied()
    loss_of(call(plain, case.inputs())).backward()
    loss_of(call(model, case.inputs())).backward()
    expected, compared = dict(plain.named_parameters()), 0
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None and base_name(name) in expected:
            torch.testing.assert_close(parameter.grad, expected[base_name(name)].grad, atol=1e-4, rtol=1e-3)
            compared += 1
        elif name.endswith(".slice"):
            layer = model.get_submodule(name.rpartition(".")[0])
            whole = expected[base_name(name.replace(".slice", ".weight"))].grad
            part = whole.index_select(layer.dim, layer.indices)
            torch.testing.assert_close(parameter.grad, part, atol=1e-4, rtol=1e-3)
            compared += 1
    assert compared or case.leaves & ~Trait.LEAN == Trait.ADAPTED
    freezes = case.leaves & (Trait.ADAPTED | Trait.FROZEN | Trait.PACKED)
    assert bool(freezes) == any(not parameter.requires_grad for parameter in model.parameters())


@named([case for case in CASES if case.keeps_less])
def test_fewer_bytes_are_kept_for_backward(case: Case) -> None:
    plain = saved_bytes(case.model(), case.inputs(), loss_of)
    kept = saved_bytes(case.applied(), case.inputs(), loss_of)
    assert 0 < kept < 0.85 * plain


@named(TRAINED)
def test_what_was_trained_comes_back_from_a_checkpoint(case: Case) -> None:
    model, other = case.applied(), case.applied()
    fit(model, case.inputs())
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    restore_tensors(other, {name: value.detach().clone() for name, value in changing_tensors(model).items()})
    torch.testing.assert_close(logits(other, case.inputs()), logits(model, case.inputs()), atol=0, rtol=0)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@named([case for case in CASES if Trait.ADAPTED in case.leaves])
def test_an_adapter_comes_back_from_its_folder(case: Case, tmp_path: Path) -> None:
    model = case.applied()
    if not any(is_peft(module) for module in model.modules()):
        pytest.skip("peft has no such layers: the law of checkpoints holds for it")
    fit(model, case.inputs())
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    bases = list(takewhile(lambda t: Trait.ADAPTED not in t.leaves, case.techniques))
    after = case.techniques[len(bases) + 1 :]
    other = load_adapter(apply(case.model(), bases, Sample.of(case.inputs())), tmp_path)
    other = apply(other, after, Sample.of(case.inputs()))
    if any(getattr(t, "rewrites", False) for t in case.techniques):  # its file is a plain LoRA of twice the rank
        torch.testing.assert_close(logits(other, case.inputs()), logits(model, case.inputs()), atol=2e-6, rtol=1e-5)
        return
    saved, loaded = model.state_dict(), other.state_dict()
    assert saved.keys() == loaded.keys()
    for key in saved:
        assert torch.equal(saved[key], loaded[key]), key
    if bases:
        return
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in other.named_parameters() if p.requires_grad} == trained


@named(TRAINED)
def test_an_open_model_copies_and_pickles(case: Case) -> None:
    model = case.applied()
    fit(model, case.inputs())
    kept = saved_bytes(model, case.inputs(), loss_of)
    for other in (copy.deepcopy(model), *([pickle.loads(pickle.dumps(model))] if case.pickles else [])):
        torch.testing.assert_close(logits(other, case.inputs()), logits(model, case.inputs()), atol=0, rtol=0)
        assert saved_bytes(other, case.inputs(), loss_of) == kept
        plain = finalize(other)
        assert not any(is_wrapped(m) or (m._forward_hooks and case.merges) for m in plain.modules())
    if case.merges and any(t.needs_finalize() for t in case.techniques):  # what opens stays open
        assert any(is_wrapped(m) or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "technique", [pytest.param(t, id=f"{case.name}-{t.name}") for case in CASES for t in case.techniques]
)
def test_settings_come_back_from_yaml_and_json(technique: Technique) -> None:
    settings = type(technique)
    assert settings(**yaml.safe_load(yaml.safe_dump(technique.model_dump(mode="json")))) == technique
    assert settings.model_validate_json(technique.model_dump_json()) == technique


@named([case for case in CASES if case.unmatched])
def test_a_target_that_matches_nothing_raises_and_changes_nothing(case: Case) -> None:
    assert case.unmatched is not None
    model = case.model()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(EdgetuneError, match="nothing"):
        apply(model, case.unmatched, Sample.of(case.inputs()))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not any(is_peft(m) or m._forward_hooks for m in model.modules())


@named([case for case in CASES if case.exports])
def test_the_finalized_model_exports_and_agrees(case: Case, tmp_path: Path) -> None:
    from edgetune.export import export

    model = case.applied()
    if case.trains:
        fit(model, case.inputs())
    artifact = export(finalize(model), case.inputs(), tmp_path / "model.pte", target="xnnpack", one_row=True)
    parity = artifact.manifest.main.parity
    assert parity.rows == len(tensors_of(case.inputs())[0])
    assert parity.same_prediction_pct == 100
    assert parity.max_abs_difference < 0.02
