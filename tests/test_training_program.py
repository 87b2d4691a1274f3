"""Training programs: real ones, trained by the runtime beside eager SGD; their state, checkpoints and errors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.quiet import silence_libraries
from edgetune.export.training import lower
from edgetune.export.training.pull import pull
from edgetune.export.training.step import Check, eager_losses, export_training
from edgetune.program.artifact import Artifact
from edgetune.program.manifest import UpdateRule
from edgetune.quant.int4 import Int4
from edgetune.runtime.training import TrainingProgram, time_steps_in_child, train_pte
from edgetune.sparse.sliced import Sliced
from support.training_measures import loss_difference, stock_plan_bytes

RATE, MOMENTUM = 0.05, 0.9


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = 2
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.first(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Convolutional(nn.Module):
    """A convolution of each kind, batch norms, max pooling and four activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.wide, self.wide_norm = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.point = nn.Conv2d(12, 16, 1)
        self.head = nn.Linear(16, 3)
        for norm in (self.stem_norm, self.wide_norm):
            norm.running_mean, norm.running_var = torch.randn_like(norm.bias) * 0.1, 1 + torch.rand_like(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(x))), 2)
        x = F.relu6(self.wide_norm(self.wide(x)))
        x = F.hardswish(self.point(F.silu(self.deep(x))))
        return self.head(x.mean((2, 3)))


def batches(shape: tuple[int, ...], count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Inputs from which the label can be told."""
    made = []
    for n in range(count):
        generator = torch.Generator().manual_seed(n)
        labels = torch.randint(0, 3, shape[:1], generator=generator)
        level = (labels - 1.0).view(-1, *([1] * (len(shape) - 1)))
        made.append((torch.randn(shape, generator=generator) * 0.5 + level, labels))
    return made


TEXTS, PICTURES = batches((4, 6, 8)), batches((4, 3, 12, 12))


def transformer() -> nn.Module:
    torch.manual_seed(0)
    model = Transformer().requires_grad_(False)
    model.blocks[1].requires_grad_(True)
    model.head.requires_grad_(True)
    return model


@pytest.fixture(scope="module")
def last_block(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("training") / "last.pte"
    return export_training(transformer(), *TEXTS[0], path, momentum=MOMENTUM, forward_rows=4, check_batches=TEXTS)


def test_a_transformers_losses_are_eagers_for_fifty_steps(last_block: Artifact) -> None:
    assert loss_difference(last_block, transformer(), TEXTS, F.cross_entropy, 50, RATE) < 1e-4
    losses = train_pte(last_block.path, TEXTS * 13, RATE, steps=50)
    assert len(losses) == 50
    assert losses[-1] < 0.5 * losses[0], "it must have learned, or equal losses mean little"


def test_forward_infers_with_what_train_has_changed(last_block: Artifact) -> None:
    program, (inputs, labels) = TrainingProgram(last_block.path), TEXTS[0]
    model = transformer()
    assert torch.allclose(program.forward(inputs), model(inputs), atol=1e-5)
    for _ in range(5):
        program.step(inputs, labels, RATE)
    after = program.forward(inputs)
    assert not torch.allclose(after, model(inputs), atol=1e-2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE, MOMENTUM)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    assert torch.allclose(after, model(inputs), atol=1e-4)


def test_a_checkpoint_goes_on_where_it_stopped_with_its_momentum(last_block: Artifact, tmp_path: Path) -> None:
    whole = train_pte(last_block.path, TEXTS, RATE)
    kept = tmp_path / "state.safetensors"
    first = train_pte(last_block.path, TEXTS[:2], RATE, checkpoint=kept)
    second = train_pte(last_block.path, TEXTS[2:], RATE, resume=kept)
    assert first + second == whole
    program = TrainingProgram(last_block.path)
    program.restore(kept)
    assert program.state()["head.weight_momentum"].abs().max() > 0
    with pytest.raises(EdgetuneError, match="not one of this program"):
        program.load_state({"head.weight": torch.zeros(3, 16)})


def test_pulled_weights_are_an_ordinary_models(last_block: Artifact, tmp_path: Path) -> None:
    program = TrainingProgram(last_block.path)
    for inputs, labels in TEXTS:
        program.step(inputs, labels, RATE)
    program.save(tmp_path / "state.safetensors")
    pulled = pull(tmp_path / "state.safetensors", transformer())
    inputs = TEXTS[0][0]
    assert torch.allclose(pulled(inputs), program.forward(inputs), atol=1e-5)
    untrained = pull(last_block.path, copy.deepcopy(pulled))
    assert torch.equal(untrained.head.weight, transformer().head.weight)
    with pytest.raises(EdgetuneError, match="no parameter of this name"):
        pull(tmp_path / "state.safetensors", nn.Linear(2, 2))


def test_the_manifest_says_what_trains_and_what_it_takes(last_block: Artifact) -> None:
    artifact = Artifact.load(last_block.path)
    known, (forward, train) = artifact.training, artifact.manifest.calls
    model = transformer()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert [t.name for t in known.trainable] == names
    size = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
    assert 2 * size <= known.state_bytes < 2 * size + 64 * len(names), "the weights and their momentum"
    shapes = [[(spec.name, spec.shape) for spec in (*call.inputs, *call.outputs)] for call in (forward, train)]
    rows = [("input_0", (4, 6, 8)), ("labels", (4,)), ("learning_rate", ()), ("loss", ()), ("logits", (4, 3))]
    assert (forward.name, train.name) == ("forward", "train")
    assert shapes == [[rows[0], rows[-1]], rows]
    assert 0 < forward.plan_bytes < train.plan_bytes
    assert 0 < sum(o.macs for o in forward.operators) < sum(o.macs for o in train.operators)
    assert known.parity.steps == 5
    assert known.parity.max_abs_loss_difference < 1e-5
    frozen = [o for o in train.operators if o.module.startswith(("stem", "blocks.0")) and o.kind == "linear"]
    assert len(frozen) == 5
    assert all(o.delegated for o in frozen)
    assert train.delegated_macs_pct > 99
    timing = time_steps_in_child(last_block.path, TEXTS[0], threads=1, seconds=0.1)
    assert timing["peak_memory_mib"] > timing["empty_memory_mib"] > 0


def test_the_arena_is_smaller_than_the_stock_exports(last_block: Artifact) -> None:
    stock = stock_plan_bytes(transformer(), *TEXTS[0], F.cross_entropy)
    weights = last_block.training.state_bytes / 2  # momentum is not in the stock program at all
    assert 1.5 * (last_block.manifest.main.plan_bytes + weights) < stock


@pytest.mark.slow
def test_a_convolutional_net_trains_as_eager(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Convolutional().eval()
    artifact = export_training(model, *PICTURES[0], tmp_path / "cnn.pte", momentum=MOMENTUM, check_batches=PICTURES)
    assert loss_difference(artifact, model, PICTURES, F.cross_entropy, 50, RATE) < 1e-4
    assert not [o for o in artifact.manifest.main.undelegated if "convolution" in o.operator]
    assert TrainingProgram(artifact.path).forward(PICTURES[0][0][:1]).shape == (1, 3)


class Parts(nn.Module):
    """One layer of each kind that can be sliced, with something that trains before each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.ins, self.outs = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.deep = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.ins(F.relu(self.stem(x))))
        x = F.relu(self.deep(F.relu(self.outs(x)))).mean((2, 3))
        return self.head(F.gelu(self.down(F.gelu(self.up(x)))))


def sliced() -> nn.Module:
    torch.manual_seed(0)
    model = Parts().requires_grad_(False)
    model.stem.bias.requires_grad_(True)  # type: ignore[union-attr]
    model.down.bias.requires_grad_(True)
    for name, dim, indices in (("ins", 1, [1, 2, 6]), ("outs", 0, [0, 5, 11]), ("deep", 0, [3, 4, 7]),
                               ("up", 0, [1, 9]), ("down", 1, [0, 3, 8])):  # fmt: skip
        setattr(model, name, Sliced(getattr(model, name), torch.tensor(indices), dim))
    return model.eval()


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("slices") / "slices.pte"
    check = Check(steps=8, learning_rate=RATE)
    return export_training(sliced(), *PICTURES[0], path, momentum=MOMENTUM, check_batches=PICTURES, check=check)


def test_slices_train_as_eagers_do(slices: Artifact) -> None:
    assert loss_difference(slices, sliced(), PICTURES, F.cross_entropy, 50, RATE) < 1e-4
    names = {t.name: t.shape for t in slices.training.trainable}
    assert names == {
        "stem.bias": (8,), "ins.slice": (12, 3, 3, 3), "outs.slice": (3, 12, 1, 1), "deep.slice": (3, 1, 3, 3),
        "up.slice": (2, 12), "down.slice": (16, 3), "down.base.bias": (16,),
    }  # fmt: skip


@pytest.mark.parametrize("plain", [False, True])
def test_slices_are_pulled_into_sliced_and_into_plain_models(slices: Artifact, tmp_path: Path, plain: bool) -> None:
    kept = tmp_path / "state.safetensors"
    train_pte(slices.path, PICTURES, RATE, checkpoint=kept)
    program = TrainingProgram(slices.path)
    program.restore(kept)
    torch.manual_seed(0)
    model = Parts().eval() if plain else sliced()
    before = copy.deepcopy(model)(PICTURES[0][0][:1])
    pulled = pull(kept, model)
    assert not any(isinstance(layer, Sliced) for layer in pulled.modules())
    assert torch.allclose(pulled(PICTURES[0][0][:1]), program.forward(PICTURES[0][0][:1]), atol=1e-5)
    assert not torch.allclose(pulled(PICTURES[0][0][:1]), before, atol=1e-3)


def test_four_bit_layers_stay_four_bit_while_the_rest_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("frozen", nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)))
    model.add_module("head", nn.Linear(64, 3))
    Int4(skip=["head"]).apply(model)
    model.requires_grad_(False)
    model.head.requires_grad_(True)  # type: ignore[operator, union-attr]
    data = batches((8, 64))
    artifact = export_training(
        model, *data[0], tmp_path / "m.pte", check_batches=data, check=Check(max_loss_difference=5e-3)
    )
    call = artifact.manifest.main
    assert {o.dtype for o in call.operators if o.module.startswith("frozen.") and o.kind == "linear"} == {"8da4w"}
    assert loss_difference(artifact, model, data, F.cross_entropy, 20, RATE) < 2e-2


def test_a_weight_that_trains_inside_a_delegate_is_refused() -> None:
    with silence_libraries():  # an inference program: its delegate holds the weight
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        exported = torch.export.export(nn.Linear(8, 3), (torch.randn(4, 8),))
        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).exported_program()
    lower.check_delegates(lowered, {"another"})
    with pytest.raises(EdgetuneError, match="a delegate contains the trainable weight") as caught:
        lower.check_delegates(lowered, {"weight", "another"})
    assert caught.value.exit_code is Exit.EXPORT


def test_a_gradient_through_a_quantized_layer_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(64, 64))
    model.add_module("second", nn.Linear(64, 64))
    Int4(skip=["first"]).apply(model)
    model.first.requires_grad_(True)  # type: ignore[operator, union-attr]
    inputs, labels = batches((4, 64))[0]
    with pytest.raises(EdgetuneError, match="through a quantized layer"):
        export_training(model, inputs, labels, tmp_path / "m.pte")


def test_what_cannot_train_says_so(tmp_path: Path) -> None:
    frozen = nn.Linear(8, 3).requires_grad_(False)
    inputs, labels = batches((4, 8))[0]
    with pytest.raises(EdgetuneError, match="nothing in this model is trainable"):
        export_training(frozen, inputs, labels, tmp_path / "m.pte")
    with pytest.raises(EdgetuneError, match="this target cannot train"):
        export_training(nn.Linear(8, 3), inputs, labels, tmp_path / "m.pte", target="coreml")
    with pytest.raises(EdgetuneError, match=r"must end in \.pte"):
        export_training(nn.Linear(8, 3), inputs, labels, tmp_path / "m.bin")


def test_eager_losses_leave_the_model_alone() -> None:
    model = transformer()
    before = copy.deepcopy(model.state_dict())
    with silence_libraries():
        eager_losses(model, TEXTS[:2], F.cross_entropy, UpdateRule(), RATE)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
