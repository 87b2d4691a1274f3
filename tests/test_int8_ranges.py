"""int8: how activation ranges are found, corrected biases, and what stays in floating point."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetune.core.errors import EdgetuneError
from edgetune.core.technique import Sample
from edgetune.export import export
from edgetune.quant.int8 import Int8, Static8
from edgetune.quant.observers import OBSERVERS, Observer, entropy_range, observer_for, percentile_range


class Residual(nn.Module):
    """Convolutions with and without a bias, a sum, a head; of its inputs one value is far out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.point, self.wide = nn.Conv2d(8, 8, 1, bias=False), nn.ConvTranspose2d(8, 4, 2, 2)
        self.head = nn.Linear(4, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = torch.relu(self.stem(pixels))
        return self.head(self.wide(x + self.point(self.depth(x))).mean((2, 3)))


def outlying(batches: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((16, 3, 10, 10), (16, 3, 1, 1))
    drawn = [sum(torch.randn(size, generator=generator) for size in sizes) for _ in range(batches)]
    drawn[0][0, 0, 0, 0] = 100.0
    return drawn


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual().eval()


def quantize(model: nn.Module, **settings: object) -> Static8:
    calibration = outlying()
    sample = Sample(calibration[0][:1], lambda: iter(calibration))
    quantized = Int8(**settings).apply(copy.deepcopy(model), sample)  # type: ignore[arg-type]
    assert isinstance(quantized, Static8)
    return quantized


def error(model: nn.Module, quantized: nn.Module) -> float:
    pixels = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return float((quantized(pixels) - model(pixels)).square().mean() / model(pixels).square().mean())


@pytest.mark.parametrize("observer", ["percentile", "entropy"])
def test_a_range_without_outliers_rounds_the_rest_better(model: nn.Module, observer: str) -> None:
    assert error(model, quantize(model, observer=observer)) < 0.5 * error(model, quantize(model))


@pytest.mark.parametrize("settings", [{"observer": "entropy"}, {"observer": "mse", "bias_correction": True}])
def test_the_program_computes_the_same_bits(tmp_path: Path, model: nn.Module, settings: dict[str, object]) -> None:
    pixels = outlying(1)[0]
    quantized = quantize(model, **settings)
    call = export(quantized, pixels[:1], tmp_path / "m.pte", check_inputs=[pixels], one_row=True).manifest.main
    assert call.parity is not None
    assert call.parity.max_abs_difference == 0.0
    quantized.write(tmp_path / "graph.pt2", (pixels,))
    assert torch.equal(Static8.read(tmp_path / "graph.pt2")(pixels), quantized(pixels))


def test_auto_takes_the_observer_nearest_the_float_model(model: nn.Module) -> None:
    calibration = outlying()
    quantized = quantize(model, observer="auto")
    chosen, _, compared = quantized.note.partition("observer ")[2].partition(",")
    assert chosen in OBSERVERS[1:]
    assert all(observer in compared for observer in OBSERVERS)
    sample = Sample(calibration[0][:1], lambda: iter(calibration[:6]))  # the last two are held apart
    alone = Int8(observer=chosen).apply(copy.deepcopy(model), sample)  # type: ignore[arg-type]
    assert torch.equal(quantized(calibration[0]), alone(calibration[0]))


def test_auto_makes_do_with_one_batch(model: nn.Module) -> None:
    quantized = Int8(observer="auto").apply(copy.deepcopy(model), Sample.of(outlying(1)[0]))
    assert error(model, quantized) < error(model, Int8().apply(copy.deepcopy(model), Sample.of(outlying(1)[0])))


def test_corrected_biases_keep_the_mean_of_every_output() -> None:
    """Weights far below the largest, on inputs that are not around zero."""
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 4), 2 * torch.rand(512, 16)
    with torch.no_grad():
        layer.weight[0, 0] = 20.0
        expected = layer(x).mean(0)
    batches = Sample(x[:2], lambda: iter(x.split(128)))
    plain, corrected = (
        Int8(per_channel=False, bias_correction=on).apply(copy.deepcopy(layer), batches) for on in (False, True)
    )
    shift, left = ((each(x).mean(0) - expected).abs().max() for each in (plain, corrected))
    assert shift > 0.1
    assert left < 0.2 * shift


def test_layers_that_share_a_bias_get_their_own() -> None:
    torch.manual_seed(0)
    twice = nn.Linear(6, 6)
    model = nn.Sequential(twice, nn.ReLU(), twice).eval()
    x = torch.randn(200, 6)
    quantized = Int8(bias_correction=True).apply(copy.deepcopy(model), Sample.of(x))
    assert isinstance(quantized, Static8)
    first, second = (bias for name, bias in quantized.graph.named_parameters() if "corrected" in name)
    assert not torch.equal(first, second)
    assert (quantized(x).mean(0) - model(x).mean(0)).abs().max() < 2e-3


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.up, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids))
        return self.head(torch.softmax(self.up(x.flip(1)), -1)).mean(1)


def test_what_stays_in_floating_point_is_named() -> None:
    torch.manual_seed(0)
    ids = torch.randint(20, (8, 5))
    quantized = Int8(skip=("up",)).apply(Attending().eval(), Sample.of(ids))
    assert Int8().note(quantized) == ("in floating point: table (embedding), up (linear), 1 x layer_norm, 1 x softmax")


def test_nothing_stays_in_floating_point_of_convolutions(model: nn.Module) -> None:
    assert quantize(model).note == "nothing stays in floating point"


@pytest.mark.parametrize("settings", [{"observer": "mse"}, {"bias_correction": True}])
def test_a_target_with_its_own_quantizer_keeps_its_observers(settings: dict[str, object]) -> None:
    with pytest.raises(EdgetuneError, match="int8 for target ethos-u has its own observers"):
        Int8(target="ethos-u", **settings).apply(nn.Linear(2, 2), Sample.of(torch.randn(2, 2)))  # type: ignore[arg-type]


def test_percentile_leaves_out_the_outermost_values() -> None:
    counts = torch.zeros(2048)
    counts[256:768] = 1000.0  # from -0.5 to 0.5
    counts[-1] = 1.0
    low, high = percentile_range(counts, torch.tensor(-1.0), torch.tensor(3.0))
    torch.testing.assert_close((low, high), (torch.tensor(-0.5), torch.tensor(0.5)), atol=5e-3, rtol=0)


@pytest.mark.parametrize("relu", [False, True])
def test_entropy_clips_far_tails_and_does_not_mind_zeros(relu: bool) -> None:
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    values = torch.cat([values, torch.tensor([-40.0, 40.0])])
    values = values.clamp_min(0) if relu else values
    least, largest = values.aminmax()
    low, high = entropy_range(torch.histc(values, 2048), least, largest)
    assert 3 < high < 8
    assert low == 0 if relu else -8 < low < -3


def test_mse_rounds_with_less_error_than_the_whole_range() -> None:
    torch.manual_seed(0)
    values = torch.distributions.Laplace(0.0, 1.0).sample((200_000,))

    def squared_error(name: Observer) -> float:
        observer = observer_for(name)(dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_affine)
        observer(values)
        scale, zero = observer.calculate_qparams()
        rounded = torch.fake_quantize_per_tensor_affine(values, float(scale), int(zero), -128, 127)
        return float((rounded - values).square().mean())

    assert squared_error("mse") < 0.95 * squared_error("minmax")


class Several(nn.ModuleList):
    """The outputs of several models."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(model(x) for model in self)


class Activated(nn.Module):
    """One activation after a convolution, a depthwise one, a sum, a pooling and a linear."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point, self.pool, self.last = nn.Conv2d(8, 8, 1), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.activation = activation
        for parameter in self.parameters():
            parameter.data *= 3  # beyond what clamps pass

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.activation(self.stem(pixels))
        x = self.activation(self.point(self.activation(self.depth(x))) + x)
        x = self.last(self.activation(self.pool(x)))
        return self.head(self.activation(self.hidden(x.mean((2, 3)))))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "modules": (nn.ReLU(), nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(), nn.SiLU(), nn.Hardswish()),
    "functions": (F.relu, F.relu6, lambda x: F.relu6(x, inplace=True), F.hardtanh, F.silu, F.hardswish),
    "clamps": (
        lambda x: x.clamp(0, 2.5), lambda x: x.clamp(min=0), lambda x: x.clip(max=1.0), lambda x: x.clamp_(-1.0, 0.5),
        lambda x: x.clamp_min(0.25), lambda x: torch.clamp(x, max=3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_int8_computes_activations_as_its_program_does(tmp_path: Path, kind: str) -> None:
    """XNNPACK's clamp has one scale: with two, as `F.relu6` had, the program was wrong by whole steps."""
    torch.manual_seed(0)
    several = Several([Activated(activation) for activation in ACTIVATIONS[kind]])
    pixels = torch.randn(24, 3, 8, 8)
    quantized = Int8().apply(several, Sample(pixels[:1], lambda: iter([pixels])))
    call = export(quantized, pixels[:1], tmp_path / "x.pte", check_inputs=[pixels], one_row=True).manifest.main
    assert call.parity is not None
    assert call.parity.max_abs_difference == 0.0
