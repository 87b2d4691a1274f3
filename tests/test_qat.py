"""Training that computes rounded: what it computes is what the quantized model and the program compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import edgetune as et
from edgetune.core.inputs import call, logits_of
from edgetune.core.technique import Technique, adapt_defaults
from edgetune.lean.saved import saved_bytes
from edgetune.quant.fake import FakeQuantized, FakeQuantizedLinear, Rounding, round_activations
from edgetune.quant.teacher import divergence, teacher_of
from edgetune.train.loop import train
from support.laws import ATTENTION, BLOCKS, bert, fit, llama, logits, loss_of, mlp, tokens, vectors
from support.trainable import Words, settings

torch.set_num_threads(1)

LORA = et.LoRA(rank=2, targets=("*_proj",))
GROUPS, CHANNEL = et.Int4(algorithm="absmax"), et.Int4(group_size="channel", algorithm="absmax")
MIXED = et.Int4(targets=("*.down",), int8_linears=("*.up", "classifier"), skip=("stem",))
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], tuple[Technique, ...], Technique]] = {
    "groups": (mlp, vectors, (), GROUPS),
    "channel": (bert, tokens, (), CHANNEL),
    "gptq": (mlp, vectors, (), et.Int4(algorithm="gptq", group_size="channel")),
    "mse": (bert, tokens, (), et.Int4(algorithm="mse")),
    "gptq, lora, sparse": (
        bert,
        tokens,
        (et.SparseUpdate(scheme="last-1"), et.LoRA(rank=2, targets=("bert.encoder.layer.0.*.query",))),
        et.Int4(),
    ),
    "bf16": (lambda: bert().bfloat16(), tokens, (), et.Int4(int8_linears=("*.query",), embeddings="int4")),
    "8 bits": (bert, tokens, (), et.Int8Dynamic()),
    "mixed": (mlp, vectors, (), MIXED),
    "4-bit tables": (bert, tokens, (), et.Int4(embeddings="int4")),
    "unfit widths": (bert, tokens, (), et.Int4(group_size=64, embeddings="int4")),
    "lora": (llama, tokens, (LORA,), GROUPS),
    "lora, channel": (llama, tokens, (LORA,), CHANNEL),
    "lora, 8 bits": (llama, tokens, (LORA,), et.Int8Dynamic(embeddings="int4")),
    "dora": (bert, tokens, (et.LoRA(rank=2, targets=ATTENTION, dora=True),), GROUPS),
    "tied head": (partial(llama, tied=True), tokens, (), et.Int4(int8_linears=("lm_head",))),
    "sparse": (mlp, vectors, (et.SparseUpdate(scheme={"blocks.1": 0.5, "blocks.2": "full"}),), GROUPS),
    "nf4": (mlp, vectors, (et.NF4(block_size=32), et.LoRA(rank=2, targets=BLOCKS)), CHANNEL),
}


@pytest.mark.filterwarnings("ignore:int4.*get 8 bits instead of 4")  # of one case
@pytest.mark.parametrize("case", CASES)
def test_what_training_computes_is_what_the_quantized_model_computes(case: str) -> None:
    make, inputs, before, later = CASES[case]
    steps: list[Technique] = adapt_defaults([*before, et.QAT(), later])
    model = et.apply(make(), steps[:-1], et.Sample.of(inputs()))
    fit(model, inputs())
    expected = logits(model, inputs())
    model = et.finalize(model)
    plain = logits(model, inputs())
    assert [type(m) for m in model.modules()] == [type(m) for m in make().modules()]
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    quantized = logits(et.apply(model, later, et.Sample.of(inputs())), inputs())
    assert torch.equal(quantized, expected)
    assert not torch.equal(plain, expected)  # in which activations are not rounded


@pytest.mark.parametrize("case", ["groups", "channel", "lora", "lora, 8 bits"])
def test_the_program_computes_what_training_computed(case: str, tmp_path: Path) -> None:
    make, inputs, before, later = CASES[case]
    steps: list[Technique] = adapt_defaults([*before, et.QAT(distill=0.5), later])
    model = et.apply(make(), steps[:-1], et.Sample.of(inputs()))
    fit(model, inputs())
    expected = logits(model, inputs())
    model = et.apply(model, later)
    assert torch.equal(logits(model, inputs()), expected)
    parity = et.export(model, inputs(), tmp_path / "model.pte", target="xnnpack", one_row=True).manifest.main.parity
    assert parity is not None
    assert parity.max_relative_difference is not None
    assert parity.max_relative_difference < 1e-2


def test_settings_come_from_the_step_that_follows() -> None:
    later = et.Int4(
        group_size=64, targets=("*.up",), skip=("a",), int8_linears=("b",), embeddings="none", algorithm="mse"
    )
    first = adapt_defaults([et.QAT(distill=0.3), et.Train(), later, et.Int8Dynamic()])[0]
    assert first == et.QAT(
        distill=0.3, group_size=64, targets=("*.up",), skip=("a",), int8_linears=("b",), embeddings="none",
        algorithm="mse",
    )  # fmt: skip
    assert adapt_defaults([et.QAT(group_size="channel"), later])[0].group_size == "channel"
    eight = adapt_defaults([et.QAT(), et.Int8Dynamic(targets=("c",), embeddings="int4")])[0]
    assert eight == et.QAT(targets=(), int8_linears=("c",), embeddings="int4")
    assert adapt_defaults([et.QAT()]) == [et.QAT()]
    with pytest.raises(et.EdgetuneError, match=r"would move scales between weights[^\n]*: got 'awq'"):
        adapt_defaults([et.QAT(), et.Int4(algorithm="awq")])


def test_gradients_pass_straight_through() -> None:
    model = et.apply(mlp(), et.QAT())
    layer: Any = model.stem
    assert isinstance(layer, FakeQuantized)
    x = torch.as_tensor(vectors()).clone().requires_grad_()
    loss_of(layer(x)).backward()
    plain = nn.Linear(32, 32)
    plain.load_state_dict(layer.plain_tensors())
    rounded = round_activations(x).detach().requires_grad_()
    loss_of(plain(rounded)).backward()
    torch.testing.assert_close(layer.base.weight.grad, plain.weight.grad, atol=0, rtol=0)
    torch.testing.assert_close(layer.base.bias.grad, plain.bias.grad, atol=0, rtol=0)
    torch.testing.assert_close(x.grad, rounded.grad, atol=0, rtol=0)
    assert not torch.equal(layer.base.weight, plain.weight)


def test_an_adapter_inside_the_rounding_trains() -> None:
    model = et.apply(llama(), [LORA, et.QAT()])
    fit(model, tokens(), steps=1)
    loss_of(call(model, tokens())).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and p.grad.abs().max() > 0 for name, p in trained.items())  # type: ignore[union-attr]


def test_training_with_rounding_recovers_what_rounding_loses() -> None:
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
    model, weights = mlp(), et.Int4(group_size="channel", algorithm="absmax")
    target = logits(model, x)
    before = (logits(et.apply(copy.deepcopy(model), weights), x) - target).square().mean()
    et.apply(model, [et.QAT(group_size="channel")])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    after = (logits(et.apply(model, weights), x) - target).square().mean()
    assert after < 0.5 * before


@pytest.mark.parametrize("tied", [False, True])
def test_the_teacher_is_the_float_model_and_shares_what_is_frozen(tied: bool) -> None:
    model, inputs = llama(tied), {**tokens(), "attention_mask": torch.ones(4, 10, dtype=torch.long)}  # type: ignore[dict-item]
    inputs["attention_mask"][2, 6:] = 0
    plain = copy.deepcopy(model)
    et.apply(model, [LORA, et.QAT(distill=0.25)])
    assert et.penalty(model) is None  # before any forward
    teacher = teacher_of(model)
    assert teacher is not None
    ours = {id(p) for p in model.parameters()}
    assert all((id(p) in ours) == ("lora_" not in name) for name, p in teacher.model.named_parameters())
    assert torch.equal(logits(teacher.model, inputs), logits(plain, inputs))
    model.train()
    student = logits_of(call(model, inputs))
    keep = inputs["attention_mask"].bool()
    divergences = functional.kl_div(
        student[keep].log_softmax(-1), logits(plain, inputs)[keep].log_softmax(-1), log_target=True, reduction="none"
    )
    penalty = et.penalty(model)
    assert penalty is not None
    torch.testing.assert_close(penalty, 0.25 * divergences.sum(-1).mean())
    penalty.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert all(p.grad is None for p in teacher.model.parameters() if id(p) not in ours)
    assert et.penalty(model) is None  # once for each forward
    model.eval()
    call(model, inputs)
    assert et.penalty(model) is None
    assert not [m for m in et.finalize(model).modules() if m._forward_hooks or m._forward_pre_hooks]


def test_dropout_is_off_while_a_student_is_distilled_and_batch_norms_learn() -> None:
    model, x = wide_net(), torch.randint(0, 20, (8, 6))
    et.apply(model, et.QAT(embeddings="none", distill=0.5)).train()
    before = model.norm.running_mean.clone()  # type: ignore[union-attr, operator]
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model.norm.running_mean, before)  # type: ignore[union-attr, arg-type]
    assert all(module.training for module in model.modules())
    with pytest.raises(TypeError):
        model(x, x)
    assert all(module.training for module in model.modules())
    plain = et.apply(wide_net(), et.QAT(embeddings="none")).train()
    assert not torch.equal(plain(x), plain(x))


def test_frozen_weights_are_rounded_once_and_again_if_they_change() -> None:
    class Counting(Rounding):
        calls = 0

        def __call__(self, weight: Tensor, scales: Tensor | None = None) -> Tensor:
            Counting.calls += 1
            return super().__call__(weight, scales)

    model, x = mlp(), torch.randn(4, 32)
    et.apply(model, [et.LoRA(targets=["*.up"]), et.QAT()], et.Sample.of(x))
    fakes: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantizedLinear)}
    for layer in fakes.values():
        layer.rounding = Counting(**vars(layer.rounding))
    expected = model(x)
    Counting.calls = 0
    assert torch.equal(model(x), expected)
    assert Counting.calls == 3  # those with an adapter
    frozen = fakes["blocks.0.down"]
    with torch.no_grad():
        frozen.base.weight.mul_(1.01)
        frozen.base.weight[0, 0] += 1e-3
    assert torch.equal(frozen.weight, Rounding(**vars(frozen.rounding))(frozen.base.weight, frozen.scales))
    assert not torch.equal(frozen.weight, frozen.base.weight)


def test_rounded_weights_are_not_saved_for_backward() -> None:
    def saved(*steps: et.Technique) -> int:
        return saved_bytes(et.apply(mlp(), steps), vectors(), loss_of)

    rows, widths = 6, (32, 32, 64, 32, 32)  # the inputs of `up` in 3 blocks, once more in 8 bits
    lora = et.LoRA(rank=2, targets=["*.up"])
    assert saved(lora, et.QAT()) <= saved(lora) + 4 * rows * sum(widths)


def test_a_new_adapter_starts_from_weights_that_gptq_rounded() -> None:
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
    exact, adapters = logits(mlp(), x), et.LoRA(rank=2, targets=["blocks.*.up", "blocks.*.down"])

    def error(sample: et.Sample | None, *before: et.Technique) -> float:
        return float((logits(et.apply(mlp(), [*before, et.QAT(group_size="channel")], sample), x) - exact).norm())

    sample = et.Sample.of(x)
    assert error(sample, adapters) == pytest.approx(error(sample), rel=1e-3)
    assert error(sample, adapters) < 0.95 * error(None, adapters)
    model: Any = et.apply(mlp(), [adapters, et.QAT(group_size="channel")], sample)
    fit(model, vectors())
    trained = logits(model, vectors())
    stored = logits(et.apply(model, et.Int4(group_size="channel"), sample), vectors())
    torch.testing.assert_close(stored, trained, atol=2e-5, rtol=1e-4)


def test_single_numbers_are_distilled_by_their_squared_difference() -> None:
    numbers, target = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]])
    assert float(divergence(numbers, target)) == 1.0
    assert float(divergence(numbers[:, 0], target[:, 0])) == 1.0
    assert float(divergence(torch.zeros(2, 3), torch.ones(2, 3))) == 0.0


class WideNet(nn.Module):
    """Inputs as wide as a group, batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.base, self.norm = nn.Embedding(20, 32), nn.Linear(32, 32), nn.BatchNorm1d(32)
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(32, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.dropout(torch.relu(self.norm(self.base(self.embed(tokens).mean(1))))))


def wide_net() -> nn.Module:
    torch.manual_seed(3)
    return WideNet()


def test_a_killed_training_resumes_with_the_same_bits(tmp_path: Path) -> None:
    def start() -> nn.Module:
        return et.apply(wide_net(), et.QAT(embeddings="none", distill=0.5))

    def stop(update: int, *_: object) -> None:
        if update == 5:
            raise InterruptedError

    whole, part, rest = start(), start(), start()
    arguments = (settings(), Words(), functional.cross_entropy)
    losses = train(whole, *arguments, seed=5).losses
    with pytest.raises(InterruptedError):
        train(part, *arguments, seed=5, folder=tmp_path, progress=stop)
    result = train(rest, *arguments, seed=5, folder=tmp_path, resume=True)
    assert result.resumed_from
    assert result.losses == losses
    torch.testing.assert_close(rest.state_dict(), whole.state_dict(), atol=0, rtol=0)
    plain = train(et.apply(wide_net(), et.QAT(embeddings="none")), *arguments, seed=5).losses
    assert plain != losses  # the penalty is part of the loss


def fill(model: Any, value: float) -> nn.Module:
    nn.init.constant_(model.stem.weight, value)
    return model


def forget(model: Any) -> nn.Module:
    """The model as one that was read from a file: what was done to it is not listed."""
    del model.edgetune_techniques
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("technique", "prepare", "message"),
    [
        (et.QAT(), lambda m: forget(et.apply(m, et.Int4())), r"qat, stem: the weights are integers already"),
        (et.QAT(), lambda m: et.apply(m, et.Int4()), r"qat: cannot follow int4, which leaves integer weights"),
        (et.QAT(), lambda m: et.finalize(et.apply(m, et.Int4())), r"qat: cannot follow int4, which leaves integer"),
        (et.QAT(skip=("*",)), lambda m: m, r"qat: there is no linear layer to round"),
        (et.QAT(int8_linears=("head",)), lambda m: m, r"int8_linears: the pattern matches no layer: got 'head'"),
        (et.QAT(group_size=64, pad=True), lambda m: m, r"qat: layers whose inputs are padded later cannot"),
        (et.QAT(), lambda m: fill(m, torch.nan), r"qat, stem: a weight is NaN or infinite"),
        (
            et.QAT(), lambda m: et.apply(m, et.LoRA(targets=BLOCKS, dropout=0.1)),
            r"qat: blocks.0.up has a LoRA with dropout on its inputs[\s\S]*set dropout: 0.0 in lora",
        ),
        (
            et.LoRA(targets=BLOCKS), lambda m: et.apply(m, et.QAT()),
            r"lora: cannot follow qat, which leaves rounded weights\n  next: put lora before qat",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_refused(technique: Technique, prepare: Callable[[Any], nn.Module], message: str) -> None:
    model = prepare(mlp())
    layers = [type(module) for module in model.modules()]
    with pytest.raises(et.EdgetuneError, match=message):
        et.apply(model, technique)
    assert [type(module) for module in model.modules()] == layers
    assert not [hook for module in model.modules() for hook in module._forward_hooks.values() if hook is teacher_of]


def test_activations_are_rounded_as_torchao_rounds_them() -> None:
    from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as torchao

    values = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 3, 32)
    values[1, 2], values[0, 0] = 0.0, 7.0
    expected: Tensor = torchao._apply_int8_act_asym_per_token_quant_dequant(values)
    assert torch.equal(round_activations(values), expected)


@pytest.mark.parametrize("group_size", [32, "channel"])
@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_ternary_weights_are_stored_as_they_computed(group_size: Any, distill: float) -> None:
    technique = et.Ternary(skip=("classifier",), blend_batches=2, distill=distill)
    before: list[Technique] = [et.LoRA(rank=2, targets=("blocks.0.up",), also_train=("blocks.1",)), technique]
    model, later = et.apply(mlp(), before), et.Int4(group_size=group_size, skip=("classifier",))
    assert isinstance(model.blocks[0].up, FakeQuantized)  # type: ignore[index, union-attr]
    fit(model, vectors())
    assert (et.penalty(model) is None) == (distill == 0.0)
    expected = logits(model, vectors())
    model = et.finalize(model)
    for weight in (model.blocks[0].up.weight, model.stem.weight):  # type: ignore[index, union-attr]
        assert all(len(row.abs().unique()) <= 2 for row in weight)
    assert torch.equal(logits(et.apply(model, later, et.Sample.of(vectors())), vectors()), expected)


def test_ternary_weights_are_blended_in_over_the_first_training_batches() -> None:
    model: Any = et.apply(mlp(), et.Ternary(blend_batches=3))
    layer, dense = model.stem, model.stem.base.weight.detach().clone()
    ternary = layer.weight.detach()
    model.eval()
    assert torch.equal(layer.weight_rule()(dense), ternary)
    model.train()
    for share in (0.25, 0.5, 0.75):
        torch.testing.assert_close(layer.weight_rule()(dense), dense + share * (ternary - dense))
    assert torch.equal(layer.weight_rule()(dense), ternary)
    other: Any = et.apply(mlp(), et.Ternary(blend_batches=3)).train()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.stem.weight_rule()(dense), ternary)


def test_the_head_that_a_preset_finds_must_be_written() -> None:
    with pytest.raises(et.EdgetuneError, match=r"gives 8 bits to the head that it finds[\s\S]*int8_linears: \["):
        et.apply(mlp(), [et.QAT(), et.Int4(preset="closest")], et.Sample.of(vectors()))
    for later in (et.Int4(preset="closest", int8_linears=("classifier",)), et.Int4(preset="closest")):
        written = {} if later.rounding["int8_linears"] else {"int8_linears": ("classifier",)}
        technique = et.QAT(**written).adapt_to([later])  # type: ignore[arg-type]
        assert isinstance(technique, et.QAT)
        assert (technique.int8_linears, technique.algorithm) == (("classifier",), "gptq")


def test_int4_after_it_has_nothing_to_calibrate() -> None:
    model = et.apply(mlp(), et.QAT())
    fit(model, vectors())

    def no_batches() -> Any:
        raise AssertionError("weights on the grid need no calibration")

    computed = logits(model.eval(), vectors())
    rounded = et.apply(model, et.Int4(algorithm="gptq"), et.Sample(vectors(), no_batches))
    torch.testing.assert_close(logits(rounded, vectors()), computed, rtol=0, atol=0)
