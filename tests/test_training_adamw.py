"""Training programs with AdamW, and with adapters that come back as peft's folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import edgetune as et
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.export.training.optimizer import choose_optimizer, eager_like
from edgetune.export.training.step import Check
from edgetune.program.artifact import Artifact
from edgetune.runtime.training import TrainingProgram, train_pte
from support.training_measures import loss_difference

RATE = 0.01


class Net(nn.Module):
    """A frozen stem, a normalization and two linears that train."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.up, self.head = nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.up(self.norm(self.stem(x)))))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    model.stem.requires_grad_(False)
    return model.eval()


def rows(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    labels = torch.arange(8) % 3
    return [(torch.randn(8, 6) + labels[:, None], labels) for _ in range(count)]


BATCHES = rows()


@pytest.fixture(scope="module")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("adamw") / "train.pte"
    return et.export_training(
        net(), *BATCHES[0], path, optimizer="adamw", weight_decay=0.1, check_batches=BATCHES,
        check=Check(steps=50, learning_rate=RATE),
    )  # fmt: skip


def test_fifty_steps_are_those_of_torch(adamw: Artifact) -> None:
    assert adamw.training.parity.steps == 50
    assert adamw.training.parity.max_abs_loss_difference < 1e-4
    losses = adamw.training.parity.losses
    assert losses[-1] < 0.5 * losses[0], "it must have learned, or equal losses mean little"
    assert loss_difference(adamw, net(), BATCHES, F.cross_entropy, 50, 10 * RATE) < 1e-3


def test_every_parameter_and_moment_is_torchs(adamw: Artifact) -> None:
    program, model = TrainingProgram(adamw.path), net()
    optimizer = eager_like(adamw.training.optimizer, model, RATE)
    for inputs, labels in BATCHES * 3:
        program.step(inputs, labels, RATE)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    state = program.state()
    assert state["optimizer_step"] == 12
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(state) == 3 * len(trained) + 1
    for name, parameter in trained.items():
        torch.testing.assert_close(state[name], parameter.data, rtol=1e-4, atol=1e-6)
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                state[f"{name}_{moment}"], optimizer.state[parameter][moment], rtol=1e-3, atol=1e-7
            )


def test_decay_spares_biases_and_norms(adamw: Artifact) -> None:
    groups = eager_like(adamw.training.optimizer, net(), RATE).param_groups
    assert [(group["weight_decay"], {p.dim() for p in group["params"]}) for group in groups] == [(0.1, {2}), (0.0, {1})]


def test_a_checkpoint_goes_on_with_its_moments(adamw: Artifact, tmp_path: Path) -> None:
    whole = train_pte(adamw.path, BATCHES, RATE)
    kept = tmp_path / "state.safetensors"
    first = train_pte(adamw.path, BATCHES[:2], RATE, checkpoint=kept)
    assert load_file(kept)["optimizer_step"] == 2
    assert first + train_pte(adamw.path, BATCHES[2:], RATE, resume=kept) == whole
    pulled = et.pull(kept, net())
    program = TrainingProgram(adamw.path)
    program.restore(kept)
    assert torch.allclose(pulled(BATCHES[0][0][:1]), program.forward(BATCHES[0][0][:1]), atol=1e-5)


def test_the_state_is_three_times_what_trains(adamw: Artifact) -> None:
    values = sum(p.numel() for p in net().parameters() if p.requires_grad)
    tensors = 3 * sum(p.requires_grad for p in net().parameters()) + 1
    assert 12 * values < adamw.training.state_bytes < 12 * values + 64 * tensors


def with_lora() -> nn.Module:
    torch.manual_seed(2)
    return et.apply(net(), et.LoRA(rank=2, targets=["up", "stem"]))


def test_an_adapter_trained_by_a_program_comes_back_as_a_folder_of_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    artifact = et.export_training(
        with_lora(), *BATCHES[0], tmp_path / "lora.pte", optimizer="adamw", check_batches=BATCHES,
        check=Check(steps=20, learning_rate=RATE), forward_rows=8,
    )  # fmt: skip
    names = [spec.name for spec in artifact.training.trainable]
    assert len(names) == 4
    assert all("lora_" in name for name in names)
    losses = train_pte(artifact.path, BATCHES * 10, RATE, checkpoint=tmp_path / "trained.safetensors")
    assert losses[-1] < 0.7 * losses[0]
    model = et.pull(tmp_path / "trained.safetensors", with_lora())
    et.save_adapter(model, tmp_path / "adapter")
    loaded: Any = PeftModel.from_pretrained(net(), tmp_path / "adapter")
    program = TrainingProgram(artifact.path)
    program.restore(tmp_path / "trained.safetensors")
    inputs = BATCHES[0][0]
    assert torch.allclose(loaded(inputs), program.forward(inputs), atol=1e-5)
    assert not torch.allclose(loaded(inputs), net()(inputs), atol=1e-2)
    assert torch.allclose(et.finalize(model)(inputs), loaded(inputs), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adam"}, "unknown optimizer: got 'adam'; allowed: sgd, adamw"),
        ({"name": "adamw", "momentum": 0.9}, "adamw has no momentum: got 0.9"),
        ({"name": "sgd", "weight_decay": 0.1}, "sgd has no weight_decay: got 0.1"),
        ({"name": "adamw", "betas": (0.9, 1.0)}, "betas is out of range"),
        ({"name": "adamw", "weight_decay": -1.0}, "weight_decay is out of range"),
        ({"name": "sgd", "momentum": 1.0}, "momentum is out of range"),
    ],
)
def test_settings_that_an_optimizer_does_not_have_are_refused(settings: dict[str, Any], message: str) -> None:
    given = {"momentum": 0.0, "betas": (0.9, 0.999), "weight_decay": 0.0, **settings}
    with pytest.raises(EdgetuneError, match=message) as caught:
        choose_optimizer(**given)
    assert caught.value.exit_code == Exit.USAGE
