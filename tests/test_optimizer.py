"""The step inside backward, and optimizer state in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.adapt.lora import LoRA
from edgetune.core.apply import apply
from edgetune.core.errors import EdgetuneError
from edgetune.train import optimizer as optimizers
from edgetune.train.loop import TrainResult, train
from edgetune.train.settings import Train

torch.set_num_threads(1)


class Points:
    """Rows of 64 numbers in three classes."""

    lengths = None

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(3, (48,), generator=generator)
        self.values = torch.randn(48, 64, generator=generator) + self.labels[:, None]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Any) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(list(indices))
        return self.values[rows], self.labels[rows]


def net() -> nn.Sequential:
    """The first weight has 8,192 values: large enough for 8-bit state."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 3))
    model[2].weight.requires_grad_(False)
    return model


def adapted() -> nn.Module:
    """The same net with LoRA on two layers and its last layer trained whole."""
    return LoRA(rank=32, targets=("0", "2"), also_train=("4",)).apply(net().requires_grad_(True))


def trained(folder: Path | None = None, resume: bool = False, **settings: Any) -> tuple[nn.Module, TrainResult]:
    model = net()
    whole = Train(updates=settings.pop("updates", 6), batch_size=16, clip_norm=None, learning_rate=1e-2, **settings)
    return model, train(model, whole, Points(), functional.cross_entropy, seed=0, folder=folder, resume=resume)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("settings", [{}, {"optimizer": "sgd"}, {"state_bits": 8}])
def test_the_step_in_backward_ends_with_the_same_bits_and_one_gradient_at_a_time(settings: dict[str, Any]) -> None:
    (plain, whole), (model, stepped) = trained(**settings), trained(in_backward=True, **settings)
    assert same_bits(plain, model)
    assert not same_bits(plain, net())
    weights = [p.nbytes for p in model.parameters() if p.requires_grad]
    assert whole.gradients_mib * 2**20 == sum(weights)
    assert stepped.gradients_mib * 2**20 == max(weights)
    assert stepped.optimizer_state_mib == whole.optimizer_state_mib
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_gradient_that_is_not_finite_never_reaches_the_weight() -> None:
    model = net()
    optimizer = optimizers.build(Train(updates=1), [p for p in model.parameters() if p.requires_grad])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with optimizers.stepping_in_backward(optimizer), pytest.raises(EdgetuneError, match="not finite"):
        (model(torch.ones(2, 64)).sum() * float("nan")).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_8_bit_state_is_a_quarter_and_learns_as_well() -> None:
    (_, plain), (_, small) = trained(updates=30), trained(updates=30, state_bits=8)
    large, rest = 64 * 128, 128 + 16 + 16 * 3 + 3
    assert plain.optimizer_state_mib * 2**20 == 2 * 4 * (large + rest) + 5 * 4  # and a step count for each tensor
    codes, scales, tables = 2 * large, 2 * 4 * large // 256, 2 * 4 * 256
    assert small.optimizer_state_mib * 2**20 == codes + scales + tables + 2 * 4 * rest + 5 * 4
    assert small.losses[-1].loss < 0.5 * small.losses[0].loss
    assert abs(small.losses[-1].loss - plain.losses[-1].loss) < 0.1


def test_8_bit_state_is_resumed_with_the_same_bits(tmp_path: Path) -> None:
    def interrupted(done: int, *_: object) -> None:
        if done == 4:
            raise InterruptedError

    settings = Train(updates=9, batch_size=16, clip_norm=None, state_bits=8, in_backward=True, checkpoint_every=2)
    with pytest.raises(InterruptedError):
        train(net(), settings, Points(), functional.cross_entropy, seed=0, folder=tmp_path, progress=interrupted)
    model = net()
    result = train(model, settings, Points(), functional.cross_entropy, seed=0, folder=tmp_path, resume=True)
    assert result.resumed_from == 2
    whole = net()
    train(whole, settings, Points(), functional.cross_entropy, seed=0)
    assert same_bits(model, whole)


OPTIMIZERS = [{}, {"optimizer": "sgd"}, {"state_bits": 8}, {"in_backward": True}]


def change(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """How far each parameter moved that did."""
    old = dict(before.named_parameters())
    moved = {name: (value - old[name]).detach() for name, value in after.named_parameters()}
    return {name: by for name, by in moved.items() if by.any()}


@pytest.mark.parametrize("settings", OPTIMIZERS)
def test_b_matrices_learn_faster_by_the_ratio_and_nothing_else_does(settings: dict[str, Any]) -> None:
    moved = {}
    for ratio in (1, 8):
        model = adapted()
        rates = {"learning_rate": 1e-3, "learning_rate_ratio": ratio, "warmup_pct": 0.0, "weight_decay": 0.0}
        whole = Train(updates=1, batch_size=16, clip_norm=None, **rates, **settings)
        losses = train(model, whole, Points(), functional.cross_entropy, seed=0).losses
        assert losses[0].learning_rate == 1e-3
        moved[ratio] = change(adapted(), model)
    b = {name for name in moved[1] if ".lora_B." in name}
    assert len(b) == 2
    assert {"4.weight", "4.bias"} <= moved[1].keys() - b
    assert moved[1].keys() == moved[8].keys()
    for name, by in moved[1].items():
        torch.testing.assert_close(moved[8][name], (8 if name in b else 1) * by, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("settings", OPTIMIZERS)
def test_a_training_with_a_ratio_resumes_with_the_same_bits(tmp_path: Path, settings: dict[str, Any]) -> None:
    def interrupted(done: int, *_: object) -> None:
        if done == 4:
            raise InterruptedError

    whole = Train(
        updates=9, batch_size=16, clip_norm=None, learning_rate_ratio=16, checkpoint_every=2, **settings
    )  # fmt: skip
    with pytest.raises(InterruptedError):
        train(adapted(), whole, Points(), functional.cross_entropy, seed=0, folder=tmp_path, progress=interrupted)
    other = whole.model_copy(update={"learning_rate_ratio": 8.0})
    with pytest.raises(EdgetuneError, match=r"'learning_rate_ratio': 8\.0"):
        train(adapted(), other, Points(), functional.cross_entropy, seed=0, folder=tmp_path, resume=True)
    resumed, straight = adapted(), adapted()
    result = train(resumed, whole, Points(), functional.cross_entropy, seed=0, folder=tmp_path, resume=True)
    assert result.resumed_from == 2
    train(straight, whole, Points(), functional.cross_entropy, seed=0)
    assert same_bits(resumed, straight)
    plain = adapted()
    train(plain, whole.model_copy(update={"learning_rate_ratio": 1.0}), Points(), functional.cross_entropy, seed=0)
    assert not same_bits(plain, straight)


def test_b_matrices_of_convolutions_learn_faster_and_those_of_embeddings_do_not() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = nn.Conv2d(3, 4, 3), nn.Embedding(5, 4)

    model = LoRA(rank=2, targets=("conv", "table")).apply(Layers())
    faster = optimizers.faster_parameters(Train(learning_rate_ratio=4), model)
    names = {name for name, value in model.named_parameters() if any(value is p for p in faster)}
    assert names == {"conv.lora_B.default.weight"}


def test_a_ratio_without_a_b_matrix_raises() -> None:
    settings = Train(updates=1, learning_rate_ratio=16)
    for model in (net(), apply(net(), LoRA(rank=2, targets=("0",))).requires_grad_(False)):
        model[4].requires_grad_(True)
        with pytest.raises(EdgetuneError, match="no B matrix of a LoRA is trainable"):
            train(model, settings, Points(), functional.cross_entropy, seed=0)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"learning_rate_ratio": 0.5}, "learning_rate_ratio"),
        ({"in_backward": True}, "clip_norm: null"),
        ({"in_backward": True, "clip_norm": None, "accumulate": 2}, "accumulate: 1"),
        ({"optimizer": "sgd", "state_bits": 8}, "sgd has no"),
        ({"state_bits": 4}, "allowed: 32, 8"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(EdgetuneError, match=what):
        Train(**settings)
