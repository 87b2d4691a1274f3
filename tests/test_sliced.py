from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgetune.core.apply import apply, finalize
from edgetune.core.errors import EdgetuneError
from edgetune.lean.saved import saved_bytes
from edgetune.quant.nf4 import NF4
from edgetune.quant.size import parameter_count
from edgetune.sparse.scheme import Slice
from edgetune.sparse.sliced import Sliced, strongest_channels
from edgetune.sparse.update import SparseUpdate
from support.laws import bert, cnn, dense, fit, llama, logits, mlp, pictures, tokens, vectors

torch.set_num_threads(1)


class SamePadded(nn.Conv2d):
    """Pads in a forward of its own, as timm's ports from TensorFlow do."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(
            nn.functional.pad(x, (0, 1, 0, 1)),
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


class TwoProducts(nn.Linear):
    """A low-rank path of its own beside the product with its weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        side = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return nn.functional.linear(input=x, weight=self.weight, bias=self.bias) * 2 + side


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Transposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Dropping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.dropout(self.weight, 0.5, self.training), self.bias)


LAYERS = {
    "linear-2d": (lambda: nn.Linear(8, 12), (5, 8)),
    "linear-3d": (lambda: nn.Linear(8, 12), (2, 3, 8)),
    "linear-two-products": (lambda: TwoProducts(8, 12), (5, 8)),
    "linear-1d": (lambda: nn.Linear(8, 12, bias=False), (8,)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 9, 9)),
    "conv2d-dilated": (lambda: nn.Conv2d(8, 12, 3, dilation=2, bias=False), (2, 8, 9, 9)),
    "conv2d-groups": (lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), (2, 8, 6, 6)),
    "conv2d-depthwise": (lambda: nn.Conv2d(8, 16, 3, groups=8, padding="same", dilation=2), (2, 8, 6, 6)),
    "conv2d-circular": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), (2, 8, 6, 6)),
    "conv2d-own-padding": (lambda: SamePadded(8, 12, 2), (2, 8, 6, 6)),
    "conv2d-unbatched": (lambda: nn.Conv2d(8, 12, 3), (8, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), (2, 8, 9)),
    "conv3d": (lambda: nn.Conv3d(8, 12, 2), (2, 8, 4, 4, 4)),
}


def gradients(layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_(True)
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert x.grad is not None
    return x.grad, {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("of", ["inputs", "outputs"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_equal_autograds(name: str, of: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    plain, x = make(), torch.randn(shape)
    indices, dim = strongest_channels(plain, 0.5, of)
    layer = Sliced(copy.deepcopy(plain), indices, dim)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=1e-5)
    (for_input, mine), (expected_input, expected) = gradients(layer, x), gradients(plain, x)
    torch.testing.assert_close(for_input, expected_input, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mine["slice"], expected["weight"].index_select(dim, indices), atol=1e-6, rtol=1e-5)
    assert ("base.bias" in mine) == (plain.bias is not None)
    if plain.bias is not None:
        torch.testing.assert_close(mine["base.bias"], expected["bias"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "kept_channels"), [("linear-3d", 2), ("conv2d", 2), ("conv2d-groups", 2)])
def test_only_the_channels_that_are_needed_are_kept(name: str, kept_channels: int) -> None:
    make, shape = LAYERS[name]
    plain, x = make(), torch.randn(shape)
    indices, dim = strongest_channels(plain, 0.25, "inputs")
    layer = Sliced(plain, indices, dim)
    assert layer.indices.numel() < plain.weight.shape[dim] / 2
    assert saved_bytes(layer, x, lambda y: y.sum()) == x.nbytes * kept_channels // 8


def test_what_is_strongest() -> None:
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -5, 0, 2], [1, 1, 3, -3]]))
    assert strongest_channels(layer, 0.5, "inputs")[0].tolist() == [1, 3]
    assert strongest_channels(layer, 0.01, "inputs")[0].tolist() == [1]  # never none
    assert strongest_channels(layer, 0.5, "outputs") == (torch.tensor([0]), 0)
    scores = torch.tensor([[9.0, 0, 0, 0], [0, 0, 8, 0]])
    assert strongest_channels(layer, 0.5, "inputs", scores)[0].tolist() == [0, 2]
    grouped = nn.Conv2d(4, 8, 1, groups=4)
    with torch.no_grad():
        grouped.weight.copy_(torch.arange(8.0).view(8, 1, 1, 1))
    assert strongest_channels(grouped, 0.5, "inputs")[0].tolist() == [4, 5, 6, 7]


def test_a_sliced_layer_computes_with_its_dense_weight_and_merges_in_the_trained_slice() -> None:
    model = apply(mlp(), SparseUpdate(scheme={"blocks.1.up": 0.25, "classifier": "frozen"}))
    before = dense(model.blocks[1].up).detach().clone()
    fit(model, vectors())
    layer = model.blocks[1].up
    changed = (dense(layer) != before).any(0).nonzero().flatten()
    assert changed.tolist() == layer.indices.tolist()
    assert torch.equal(layer.weight, dense(layer))
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense(layer), layer.bias))
    trained, plain = dense(layer).detach(), finalize(model)
    assert type(plain.blocks[1].up) is nn.Linear
    assert torch.equal(plain.blocks[1].up.weight, trained)


@pytest.mark.parametrize("bias", [True, False])
def test_the_first_layer_trains_in_part_where_nothing_before_it_trains(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8, bias=bias), nn.LayerNorm(8), nn.Linear(8, 3))
    x = torch.randn(4, 6)
    model(x).square().sum().backward()
    expected = model[1].weight.grad.clone()
    opened = apply(model, SparseUpdate(scheme={"*": "frozen", "1": 0.5, "3": "full"}))
    opened.zero_grad()
    opened.train()(x).square().sum().backward()
    layer: Sliced = opened[1]
    torch.testing.assert_close(layer.slice.grad, expected.index_select(layer.dim, layer.indices))


def test_a_slice_is_no_more_parameters() -> None:
    model = apply(mlp(), SparseUpdate(scheme={"blocks": 0.25, "classifier": "full"}))
    assert parameter_count(model) == sum(p.numel() for p in mlp().parameters())


def test_two_forwards_before_a_backward_and_a_layer_called_twice() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(8, 8)
    layer = Sliced(copy.deepcopy(plain), *strongest_channels(plain, 0.5, "inputs"))
    x = torch.randn(2, 8, requires_grad=True)
    layer(layer(x)).sum().backward()
    twice = plain(plain(x)).sum()
    expected = torch.autograd.grad(twice, plain.weight)[0]
    torch.testing.assert_close(layer.slice.grad, expected.index_select(1, layer.indices))


def test_a_slice_trains_in_bf16_autocast() -> None:
    model = apply(mlp(), SparseUpdate(scheme={"blocks.2": 0.5, "classifier": "full"}))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(vectors()).float().square().sum()
    loss.backward()
    gradient = model.blocks[2].up.slice.grad
    assert gradient.dtype == torch.float32
    assert gradient.abs().sum() > 0


def test_a_slice_beside_4_bit_weights() -> None:
    model = apply(
        mlp(), [NF4(block_size=32, skip=("blocks.2.*", "classifier")), SparseUpdate(scheme={"blocks.2": 0.5})]
    )
    before = logits(model, vectors())
    fit(model, vectors())
    assert not torch.equal(logits(model, vectors()), before)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # dynamo's own
def test_a_slice_compiles() -> None:
    model = apply(mlp(), SparseUpdate(scheme={"blocks.2": 0.5}))
    expected = copy.deepcopy(model)
    expected(vectors()).square().sum().backward()
    torch.compile(model, backend="eager")(vectors()).square().sum().backward()
    torch.testing.assert_close(model.blocks[2].up.slice.grad, expected.blocks[2].up.slice.grad)


@pytest.mark.parametrize(
    ("model", "scheme", "what"),
    [
        (mlp, {"stem": "bias", "blocks.1.norm": 0.5}, "blocks.1.norm: only linears and convolutions"),
        (bert, {"bert.embeddings": 0.5}, "only linears and convolutions"),
        (lambda: llama(tied=True), {"lm_head": 0.5}, "shares its weight"),
        (lambda: apply(mlp(), NF4(block_size=32)), {"blocks.2.up": 0.5}, "cannot train"),
    ],
)
def test_what_cannot_be_sliced_raises_and_changes_nothing(model: Any, scheme: Any, what: str) -> None:
    found = model()
    before = {name: p.requires_grad for name, p in found.named_parameters()}
    with pytest.raises(EdgetuneError, match=what):
        SparseUpdate(scheme=scheme).apply(found)
    assert {name: p.requires_grad for name, p in found.named_parameters()} == before
    assert not any(isinstance(m, Sliced) for m in found.modules())


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: Standardized(8, 8, 3), "does not multiply by the plain weight"),
        (lambda: Standardized(8, 8, 3, bias=False), "does not multiply by the plain weight"),
        (lambda: Transposed(8, 8), "does not multiply by the plain weight"),
        (lambda: Dropping(8, 8), "does not multiply by the plain weight"),
        (lambda: nn.utils.weight_norm(nn.Linear(8, 8)), "its weight is not a parameter"),
        (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), "its weight is not a parameter"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 1)), "parametrized by WeightNorm"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_layer_that_does_not_multiply_by_its_weight_is_refused(layer: Any, reason: str) -> None:
    model = nn.Sequential(layer(), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(EdgetuneError, match=rf"0 cannot train in part: .*{reason}"):
        SparseUpdate(scheme={"0": 0.5, "2": "full"}).apply(model)
    assert not any(isinstance(m, Sliced) or m._forward_pre_hooks for m in model.modules() if m is not model[0])
    apply(model, SparseUpdate(scheme={"0": "full", "2": "full"}))


@pytest.mark.parametrize("ratio", [0, 1.0, -0.5, 1.5, float("nan"), "half"])
def test_a_ratio_is_between_0_and_1(ratio: Any) -> None:
    with pytest.raises(ValueError, match="scheme"):
        SparseUpdate(scheme={"blocks": ratio})


def test_a_number_is_a_slice_of_inputs_by_magnitude() -> None:
    short = SparseUpdate(scheme={"blocks.2.up": 0.25}).resolve(mlp())
    assert short == SparseUpdate(scheme={"blocks.2.up": Slice(ratio=0.25)}).resolve(mlp())
    assert "  1/4    blocks.2.up: 576" in str(short)  # 64 x 8 weights and 64 biases


@pytest.mark.parametrize(
    ("model", "inputs", "scheme"),
    [
        (mlp, vectors, "last-1"),
        (mlp, vectors, {"blocks.1": 0.25, "blocks.2.up": Slice(ratio=0.3, of="outputs")}),
        (cnn, pictures, {"blocks.1": Slice(ratio=0.5, by="magnitude"), "classifier": "bias"}),
        (bert, tokens, "bert-pockengine"),
    ],
)
def test_a_scheme_written_out_resolves_to_itself(model: Any, inputs: Any, scheme: Any) -> None:
    resolved = SparseUpdate(scheme=scheme).resolve(model())
    again = SparseUpdate(scheme=resolved.to_mapping()).resolve(model())
    assert again.choices == resolved.choices


def test_pockengines_scheme_for_a_bert() -> None:
    scheme = SparseUpdate(scheme="bert-pockengine", head="frozen").resolve(bert(layers=6))
    parts = {c.layer: c.part for c in scheme.choices if c.training}
    inside = {name.removeprefix("bert.encoder.layer."): part for name, part in parts.items()}
    full = {name for name, part in inside.items() if part == "full"}
    linears = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
               "intermediate.dense")  # fmt: skip
    assert full == {f"{layer}.{name}" for layer in (4, 5) for name in linears}
    assert {name.partition(".")[0] for name in inside} == {"3", "4", "5"}
    assert inside["5.output.dense"] == inside["3.attention.self.query"] == "bias"


def test_pockengine_needs_linears() -> None:
    with pytest.raises(EdgetuneError, match="no linears in its blocks"):
        SparseUpdate(scheme="bert-pockengine").apply(cnn())
