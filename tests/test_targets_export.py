"""Targets: what each takes and needs, what it says when something is missing, and real lowerings to each."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from torch import nn

from edgetune.capture.graph import capture
from edgetune.capture.positional import Positional
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.quiet import silence_libraries
from edgetune.core.technique import Sample
from edgetune.export.lower import Lowered, lower
from edgetune.export.targets import TARGETS, Target, find, for_device, lowerable_targets
from edgetune.export.targets.forms import form_of
from edgetune.profile import device
from edgetune.quant.int4 import Int4
from edgetune.quant.int8 import Int8
from edgetune.quant.quantizers import OWN
from support.target_models import IDS, IMAGE, Cnn, Transformer, needs

MODELS = {"cnn": (Cnn, IMAGE), "transformer": (Transformer, IDS)}


def lowered(model: str, target: Target) -> Lowered:
    kind, x = MODELS[model]
    return lower(Positional(kind().eval(), x).eval(), (x,), target)


def quantized(model: str, target: Target) -> nn.Module:
    """The model in static int8 by the target's own quantizer, calibrated on the example."""
    kind, x = MODELS[model]
    assert target.name in OWN
    with silence_libraries():
        return Int8(target=target.name).apply(kind().eval(), Sample.of(x))


def macs_delegated_pct(found: Lowered) -> float:
    whole = sum(operator.macs for operator in found.operators)
    return 100 * sum(operator.macs for operator in found.operators if operator.delegated) / whole


def test_every_target_that_a_descriptor_names_is_here() -> None:
    for name in device.device_ids():
        known = device.load(name)
        for target in known.targets:
            assert for_device(name, target).name == target, (name, target)
        assert for_device(name, None).name == known.targets[0]
        assert for_device(name, "portable").name == "portable"


def test_targets_are_values() -> None:
    for name, target in TARGETS.items():
        assert target.name == name
        assert target.takes
        assert target.install
        assert target.serves
        with pytest.raises(dataclasses.FrozenInstanceError):
            target.chip = "other"  # type: ignore[misc]


def test_what_is_missing_is_told_before_any_work() -> None:
    for target in TARGETS.values():
        lacking = target.lacks()
        assert (target.name in lowerable_targets()) == (lacking == "")
        if lacking:
            with pytest.raises(EdgetuneError, match=f"target {target.name} cannot be lowered") as caught:
                target.partitioners()
            assert caught.value.exit_code == Exit.EXPORT
            assert caught.value.action == target.install
            assert not target.runs_here


def test_qualcomm_is_not_imported_where_its_sdk_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)  # the import would fetch the SDK
    with pytest.raises(EdgetuneError, match=r"QNN_SDK_ROOT|x86 Linux"):
        find("qnn").partitioners()
    monkeypatch.setenv("QNN_SDK_ROOT", "/nowhere")
    with pytest.raises(EdgetuneError, match=r"libQnnHtp|x86 Linux"):
        find("qnn").partitioners()
    assert "executorch.backends.qualcomm" not in sys.modules


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_says_that_it_needs_a_gpu() -> None:
    with pytest.raises(EdgetuneError, match="Nvidia GPU") as caught:
        find("cuda").partitioners()
    assert "triton" in caught.value.action


def test_the_program_is_for_the_chip_of_the_device() -> None:
    assert for_device("galaxy-s22", "qnn").chip == "SM8450"
    assert for_device("galaxy-s24", "qnn").chip == "SM8650"
    with pytest.raises(EdgetuneError, match="does not know this chip"):
        find("qnn").for_soc("Exynos 2400")
    assert find("xnnpack").for_soc("anything") is find("xnnpack")


def test_what_runs_on_this_machine() -> None:
    assert find("xnnpack").runs_here
    assert find("portable").runs_here
    if sys.platform == "linux":
        assert not find("coreml").runs_here
        assert not find("vulkan").runs_here


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("fp32", lambda model: model),
        ("fp16", lambda model: model.half()),
        ("bf16", lambda model: model.bfloat16()),
        ("8da4w", lambda model: Int4().apply(model)),
        ("int8", lambda model: Int8().apply(model, Sample.of(IDS))),
    ],
)
def test_the_form_of_a_model_is_seen_in_its_graph(form: str, change: object) -> None:
    assert callable(change)
    with silence_libraries(), torch.no_grad():
        model = change(Transformer().eval()).eval()
        assert form_of(capture(Positional(model, IDS).eval(), (IDS,))) == form


def test_a_form_that_the_backend_does_not_take_is_refused() -> None:
    with silence_libraries(), torch.no_grad():
        float32 = capture(Positional(Cnn().eval(), IMAGE).eval(), (IMAGE,))
        whole = capture(Positional(Int8().apply(Cnn().eval(), Sample.of(IMAGE)), IMAGE).eval(), (IMAGE,))
    with pytest.raises(EdgetuneError, match=r"ethos-u does not take a model in fp32[\s\S]*as its `target`") as caught:
        find("ethos-u").check(float32)
    assert caught.value.exit_code == Exit.EXPORT
    with pytest.raises(EdgetuneError, match="openvino does not take a model in static int8"):
        find("openvino").check(whole)
    find("tosa").check(float32)
    find("vulkan").check(whole)


def test_a_refusal_comes_from_the_lowering_too() -> None:
    model = Int4().apply(Transformer().eval())
    with pytest.raises(EdgetuneError, match="coreml does not take"):
        lower(Positional(model, IDS).eval(), (IDS,), find("coreml"))


@pytest.mark.parametrize("name", ["xnnpack", "vulkan", "coreml", "openvino"])
@pytest.mark.parametrize("model", ["cnn", pytest.param("transformer", marks=pytest.mark.slow)])
def test_a_float_model_is_delegated(name: str, model: str) -> None:
    found = lowered(model, needs(name))
    assert found.delegates > 0
    assert macs_delegated_pct(found) > 95
    assert len(found.data) > 1000


@pytest.mark.parametrize("model", ["cnn", "transformer"])
def test_portable_delegates_nothing(model: str) -> None:
    found = lowered(model, find("portable"))
    assert found.delegates == 0
    assert macs_delegated_pct(found) == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cnn", "transformer"])
def test_tosa_takes_floats(model: str) -> None:
    assert macs_delegated_pct(lowered(model, needs("tosa"))) > 95


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ethos-u", "tosa"])
@pytest.mark.parametrize("model", ["cnn", "transformer"])
def test_arm_takes_int8_from_its_own_quantizer(name: str, model: str) -> None:
    target = needs(name)
    x = MODELS[model][1]
    integers = quantized(model, target)
    found = lower(Positional(integers, x).eval(), (x,), target)
    assert found.delegates > 0
    assert macs_delegated_pct(found) > 95
    one, three = integers(x), integers(torch.cat([x, x, x]))
    assert torch.equal(three, torch.cat([one, one, one]))


@pytest.mark.parametrize("name", list(OWN))
def test_int8_says_what_a_target_of_its_own_quantizer_lacks_or_takes(name: str) -> None:
    with pytest.raises(EdgetuneError, match="takes no skip"):
        Int8(target=name, skip=("head",)).apply(Cnn().eval(), Sample.of(IMAGE))
    if not find(name).lacks():
        pytest.skip(f"{name} is here")
    with pytest.raises(EdgetuneError, match=f"int8 cannot quantize for target {name}") as caught:
        Int8(target=name).apply(Cnn().eval(), Sample.of(IMAGE))
    assert caught.value.exit_code == Exit.EXPORT
    assert caught.value.action == find(name).install


def test_int8_for_a_target_that_is_none_names_those_that_are() -> None:
    with pytest.raises(EdgetuneError, match="unknown target") as caught:
        Int8(target="toaster").apply(Cnn().eval(), Sample.of(IMAGE))
    assert list(caught.value.allowed or ()) == list(TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vulkan", "coreml"])
def test_xnnpacks_int8_is_delegated_elsewhere_too(name: str) -> None:
    with silence_libraries():
        model = Int8().apply(Cnn().eval(), Sample.of(IMAGE))
    found = lower(Positional(model, IMAGE).eval(), (IMAGE,), needs(name))
    assert macs_delegated_pct(found) > 95
