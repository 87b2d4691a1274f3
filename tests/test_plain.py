"""A layer is plain if it computes its class's functional with its own weight and bias; others are named."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

from edgetune.adapt.lora import LoRA
from edgetune.core.apply import apply
from edgetune.core.errors import EdgetuneError
from edgetune.core.plain import describe_computation, refuse_computed
from edgetune.quant.int4 import Int4
from edgetune.quant.nf4 import NF4
from edgetune.sparse.update import SparseUpdate

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.001


class Written(nn.Linear):
    """The same, by other operators, and it counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x @ self.weight.T + self.bias


class Dropping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, functional.dropout(self.weight, 0.5, self.training), self.bias)


class OfThree(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        _, _, width = x.shape
        return functional.linear(x.view(-1, width), self.weight, self.bias).view(*x.shape[:2], -1)


class OfTwo(nn.Linear):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


class ScaledTable(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 8


class SamePadded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (0, 1, 0, 1)))


def patched(factor: float) -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.forward = types.MethodType(lambda self, x: factor * nn.Linear.forward(self, x), layer)
    return layer


def masked() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 12, bias=False),
    "written": lambda: Written(8, 12),
    "written, fp16": lambda: Written(8, 12).half(),
    "written, bf16": lambda: Written(80, 12).bfloat16(),
    "three dimensions only": lambda: OfThree(8, 12),
    "patched with the same": lambda: patched(1.0),
    "convolution": lambda: nn.Conv2d(8, 12, 3, dilation=2, padding=3, padding_mode="reflect", groups=2),
    "same": lambda: nn.Conv1d(8, 12, 4, padding="same", dilation=3),
    "transposed": lambda: nn.ConvTranspose2d(8, 12, 3, 2, groups=2, output_padding=1),
    "table": lambda: nn.Embedding(9, 8, padding_idx=0),
    "Conv1D": lambda: Conv1D(12, 8),
    "on the meta device": lambda: nn.Linear(8, 12, device="meta"),
    "no such class": lambda: nn.LayerNorm(8),
}
COMPUTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight norm, old": (lambda: nn.utils.weight_norm(nn.Linear(8, 12)), "its weight is not a parameter"),
    "spectral norm, old": (lambda: nn.utils.spectral_norm(nn.Conv2d(8, 12, 3)), "its weight is not a parameter"),
    "pruned by torch": (masked, "its weight is not a parameter"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(8, 12, 3)), "parametrized by WeightNorm"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 12)), "parametrized by SpectralNorm"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), "parametrized by Orthogonal"),
    "standardized": (lambda: Standardized(8, 12, 3), "differs by"),
    "scaled": (lambda: Scaled(8, 12), "differs by"),
    "dropping": (lambda: Dropping(8, 12), "in training mode"),
    "patched": (lambda: patched(2.0), "differs by"),
    "own padding": (lambda: SamePadded(8, 12, 2), "another shape"),
    "two inputs": (lambda: OfTwo(8, 12), "does not take the inputs of its class"),
    "scaled table": (lambda: ScaledTable(9, 8), "differs by 7"),
    "lazy": (lambda: nn.LazyLinear(8), "no weight before its first forward"),
    "own forward on the meta device": (lambda: Scaled(8, 12, device="meta"), "no values yet"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_layers_pass(name: str) -> None:
    layer = PLAIN[name]()
    refuse_computed("layer", layer)
    assert getattr(layer, "calls", 0) == 0


@pytest.mark.parametrize("name", COMPUTED)
def test_what_computes_more_is_named_with_the_reason(name: str) -> None:
    make, reason = COMPUTED[name]
    with pytest.raises(EdgetuneError, match=rf'blocks\.1 computes more[\s\S]*{reason}[\s\S]*add "blocks\.1" to skip'):
        refuse_computed("blocks.1", make())


def test_a_look_leaves_no_trace() -> None:
    layer, seen = nn.BatchNorm1d(3), []
    layer = Dropping(8, 12).eval()
    layer.register_forward_hook(lambda *_: seen.append(1))
    layer.register_buffer("calls", torch.zeros(()))
    before, random_state = {k: v.clone() for k, v in layer.state_dict().items()}, torch.get_rng_state()
    assert describe_computation(layer)
    assert not seen
    assert not layer.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def net(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


@pytest.mark.parametrize("make", [lambda: nn.utils.weight_norm(nn.Linear(32, 32)), lambda: Scaled(32, 32),
                                  lambda: parametrizations.weight_norm(nn.Linear(32, 32))])  # fmt: skip
@pytest.mark.parametrize("technique", [NF4(block_size=32), Int4()])
@pytest.mark.filterwarnings("ignore:int4. 0.parametrizations:UserWarning")
def test_4_bits_refuse_it_unless_it_is_skipped(make: Callable[[], nn.Module], technique: Any) -> None:
    model = net(make())
    with pytest.raises(EdgetuneError, match="0 computes more than its class does"):
        apply(model, technique)
    assert type(model[2].weight) is nn.Parameter
    apply(model, technique.model_copy(update={"skip": ("0",)}))
    assert type(model[2].weight) is not nn.Parameter


def test_the_originals_of_a_parametrized_layer_train_whole_as_by_hand() -> None:
    gradients = {}
    for by_hand in (True, False):
        torch.manual_seed(0)
        model = net(parametrizations.weight_norm(nn.Linear(32, 32)))
        if by_hand:
            model[2].requires_grad_(False)
        else:
            apply(model, SparseUpdate(scheme={"0": "full", "2": "frozen", "4": "full"}))
        model(torch.linspace(-1, 1, 5 * 32).view(5, 32)).square().sum().backward()
        gradients[by_hand] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert "0.parametrizations.weight.original0" in gradients[False]
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[True].items():
        torch.testing.assert_close(gradients[False][name], gradient)


@pytest.mark.parametrize("scheme", [{"0": "full"}, {"0": "bias"}, {"0": "frozen"}])
def test_a_standardized_convolution_trains_as_by_hand(scheme: dict[str, Any]) -> None:
    gradients = {}
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    for by_hand in (True, False):
        torch.manual_seed(0)
        first = nn.Conv2d(8, 8, 1)
        model = nn.Sequential(Standardized(8, 8, 3), nn.ReLU(), first, nn.Flatten(), nn.Linear(8 * 16, 2))
        if by_hand:
            model[2].requires_grad_(False)
            model[0].weight.requires_grad_(scheme["0"] == "full")
            model[0].bias.requires_grad_(scheme["0"] != "frozen")
        else:
            apply(model, SparseUpdate(scheme={**scheme, "2": "frozen", "4": "full"}))
        model(x).square().sum().backward()
        gradients[by_hand] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[True].items():
        torch.testing.assert_close(gradients[False][name], gradient)


def test_lora_of_a_standard_layer_is_not_held_up() -> None:
    model = apply(net(Written(32, 32)), LoRA(rank=2, targets=("0",)))
    assert model(torch.zeros(1, 32)).shape == (1, 3)
