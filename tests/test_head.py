"""The loss of a language model that keeps no logits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.core.apply import apply, finalize
from edgetune.core.inputs import call, logits_of
from edgetune.lean import head
from edgetune.lean.saved import saved_bytes
from edgetune.lean.technique import Lean
from edgetune.sparse.update import SparseUpdate
from edgetune.tasks.causal_lm import CausalLM
from support.laws import llama, tokens

torch.set_num_threads(1)


def labels() -> Tensor:
    found = tokens()["input_ids"].clone()
    found[1, 4:] = -100
    return found


def loss_of(output: object) -> Tensor:
    return CausalLM().loss(logits_of(output), functional.pad(labels()[:, 1:], (0, 1), value=-100))


def last_block(hook: bool) -> nn.Module:
    model = apply(llama(tied=True), SparseUpdate(scheme="last-1", head="frozen")).train()
    if not hook:
        head.take_off(model)
    return model


def gradients(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    loss = loss_of(call(model, tokens()))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 100, 2**23])
def test_value_and_gradients_equal_pytorchs(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_CHUNK_VALUES", chunk)
    (expected, plain), (found, mine) = gradients(last_block(False)), gradients(last_block(True))
    assert found == pytest.approx(expected, rel=1e-6)
    assert plain.keys() == mine.keys()
    for name, value in plain.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-8)


def test_it_is_the_mean_over_the_next_tokens_that_count() -> None:
    logits = logits_of(call(llama(), tokens()))
    rows = [(logits[i, t], labels()[i, t + 1]) for i in range(4) for t in range(9) if labels()[i, t + 1] >= 0]
    expected = functional.cross_entropy(torch.stack([r for r, _ in rows]), torch.stack([wanted for _, wanted in rows]))
    torch.testing.assert_close(loss_of(logits), expected)


def test_no_logits_are_kept() -> None:
    with_logits, without = (saved_bytes(last_block(hook), tokens(), loss_of) for hook in (False, True))
    logits, hidden, column = 4 * 10 * 48 * 4, 4 * 10 * 32 * 4, 4 * 10 * 8
    assert with_logits - without == logits + column + 4 - hidden  # log-softmax, labels and their weight


def test_a_loss_computed_inside_the_model_keeps_none_either() -> None:
    inside = {**tokens(), "labels": labels()}
    model, plain = last_block(True), last_block(False)
    kept = [saved_bytes(each, inside, lambda output: output.loss) for each in (plain, model)]
    assert kept[0] > kept[1]
    for each in (model, plain):
        call(each, inside).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("chunk", [100, 2**23])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_trains_keeps_no_logits_either(chunk: int, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_CHUNK_VALUES", chunk)
    plain, model = llama(tied).train(), apply(llama(tied), Lean()).train()
    head.take_off(other := apply(llama(tied), Lean()))
    assert saved_bytes(other, tokens(), loss_of) - saved_bytes(model, tokens(), loss_of) > 0.8 * (4 * 10 * 48) * 4
    (expected, wanted), (value, mine) = gradients(plain), gradients(model)
    assert value == pytest.approx(expected, rel=1e-6)
    assert wanted.keys() == mine.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6)


def test_logits_changed_after_the_head_or_in_another_order_go_to_pytorch() -> None:
    for tied in (True, False):
        model, plain = apply(llama(tied), Lean()), llama(tied)
        for change in (lambda y: y.mul_(0.5), lambda y: y.transpose(0, 1)):
            losses = []
            for each in (model, plain):
                each.zero_grad()
                logits = change(logits_of(call(each, tokens())))
                rows = labels() if logits.shape[0] == 4 else labels().t()
                losses.append(head.cross_entropy(logits, rows.contiguous()))
                losses[-1].backward()
            torch.testing.assert_close(*losses)
            weight = "model.layers.0.mlp.up_proj.weight"
            torch.testing.assert_close(
                model.get_parameter(weight).grad, plain.get_parameter(weight).grad, rtol=1e-4, atol=1e-6
            )


def test_two_losses_of_the_same_logits_add_up() -> None:
    model, plain = last_block(True), last_block(False)
    for each in (model, plain):
        logits = logits_of(call(each, tokens()))
        (loss_of(logits) + 0.1 * logits.square().mean()).backward()
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(model.get_parameter(name).grad, plain.get_parameter(name).grad)


def test_a_part_of_the_logits_goes_to_pytorch() -> None:
    logits = logits_of(call(last_block(True), tokens()))
    part = head.cross_entropy(logits[:, :3], labels()[:, :3])
    torch.testing.assert_close(part, functional.cross_entropy(logits[:, :3].flatten(0, 1), labels()[:, :3].flatten()))
    part.backward()


def test_it_goes_with_the_model_and_comes_off() -> None:
    model = last_block(True)
    kept = saved_bytes(model, tokens(), loss_of)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert saved_bytes(other, tokens(), loss_of) == kept
    assert not finalize(model).lm_head._forward_hooks


def test_no_label_at_all_gives_nan_as_in_pytorch() -> None:
    logits = logits_of(call(last_block(True), tokens()))
    assert torch.isnan(head.cross_entropy(logits, torch.full((4, 10), -100)))
