"""Distillation: the losses of logits and hidden states, and students that learn from deeper teachers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.lean.stages import blocks_of
from edgetune.train.distill import Distillation, HiddenStates, hidden_loss, soft_loss
from edgetune.train.loop import train
from edgetune.train.settings import Distill, Train
from support.law_models import Mlp
from support.laws import bert, logits, tokens, vectors
from support.trainable import Net, Words, net, settings


def test_soft_loss_is_the_divergence_times_the_squared_temperature() -> None:
    torch.manual_seed(0)
    logits, target, labels = torch.randn(5, 3), torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
    p, q = (target / 3).softmax(1), (logits / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(soft_loss(logits, target, labels, 3.0), expected)
    assert soft_loss(target, target, labels, 2.0) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(EdgetuneError, match="teacher"):
        soft_loss(logits, torch.randn(5, 4), labels, 2.0)


def test_distillation_pulls_towards_the_teacher_and_leaves_it_alone() -> None:
    torch.manual_seed(9)
    teacher = Net().train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    words = Words()

    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            return float(soft_loss(model(words.tokens), teacher(words.tokens), words.labels, 1.0))

    values = settings(updates=60, distill=Distill(teacher="prune", weight=1.0))
    student, plain = net(dropout=0.0), net(dropout=0.0)
    train(student, values, words, functional.cross_entropy, seed=0, teacher=teacher)
    assert not teacher.training
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    train(plain, settings(updates=60), words, functional.cross_entropy, seed=0)
    assert distance(student) < distance(plain) / 2


def test_hidden_states_differ_relative_to_the_teachers_size_and_without_padding() -> None:
    torch.manual_seed(0)
    states, taught = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    kept, target = states[mask], taught[mask]
    expected = (kept - target).square().mean() / target.square().mean()
    torch.testing.assert_close(hidden_loss([states], [taught], mask), expected)
    torch.testing.assert_close(hidden_loss([1e3 * states], [1e3 * taught], mask), expected)
    assert hidden_loss([taught], [taught.clone()], None) == 0


@pytest.mark.parametrize(
    ("student", "teacher", "places"), [(3, 6, [1, 3, 5]), (2, 6, [2, 5]), (4, 6, [1, 2, 4, 5]), (1, 3, [2])]
)
def test_a_block_learns_from_the_teachers_after_as_large_a_share(student: int, teacher: int, places: list[int]) -> None:
    taught = [torch.full((1, 2), 2.0**place) for place in range(teacher)]
    states = [taught[place].clone() for place in places]
    assert hidden_loss(states, taught, None) == 0
    assert student == len(states)


def test_the_states_are_the_outputs_of_the_blocks_at_the_latest_call() -> None:
    model = Mlp().eval()
    watched = HiddenStates(model, blocks_of(model))
    watched.watch()
    with torch.no_grad():
        model(vectors() + 1)
        model(vectors())
        after = [model.stem(vectors())]  # type: ignore[operator]
        for block in model.blocks:
            after.append(block(after[-1]))
    assert [torch.equal(one, other) for one, other in zip(watched.states[-3:], after[1:], strict=True)] == [True] * 3
    watched.close()
    assert watched.states == []
    assert not any(module._forward_hooks for module in model.modules())


class Rows:
    """Token ids of a tiny BERT, with labels."""

    lengths = None

    def __len__(self) -> int:
        return 4

    def batch(self, indices: Any) -> tuple[dict[str, Tensor], Tensor]:
        inputs: Any = tokens()
        return {name: value[list(indices)] for name, value in inputs.items()}, torch.tensor([0, 1, 2, 0])[list(indices)]


def student_of(teacher: nn.Module, **distill: float) -> nn.Module:
    student = et.apply(copy.deepcopy(teacher), et.Depth(blocks=2), et.Sample.of(tokens()))
    values = settings(updates=40, batch_size=4, distill=Distill(teacher="depth", weight=1.0, **distill))
    train(student, values, Rows(), functional.cross_entropy, seed=0, teacher=teacher)
    return student


def states_of(model: nn.Module) -> list[Tensor]:
    watched = HiddenStates(model, blocks_of(model))
    watched.watch()
    logits(model, tokens())
    states = list(watched.states)
    watched.close()
    return states


def test_a_student_of_fewer_blocks_takes_on_the_teachers_hidden_states() -> None:
    teacher = bert(4).requires_grad_(True)
    with torch.no_grad():  # as after some training: each block changes its input
        for name, parameter in teacher.named_parameters():
            parameter.mul_(8 if ".layer." in name and parameter.dim() == 2 else 1)
    taught = states_of(teacher)
    plain, hidden = student_of(teacher), student_of(teacher, hidden=10.0)
    before = et.apply(copy.deepcopy(teacher), et.Depth(blocks=2), et.Sample.of(tokens()))
    distances = [float(hidden_loss(states_of(model), taught, None)) for model in (before, plain, hidden)]
    assert distances[2] < 0.7 * min(distances[:2])
    assert all(torch.equal(one, other) for one, other in zip(states_of(teacher), taught, strict=True))
    assert not any(module._forward_hooks for module in (*hidden.modules(), *teacher.modules()))


def test_what_has_no_hidden_states_in_common_is_refused() -> None:
    teacher, distill = net(dropout=0.0), Distill(teacher="lora", hidden=1.0)
    with pytest.raises(EdgetuneError, match=r"distill\.hidden: Net has no repeated blocks"):
        Distillation(net(dropout=0.0), teacher, distill)
    with pytest.raises(EdgetuneError, match="block 1 gives hidden states of another shape"):
        hidden_loss([torch.zeros(2, 3)], [torch.zeros(2, 4)], None)
    with pytest.raises(EdgetuneError, match=r"distill\.hidden needs the hidden states of every block"):
        Train(distill=distill, cache_prefix=True)
