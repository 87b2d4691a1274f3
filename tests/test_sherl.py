from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import edgetune as et
from edgetune.adapt.sherl import EarlyRoute
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import call
from edgetune.lean.saved import saved_bytes
from support.laws import bert, cnn, fit, llama, logits, loss_of, mlp, tokens, vectors

torch.set_num_threads(1)

HEAD = et.SparseUpdate(scheme={"*": "frozen", "classifier": "full"})


def sample() -> et.Sample:
    return et.Sample.of(tokens())


def test_consolidation_is_that_of_the_authors_code() -> None:
    torch.manual_seed(0)
    route = EarlyRoute(4, 8, 6)
    nn.init.normal_(route.norm.weight)
    nn.init.normal_(route.gate)
    states = [torch.randn(2, 5, 8) for _ in range(4)]
    small = [down(state) for down, state in zip(route.down, states, strict=True)]
    expected = torch.empty(2, 5, 8)
    for row in range(2):
        for token in range(5):
            early, guide = [z[row, token] for z in small[:3]], small[3][row, token]
            scores = []
            for z in early:
                redundancy = sum(max(0.0, float(functional.cosine_similarity(z, y, dim=0).detach())) for y in early)
                scores.append(torch.relu(route.agreement(z * guide)) / redundancy)
            total = sum(scores)
            mixed = sum(score / total.clamp(min=1e-8) * z for score, z in zip(scores, early, strict=True)) + guide
            gate = 1 + torch.tanh(route.gate / 0.1)
            expected[row, token] = gate * states[3][row, token] + route.norm(route.up(torch.relu(mixed)))
    torch.testing.assert_close(route(states), expected)


def test_no_gradient_enters_the_early_blocks_and_the_head_can_train() -> None:
    model = et.apply(bert(4), [HEAD, et.SHERL(width=4)], sample()).train()
    layers = model.get_submodule("bert.encoder.layer")
    states: list[bool] = []
    passed: list[int] = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda _, args, output: states.append(output.requires_grad))
        layer.register_full_backward_hook(lambda *_, number=number: passed.append(number))
    loss_of(call(model, tokens())).backward()
    assert states == [False, False, False, True]
    assert passed == [3]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if ".sherl." not in name} == {"classifier.weight", "classifier.bias"}
    assert all(model.get_parameter(name).grad is not None for name in trained)


@pytest.mark.parametrize("late", [1, 2])
def test_two_late_blocks_are_two_blocks_of_backward(late: int) -> None:
    model = et.apply(bert(4), et.SHERL(width=4, late=late), sample())
    assert any(name.startswith(f"bert.encoder.layer.{4 - late}.sherl") for name, _ in model.named_parameters())
    assert len(model.get_submodule(f"bert.encoder.layer.{4 - late}.sherl.down")) == 5 - late


def test_it_saves_a_quarter_of_what_lora_saves_on_12_blocks() -> None:
    lora = et.apply(bert(12), et.LoRA(rank=4, targets=["*.query", "*.value"]))
    ours = et.apply(bert(12), et.SHERL(width=4), sample())  # of 32: real models are wider
    assert 0 < 4 * saved_bytes(ours, tokens(), loss_of) < saved_bytes(lora, tokens(), loss_of)


def test_it_learns_and_is_exported_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = et.apply(bert(3), et.SHERL(width=8), sample())
    before = loss_of(call(model.eval(), tokens())).item()
    fit(model, tokens(), steps=20)
    assert loss_of(call(model, tokens())).item() < 0.9 * before
    trained = logits(model, tokens())
    model = et.finalize(model)
    assert torch.equal(logits(model, tokens()), trained)
    artifact = et.export(model, tokens(), tmp_path / "m.pte", target="xnnpack")
    assert artifact.manifest.main.parity.max_abs_difference < 1e-5
    rounded = et.apply(model, et.Int8Dynamic(), sample())
    assert 0 < (logits(rounded, tokens()) - trained).norm() < 0.1 * trained.norm()


def test_a_decoder_over_a_4_bit_base() -> None:
    model = et.apply(llama(), [et.NF4(block_size=32), et.SHERL(width=4)], sample())
    fit(model, tokens())
    trained = logits(model, tokens())
    torch.testing.assert_close(logits(et.finalize(model), tokens()), trained, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused_before_anything_changes() -> None:
    early = et.SparseUpdate(scheme={"*": "frozen", "bert.encoder.layer.0": "full"})
    for model, techniques, inputs, message in (
        (bert(1), et.SHERL(), tokens(), "1 late and at least one early block are needed"),
        (bert(4), [early, et.SHERL()], tokens(), "no gradient reaches these blocks"),
        (
            nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.ReLU())),
            et.SHERL(blocks=["0", "1"]),
            vectors(),
            "runs all",
        ),
        (mlp(), et.SHERL(blocks=["stem", "*.up"]), vectors(), "states of different widths"),
    ):
        with pytest.raises(EdgetuneError, match=message):
            et.apply(model, techniques, et.Sample.of(inputs))
        assert not any("sherl" in name for name, _ in model.named_parameters())
    with pytest.raises(EdgetuneError, match="sherl needs example inputs"):
        et.apply(bert(4), et.SHERL())
    with pytest.raises(EdgetuneError, match="an adapter is for modules over"):
        et.apply(cnn(), et.SHERL(), et.Sample.of(torch.randn(1, 3, 16, 16)))
