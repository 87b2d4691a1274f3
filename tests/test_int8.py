"""int8: any number of rows, the very bits of its program, layers left out, fused and computed ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from edgetune.core.errors import EdgetuneError
from edgetune.core.technique import Sample
from edgetune.export import export
from edgetune.quant.int8 import Int8, Static8
from edgetune.quant.integers import Integers
from edgetune.quant.size import parameter_count, stored_bytes


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = F.relu6(self.norm(self.conv(pixels)))
        return self.head(self.drop(hidden.mean((2, 3))))


def batches() -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randn(4, 3, 8, 8) for _ in range(3)]


@pytest.fixture(scope="module")
def static() -> tuple[nn.Module, Static8]:
    torch.manual_seed(0)
    model = Small().eval()
    original = copy.deepcopy(model)
    calibration = batches()
    quantized = Int8().apply(model, Sample({"pixels": calibration[0][:1]}, lambda: iter(calibration)))
    assert isinstance(quantized, Static8)
    return original, quantized


def test_int8_runs_any_number_of_rows_by_position_or_name(static: tuple[nn.Module, Static8]) -> None:
    original, quantized = static
    for rows in (1, 2, 5):
        x = torch.randn(rows, 3, 8, 8)
        with torch.no_grad():
            got, expected = quantized(pixels=x), original(x)
        assert got.shape == (rows, 4)
        assert torch.equal(got, quantized(x))
        assert 0 < (got - expected).abs().max() < 0.1


class Read(nn.Module):
    """A masked mean over words and their positions: padding does not change it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(50, 16), nn.Embedding(32, 16), nn.Linear(16, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])))
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def test_int8_reads_any_number_of_tokens_also_when_stored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Read().eval()
    wide = {"input_ids": torch.randint(50, (6, 12)), "attention_mask": torch.zeros(6, 12, dtype=torch.long)}
    wide["attention_mask"][:, :5] = 1
    quantized = Int8().apply(copy.deepcopy(model), Sample.of(wide))
    assert isinstance(quantized, Static8)
    quantized.write(tmp_path / "graph.pt2", (*wide.values(),))
    for graph in (quantized, Static8.read(tmp_path / "graph.pt2")):
        for tokens in (5, 12, 20):
            fitted = {name: F.pad(tensor, (0, tokens - 12)) for name, tensor in wide.items()}
            expected = model(**fitted)
            assert (graph(**fitted) - expected).abs().max() < 0.02 * expected.abs().max()


def test_int8_survives_train_and_eval(static: tuple[nn.Module, Static8]) -> None:
    _, quantized = static
    x = torch.randn(2, 3, 8, 8)
    before = quantized(x)
    assert torch.equal(quantized.train()(x), before)
    assert quantized.training
    assert torch.equal(quantized.eval()(x), before)


def test_int8_keeps_one_byte_for_a_weight(static: tuple[nn.Module, Static8]) -> None:
    original, quantized = static
    assert parameter_count(quantized) == parameter_count(original)
    weights = 3 * 8 * 9 + 8 * 4
    assert weights < stored_bytes(quantized) < stored_bytes(original)


def test_int8_needs_a_sample() -> None:
    with pytest.raises(EdgetuneError, match="int8 needs example inputs"):
        Int8().apply(Small())


def test_int8_rounds_a_layer_as_whole_numbers_do(static: tuple[nn.Module, Static8]) -> None:
    """The head alone: its sum, its bias in steps of the sum, one multiplication, one rounding."""
    _, quantized = static
    nodes = {node.name: node for node in quantized.graph.graph.nodes}
    head = nodes["linear"]
    source, weight = head.args[:2]
    (output,) = head.users
    x = torch.randn(3, 3, 8, 8)
    seen = {}

    class Watching(Integers):
        def run_node(self, n: fx.Node) -> object:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    Watching(quantized.graph).run(x)
    scale_in, zero_in, scale_out, zero_out = *source.args[1:3], *output.args[1:3]
    integers = quantized.graph.get_buffer(weight.args[0].target).long()
    step = scale_in * quantized.graph.get_buffer(weight.args[1].target)
    bias = quantized.graph.get_parameter(head.args[2].target)
    total = (seen[source.args[0].name].long() - zero_in) @ integers.T + (bias * (1.0 / step)).round().long()
    expected = (total * (step / scale_out)).round().long() + zero_out
    assert torch.equal(seen[output.name].long(), expected.clamp(-128, 127))


class Gated(nn.Module):
    """What MobileNetV3, ShuffleNetV2 and a pose head have beside convolutions: sums, gates, means, enlarging."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.point = nn.Conv2d(16, 16, 1)
        self.wide = nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(self.stem(pixels))
        y = F.relu(self.depth(x))
        gate = F.hardsigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))
        return self.head(self.wide(x + self.point(y * gate)).mean((2, 3)))


@pytest.mark.parametrize("px", [4, 12])
def test_int8_adds_multiplies_and_averages_as_its_program_does(tmp_path: Path, px: int) -> None:
    """With 2 by 2 places many a mean is a half, with 12 by 12 its factor is not exact in floating point."""
    torch.manual_seed(1)
    pixels = torch.randn(60, 3, px, px)
    model = Int8().apply(Gated(), Sample(pixels[:1], lambda: iter([pixels])))
    assert isinstance(model, Static8)
    means = [node for node in model.graph.graph.nodes if node.target == torch.ops.aten.mean.dim]
    (last,) = means[-1].users
    assert px != 4 or last.args[2] % 2 == 1  # with an even zero point it would not matter where a half goes
    call = export(model, pixels[:1], tmp_path / "gated.pte", check_inputs=[pixels], one_row=True).manifest.main
    assert call.parity is not None
    assert call.parity.max_abs_difference == 0.0
    as_written = fx.Interpreter(model.graph).run(pixels)
    assert not torch.equal(as_written, model(pixels))


class Partial(nn.Module):
    """ReXNet's residual: only the first channels get one, so that the others are cut out and change their scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.widen = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.stem(pixels)
        y = self.widen(x)
        return self.head(torch.cat([y[:, :4] + x, y[:, 4:]], 1).mean((2, 3)))


class Padded(nn.Module):
    """TinyViT's windows: what a quantized layer gives is padded for an operator in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(36, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(torch.sigmoid(F.pad(self.stem(pixels), (1, 1, 1, 1))).mean(1).flatten(1))


class Moved(nn.Module):
    """ShuffleNet's shuffle, a slice of one scale, and a picture as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.point, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.stem(pixels).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        x = self.point(torch.cat([x[:, :3], x[:, 5:]], 1))
        return self.head(x.flatten(2).permute(0, 2, 1)).mean(1)


class Split(nn.Module):
    """SHViT's mixer: two slices of one tensor, one of which is computed on in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 3), nn.Linear(8, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        first, rest = self.stem(pixels).split([3, 5], 1)
        return self.head(torch.cat([self.norm(first), rest], 1).mean((2, 3)))


class Block(nn.Module):
    """A ViT's: a class token, and a dropout between a layer and what it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.token = nn.Conv2d(3, 8, 3, 3), nn.Parameter(torch.randn(1, 1, 8))
        self.norm, self.layer, self.drop, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.stem(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.head((x + self.drop(self.layer(self.norm(x))))[:, 0])


@pytest.mark.parametrize("kind", [Partial, Padded, Moved, Split, Block])
def test_int8_values_may_be_cut_reordered_and_padded(tmp_path: Path, kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    pixels = torch.randn(20, 3, 6, 6)
    model = Int8().apply(kind(), Sample(pixels[:1], lambda: iter([pixels])))
    call = export(model, pixels[:1], tmp_path / "partial.pte", check_inputs=[pixels], one_row=True).manifest.main
    assert call.parity is not None
    assert call.parity.max_abs_difference == 0.0


class Enlarged(nn.Module):
    """A segmentation head, whose pictures are enlarged between two roundings."""

    def __init__(self, resizing: dict[str, Any]) -> None:
        super().__init__()
        self.stem, self.head, self.resizing = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 5, 1), resizing

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(F.interpolate(self.stem(pixels), mode="bilinear", **self.resizing)).flatten(2)


@pytest.mark.parametrize(
    "resizing", [{"scale_factor": 2.0}, {"size": (11, 7)}, {"size": (16, 16), "align_corners": True}]
)
def test_int8_pictures_are_enlarged_as_the_program_does(tmp_path: Path, resizing: dict[str, Any]) -> None:
    """After a doubling every value is so many sixteenths of a step: many a half."""
    torch.manual_seed(0)
    pixels = torch.randn(20, 3, 16, 16)
    model = Int8().apply(Enlarged(resizing), Sample(pixels[:1], lambda: iter([pixels])))
    call = export(model, pixels[:1], tmp_path / "enlarged.pte", check_inputs=[pixels], one_row=True).manifest.main
    assert call.parity is not None
    assert call.parity.max_abs_difference == 0.0


class Branches(nn.Module):
    """RepVGG's block: a convolution and a pointwise one beside it, which it can make one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.fused = False

    def switch_to_deploy(self) -> None:
        with torch.no_grad():
            self.wide.weight[:, :, 1:2, 1:2] += self.point.weight
            self.wide.bias += self.point.bias
        del self.point
        self.fused = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(x) if self.fused else self.wide(x) + self.point(x)


@pytest.mark.parametrize(("skip", "convolutions"), [((), 1), (("*.wide",), 1), (("*.point",), 2)])
def test_int8_rounds_fused_branches_once(skip: tuple[str, ...], convolutions: int) -> None:
    """But for one whose branch is to stay in floating point."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("block", Branches())
    pixels = torch.randn(8, 3, 6, 6)
    quantized = Int8(skip=skip).apply(model, Sample(pixels[:1], lambda: iter([pixels])))
    assert isinstance(quantized, Static8)
    found = [node for node in quantized.graph.graph.nodes if node.target == torch.ops.aten.conv2d.default]
    assert len(found) == convolutions
    assert hasattr(model.block, "point")


def test_int8_skips_the_layers_it_is_told_to() -> None:
    torch.manual_seed(0)
    model, calibration = Small().eval(), batches()
    sample = Sample(calibration[0], lambda: iter(calibration))
    whole, part = (Int8(skip=skip).apply(copy.deepcopy(model), sample) for skip in ((), ("*.head",)))
    spared = 8 * 4 * 3 - 4 * (4 + 8)  # three bytes more for each weight, without the scales and zero points
    assert stored_bytes(part) - stored_bytes(whole) == spared
    logits = part(calibration[0])
    assert len(logits.unique()) == logits.numel()  # not on a grid of 256 steps

    with pytest.raises(EdgetuneError, match="skip: the pattern matches no layer: got 'haed'"):
        Int8(skip=("haed",)).apply(model, sample)


class Standardized(nn.Conv2d):
    def standard(self) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.standard(), self.bias)


def _convolved(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("kind", ["standardized", "weight norm", "weight norm, old", "spectral norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_int8_of_a_computed_weight_is_that_of_the_plain_layer(kind: str) -> None:
    torch.manual_seed(0)
    pictures = torch.randn(8, 4, 12, 12)
    layer = {
        "standardized": lambda: Standardized(4, 8, 3, padding=1),
        "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3, padding=1)),
        "weight norm, old": lambda: nn.utils.weight_norm(nn.Conv2d(4, 8, 3, padding=1)),
        "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 8, 3, padding=1)),
    }[kind]()
    model = _convolved(layer).eval()
    plain = nn.Conv2d(4, 8, 3, padding=1)
    with torch.no_grad():
        model(pictures)  # old weight norm works its weight out here
        plain.weight.copy_(layer.standard() if kind == "standardized" else layer.weight)
        plain.bias.copy_(layer.bias)
    expected = _convolved(plain).eval()
    expected[1:].load_state_dict(model[1:].state_dict())
    torch.testing.assert_close(expected(pictures), model(pictures), atol=1e-5, rtol=1e-5)
    ours, theirs = (Int8().apply(each, Sample.of(pictures)) for each in (model, expected))
    torch.testing.assert_close(ours(pictures), theirs(pictures), atol=0, rtol=0)
    assert stored_bytes(ours) == stored_bytes(theirs)


class OfItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maker, self.head = nn.Linear(4, 8 * 4), nn.Linear(8, 3)
        self.by = Multiplied()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.by(x, self.maker(x.mean(0)).view(8, 4)))


class Multiplied(nn.Module):
    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight)


def test_int8_refuses_a_weight_that_is_computed_from_the_inputs() -> None:
    torch.manual_seed(0)
    with pytest.raises(EdgetuneError, match="by multiplies by a weight that it computes from its inputs"):
        Int8().apply(OfItsInput().eval(), Sample.of(torch.randn(6, 4)))


class Indexed(nn.Module):
    """Picks columns by an index that it computes, as transformers does for its masks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x[:, torch.arange(x.shape[1]) + 0])


def test_an_index_that_is_computed_stays_whole_under_int8() -> None:
    torch.manual_seed(0)
    model, x = Indexed().eval(), torch.randn(4, 6)
    expected = model(x)
    quantized = Int8().apply(model, Sample.of(x))
    torch.testing.assert_close(quantized(x), expected, atol=0.05, rtol=0.05)
