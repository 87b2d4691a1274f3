"""Weights read outside their layer's own forward: seen in one forward, or in the source, by every technique."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.adapt.lora import LoRA
from edgetune.core.apply import apply, finalize
from edgetune.core.errors import EdgetuneError
from edgetune.core.technique import Sample, Technique
from edgetune.lean.frozen import hook_of
from edgetune.lean.reads import FirstForward, refuse_read_elsewhere, weights_read_elsewhere
from edgetune.lean.reads_in_source import read_in_source
from edgetune.quant.int4 import Int4
from edgetune.quant.nf4 import NF4
from edgetune.sparse.update import SparseUpdate
from support.laws import bert, cnn, llama, mlp, pictures, tokens, vectors

WIDE = 32


class Joined(nn.Module):
    """timm's BEiT: one linear whose bias is put together at each call, or which is called where there is none."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDE, 3 * WIDE, bias=False), nn.Linear(WIDE, WIDE)
        self.q_bias = nn.Parameter(torch.zeros(WIDE)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            y = self.qkv(x)
        else:
            y = functional.linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros(2 * WIDE)]))
        q, k, v = y.chunk(3, -1)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).to(self.proj.weight.dtype))


class Fused(nn.Module):
    """Two linears whose weights are multiplied by as one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = (nn.Linear(WIDE, WIDE) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k = functional.linear(x, torch.cat([self.q.weight, self.k.weight])).chunk(2, -1)
        return self.out(q * k)


class TiedByReading(nn.Module):
    """A head that is the table's weight, read by a property of a method's."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.fc = nn.Embedding(20, WIDE), nn.Linear(WIDE, WIDE)

    @property
    def table(self) -> Tensor:
        return self.wte.weight

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.table.T

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(torch.tanh(self.fc(self.wte(ids))))


class Looped(nn.Module):
    """Reads in a loop and under a condition on the input: no source tells which layer, or whether."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(2))
        self.head, self.side = nn.Linear(WIDE, 3), nn.Linear(WIDE, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = functional.linear(x, layer.weight.data).relu()
        y = self.head(x)
        if x.shape[0] > 100:
            y = y + functional.linear(x, self.side.weight)
        return y


class InTraining(nn.Module):
    """Drops weights while it trains, and only then goes past its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDE, 3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, functional.dropout(self.fc.weight, 0.5)) if self.training else self.fc(x)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(WIDE, 4, 64, batch_first=True), nn.Linear(WIDE, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def numbers() -> Tensor:
    return torch.randn(4, 6, WIDE, generator=torch.Generator().manual_seed(0))


def ids() -> Tensor:
    return torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(0))


ENCODER = {"layer.self_attn.out_proj", "layer.linear1", "layer.linear2", "layer.norm1", "layer.norm2"}
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], set[str], set[str]]] = {
    # the model, its input, what a forward shows, what source alone shows
    "joined": (Joined, numbers, {"qkv"}, {"qkv"}),
    "not joined": (lambda: Joined(bias=False), numbers, set(), set()),
    "fused": (Fused, numbers, {"q", "k"}, {"q", "k"}),
    "tied by reading": (TiedByReading, ids, {"wte"}, {"wte"}),
    "looped": (Looped, numbers, {"layers.0", "layers.1"}, set()),
    "in training": (InTraining, numbers, {"fc"}, set()),
    "encoder layer": (Encoder, numbers, ENCODER, ENCODER - {"layer.norm1", "layer.norm2"}),
    "mlp": (mlp, vectors, set(), set()),
    "cnn": (cnn, pictures, set(), set()),
    "bert": (bert, tokens, set(), set()),
    "llama, tied": (lambda: llama(tied=True), tokens, set(), set()),
}


@pytest.mark.parametrize("name", CASES)
def test_what_reads_a_weight_is_seen(name: str) -> None:
    make, inputs, shown, in_source = CASES[name]
    model = make()
    layers = [n for n, m in model.named_modules() if n and isinstance(getattr(m, "weight", None), Tensor)]
    assert set(read_in_source(model, layers)) == in_source
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    reads = weights_read_elsewhere(model, inputs(), layers)
    assert set(reads.elsewhere) == shown
    assert reads.complete
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_readers_and_idle_layers_are_named() -> None:
    model = nn.Sequential(Joined(), Joined())
    reads = weights_read_elsewhere(model, numbers())
    assert reads.elsewhere == {"0.qkv": ["0"], "1.qkv": ["1"]}
    assert reads.idle == ["0.qkv", "1.qkv"]
    with pytest.raises(EdgetuneError, match=r'0\.qkv is not called.*0 \(Joined\) reads[\s\S]*add "0\.qkv" to skip'):
        refuse_read_elsewhere(model, ["0.qkv", "0.proj"])


def test_inputs_that_do_not_fit_leave_the_first_forward_to_be_watched() -> None:
    model = Looped()
    refuse_read_elsewhere(model, ["head"], Sample.of(torch.zeros(2, 5)))
    assert hook_of(model, FirstForward)


ON_QKV: dict[str, Technique] = {
    "lora": LoRA(rank=2, targets=("*.qkv",)),
    "slice": SparseUpdate(scheme={"1.qkv": 0.25, "1.proj": "full"}),
    "nf4": NF4(block_size=32, targets=("*.qkv",)),
}


@pytest.mark.parametrize("technique", ON_QKV)
def test_every_technique_refuses_it_and_changes_nothing(technique: str) -> None:
    model = nn.Sequential(Joined(), Joined())
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(EdgetuneError, match="qkv is not called where its weight is used"):
        apply(model, ON_QKV[technique])
    assert [type(module) for module in model.modules()] == kinds
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("technique", [SparseUpdate(scheme={"layers.1": 0.5, "head": "full"}), NF4(block_size=32),
                                       Int4()])  # fmt: skip
def test_with_a_sample_what_no_source_shows_is_refused_before_training(technique: Technique) -> None:
    model = Looped()
    with pytest.raises(EdgetuneError, match=r"layers\.\d is not called where its weight is used: Looped reads"):
        apply(model, technique, Sample.of(numbers()))
    assert all(type(layer) is nn.Linear for layer in model.layers)


def test_without_a_sample_the_first_forward_raises() -> None:
    model = apply(Looped(), LoRA(rank=2, targets=("layers.*", "head")))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(EdgetuneError, match=r"layers\.0 is not called where its weight is used: Looped reads"):
            other(numbers())


def test_a_first_forward_without_such_reads_is_the_last_that_is_watched() -> None:
    plain, model = Looped(), Looped()
    keys = model.state_dict().keys()
    apply(model, LoRA(rank=2, targets=("head", "side")))
    assert {key for key in model.state_dict() if "lora_" not in key} == set(keys)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.zeros(2, 5))
    assert hook_of(model, FirstForward)  # a forward that failed has shown nothing
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(model(numbers()), plain(numbers()))
    assert not hook_of(model, FirstForward)


def test_what_is_finalized_before_any_forward_is_not_watched() -> None:
    model = finalize(apply(mlp(), [NF4(block_size=32), SparseUpdate(scheme={"blocks.1.norm": "full"})]))
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # dynamo's own
def test_a_compiler_and_an_exporter_are_not_disturbed() -> None:
    model = apply(mlp(), LoRA(rank=2, targets=("blocks.*.up",)))
    expected = model.eval()(vectors())
    again = apply(mlp(), LoRA(rank=2, targets=("blocks.*.up",))).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(torch.compile(again, backend="eager")(vectors()), expected)
    program = torch.export.export(again, (vectors(),), strict=False)
    torch.testing.assert_close(program.module()(vectors()), expected)
    assert hook_of(again, FirstForward)


def test_a_table_that_another_reads_stays_in_floating_point() -> None:
    model = TiedByReading()
    with pytest.warns(UserWarning, match=r"int4: wte: .*skip: \['wte'\]"):
        apply(model, Int4())
    assert type(model.wte.weight) is nn.Parameter
    assert type(model.fc.weight) is not nn.Parameter
