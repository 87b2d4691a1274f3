from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgetune.adapt.lora import LoRA
from edgetune.core.apply import apply, finalize
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import call
from edgetune.core.technique import Sample
from edgetune.lean.saved import saved_bytes
from edgetune.lean.stages import blocks_of, stages_of
from edgetune.quant.nf4 import NF4
from edgetune.sparse.sliced import Sliced
from edgetune.sparse.update import SparseUpdate
from support.laws import bert, cnn, fit, llama, logits, loss_of, mlp, pictures, tokens, vectors

torch.set_num_threads(1)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Schemes


def test_last_k_trains_the_last_blocks_and_what_comes_after() -> None:
    names = trained(SparseUpdate(scheme="last-1").apply(bert(layers=3)))
    outside = ("bert.pooler.", "classifier.")
    assert all(name.startswith(("bert.encoder.layer.2.", *outside)) for name in names)
    assert len(names) == 16 + 4


@pytest.mark.parametrize(("head", "expected"), [("full", {"weight", "bias"}), ("bias", {"bias"}), ("frozen", set())])
def test_the_head_has_its_own_setting(head: Any, expected: set[str]) -> None:
    names = trained(SparseUpdate(scheme="last-1", head=head).apply(mlp()))
    assert {n.partition(".")[2] for n in names if n.startswith("classifier")} == expected


def test_norms_can_stay_frozen() -> None:
    names = trained(SparseUpdate(scheme="last-2", norms=False).apply(mlp()))
    assert {n for n in names if n.startswith("blocks")} == {
        f"blocks.{i}.{layer}.{kind}" for i in (1, 2) for layer in ("up", "down") for kind in ("weight", "bias")
    }


def test_bias_trains_biases_and_the_head() -> None:
    model = SparseUpdate(scheme="bias").apply(mlp())
    every = {name for name, _ in model.named_parameters()}
    assert trained(model) == {name for name in every if name.endswith(".bias")} | {"classifier.weight"}


def test_in_a_written_scheme_the_later_pattern_wins_and_covers_what_is_inside() -> None:
    scheme: dict[str, Any] = {"blocks.1": "full", "blocks.*.down": "bias", "blocks.1.norm": "frozen"}
    names = trained(SparseUpdate(scheme=scheme).apply(mlp()))
    assert names == {
        "blocks.0.down.bias", "blocks.1.up.weight", "blocks.1.up.bias", "blocks.1.down.bias", "blocks.2.down.bias",
        "classifier.weight", "classifier.bias",
    }  # fmt: skip


def test_a_resolved_scheme_prints() -> None:
    scheme = SparseUpdate(scheme={"blocks.2.down": "bias"}).resolve(mlp())
    assert str(scheme) == (
        "scheme written: 131 of 13,923 parameters train\n"
        "  bias   blocks.2.down: 32\n"
        "  full   classifier: 99"
    )  # fmt: skip
    assert scheme.part("stem") == "frozen"
    assert hash(scheme) == hash(SparseUpdate(scheme={"blocks.2.down": "bias"}).resolve(mlp()))


@pytest.mark.parametrize(
    ("scheme", "what"),
    [
        ("last-9", "the model has 3 blocks"),
        ("lats-2", "did you mean 'last-2'"),
        ({"blocks.7": "full"}, "matches no layer"),
    ],
)
def test_a_scheme_that_does_not_fit_raises(scheme: Any, what: str) -> None:
    model = mlp()
    with pytest.raises(EdgetuneError, match=what):
        SparseUpdate(scheme=scheme).apply(model)
    assert len(trained(model)) == len(list(model.parameters()))


def test_a_scheme_that_trains_nothing_raises() -> None:
    with pytest.raises(EdgetuneError, match="trains nothing"):
        SparseUpdate(scheme="last-0", head="frozen").apply(mlp())


def test_a_tied_head_raises_unless_it_is_frozen() -> None:
    with pytest.raises(EdgetuneError, match=r"lm_head shares its weight with model\.embed_tokens"):
        SparseUpdate(scheme="last-1").apply(llama(tied=True))
    names = trained(SparseUpdate(scheme="last-1", head="frozen").apply(llama(tied=True)))
    assert names
    assert all(name.startswith("model.layers.1.") for name in names)


def test_4_bit_weights_cannot_train() -> None:
    with pytest.raises(EdgetuneError, match="cannot train"):
        apply(mlp(), [NF4(block_size=32), SparseUpdate(scheme="last-1")])
    apply(mlp(), [NF4(block_size=32, skip=("blocks.2.*", "classifier")), SparseUpdate(scheme="last-1")])


@pytest.mark.parametrize("scheme", ["", {}, {"blocks": "half"}])
def test_settings_are_checked(scheme: Any) -> None:
    with pytest.raises(EdgetuneError):
        SparseUpdate(scheme=scheme)


# Blocks


class Staged(nn.Module):
    """Stages of blocks with something between them, as in ResNet, ConvNeXt and timm's EfficientNets."""

    def __init__(self, linear: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.stages = nn.Sequential(nn.Sequential(linear(), linear()), nn.Sequential(linear(), linear(), linear()))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_blocks_are_found() -> None:
    assert blocks_of(bert(layers=3)) == [f"bert.encoder.layer.{i}" for i in range(3)]
    assert blocks_of(llama()) == ["model.layers.0", "model.layers.1"]
    assert blocks_of(cnn()) == ["blocks.0", "blocks.1", "blocks.2"]
    staged = ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1", "stages.1.2"]
    assert blocks_of(Staged(Unit)) == staged
    assert blocks_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) == []
    linears = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), "head": nn.Linear(4, 2)})
    assert blocks_of(linears) == ["layers.0", "layers.1"]


class Crossed(nn.Module):
    """Runs its layers in another order than it defines them."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.second, self.first = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x))))


def test_without_blocks_the_layers_count_in_the_order_in_which_they_run() -> None:
    sample = Sample.of(torch.randn(2, 4))
    assert trained(SparseUpdate(scheme="last-1").apply(Crossed(), sample)) == {
        "head.weight", "head.bias", "second.weight", "second.bias"
    }  # fmt: skip
    two = trained(SparseUpdate(scheme="last-2").apply(Crossed(), sample))
    assert two == {name for name, _ in Crossed().named_parameters()}
    assert trained(SparseUpdate(scheme="bias", head="frozen").apply(Crossed(), sample)) == {
        "first.bias", "second.bias", "norm.bias"
    }  # fmt: skip
    with pytest.raises(EdgetuneError, match="ordered as they run") as caught:
        SparseUpdate(scheme="last-1").apply(Crossed())
    assert "et.Sample.of" in caught.value.action
    with pytest.raises(EdgetuneError, match="has 2 blocks"):
        SparseUpdate(scheme="last-3").apply(Crossed(), sample)


def test_a_sequential_needs_no_sample() -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 4), nn.Linear(4, 2))

    assert trained(SparseUpdate(scheme="last-1").apply(plain())) == {"3.weight", "3.bias", "4.weight", "4.bias"}
    with pytest.raises(EdgetuneError, match="the head is unknown"):
        SparseUpdate(scheme={"3": "full"}).apply(plain())
    assert trained(SparseUpdate(scheme={"3": "bias", "4": "full"}).apply(plain())) == {"3.bias", "4.weight", "4.bias"}


# What runs


def test_a_frozen_prefix_has_no_dropout_and_no_graph_even_in_training_mode() -> None:
    model = SparseUpdate(scheme="last-1").apply(bert(layers=3)).train()
    seen: list[tuple[Tensor, bool]] = []
    model.bert.encoder.layer[1].output.LayerNorm.register_forward_hook(
        lambda module, args, output: seen.append((output, module.training))
    )
    for _ in range(2):
        call(model, tokens())
    (first, mode), (second, _) = seen
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not mode
    assert all(module.training for module in model.modules())  # the user's mode is given back
    assert not torch.equal(call(model, tokens()).logits, call(model, tokens()).logits)  # the trained part has dropout


def test_lora_in_a_frozen_block_switches_it_on_by_itself() -> None:
    model = apply(bert(layers=3), SparseUpdate(scheme="last-1"))
    before = saved_bytes(model, tokens(), loss_of)
    apply(model, LoRA(rank=2, targets=("bert.encoder.layer.1.*.query",)))
    modes: dict[int, bool] = {}
    for i in (0, 1):
        model.bert.encoder.layer[i].output.dropout.register_forward_hook(
            lambda module, args, output, i=i: modes.update({i: module.training})
        )
    loss_of(call(model.train(), tokens())).backward()
    assert modes == {0: False, 1: True}
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert saved_bytes(model, tokens(), loss_of) > before


def test_modes_come_back_after_an_error() -> None:
    model = SparseUpdate(scheme="last-1").apply(mlp()).train()
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 7))
    assert torch.is_grad_enabled()
    assert all(module.training for module in model.modules())
    model.blocks[0].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(vectors())
    assert torch.is_grad_enabled()


def test_an_input_that_needs_a_gradient_gets_it() -> None:
    model = SparseUpdate(scheme="last-1").apply(mlp())
    x = vectors().requires_grad_(True)
    loss_of(model(x)).backward()
    y = vectors().requires_grad_(True)
    loss_of(mlp()(y)).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_frozen_batch_norms_keep_their_statistics_and_trained_ones_move() -> None:
    model = SparseUpdate(scheme="last-1").apply(cnn())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fit(model, pictures())
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved
    assert all(name.startswith("blocks.2.") for name in moved)


def test_training_with_biases_is_training_in_eval_mode() -> None:
    """All batch norms are frozen or train their bias alone, so the mode makes no difference."""
    model = SparseUpdate(scheme="bias").apply(cnn())
    torch.testing.assert_close(call(model.train(), pictures()), logits(cnn(), pictures()))


def test_stages_are_the_blocks_and_what_stands_around_them() -> None:
    model = bert(layers=2)
    inner = model.bert
    assert stages_of(model) == [inner.embeddings, *inner.encoder.layer, inner.pooler, model.classifier]


def test_finalize_undoes_all_and_twice_raises() -> None:
    model = SparseUpdate(scheme="last-1").apply(cnn())
    with pytest.raises(EdgetuneError, match="already applied"):
        SparseUpdate(scheme="last-2").apply(model)
    plain = finalize(SparseUpdate(scheme="last-1").finalize(model))
    assert saved_bytes(plain, pictures(), loss_of) == saved_bytes(cnn(), pictures(), loss_of)
    assert SparseUpdate(scheme="last-2").apply(plain) is plain


# Kept bytes


def test_kept_bytes_are_those_of_the_saved_tensors() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Sigmoid(), nn.Linear(8, 4, bias=False))
    # input (3, 8), sigmoid's output (3, 8) once for itself and the next linear, the squared logits (3, 4)
    assert saved_bytes(model, torch.randn(3, 8), lambda y: y.square().sum()) == 4 * (24 + 24 + 12)


def test_measuring_changes_nothing() -> None:
    model = cnn()
    model.blocks[0].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    assert saved_bytes(model, pictures(), loss_of) > 0
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_counting_what_is_kept_keeps_nothing_itself() -> None:
    """A sigmoid keeps its own output; a hook that handed the tensor itself back would tie the graph to itself."""
    seen: list[weakref.ref[Tensor]] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    model[1].register_forward_hook(lambda _, __, output: seen.append(weakref.ref(output)))
    assert saved_bytes(model, torch.randn(2, 4), lambda output: output.sum()) > 0
    gc.collect()
    assert [reference() for reference in seen] == [None]


def test_a_second_scheme_takes_the_place_of_the_first() -> None:
    model = apply(mlp(), SparseUpdate(scheme={"blocks.0": 0.5, "classifier": "full"}))
    fit(model, vectors())
    before = logits(model, vectors())
    model = apply(model, SparseUpdate(scheme="last-1"))
    torch.testing.assert_close(logits(model, vectors()), before)
    assert trained(model) == trained(apply(mlp(), SparseUpdate(scheme="last-1")))
    assert not any(m._forward_hooks for m in finalize(model).modules())


@pytest.mark.parametrize("scheme", ["last-1", {"bert.encoder.layer.1": 0.5, "classifier": "full"}])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_reentrant_checkpoints_train_as_frozen_by_hand(scheme: Any) -> None:
    gradients = {}
    for by_hand in (False, True):
        model = bert().train()
        for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
            dropout.p = 0.0
        if not by_hand:
            apply(model, SparseUpdate(scheme=scheme))
        for name, parameter in model.named_parameters():
            if by_hand:
                parameter.requires_grad_("embeddings" not in name and ".layer.0." not in name)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()  # as transformers.Trainer does
        model(**tokens()).logits.square().sum().backward()
        gradients[by_hand] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        if not by_hand:
            sliced = {n: m for n, m in model.named_modules() if isinstance(m, Sliced)}
    assert len(gradients[False]) > 4
    for name, gradient in gradients[False].items():
        layer = sliced.get(name.removesuffix(".slice"))
        expected = gradients[True][name.replace(".slice", ".weight").replace(".base.", ".")]
        if layer is not None:
            expected = expected.index_select(layer.dim, layer.indices)
        assert gradient is not None, name
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
