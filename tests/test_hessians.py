"""Calibration: the sums of x x' that GPTQ needs, block by block, and samples that cannot give them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, call, logits_of
from edgetune.core.technique import Sample
from edgetune.quant.hessians import _plan_stages, calibrate
from support.families import FAMILIES
from support.laws import bert, llama, logits, mlp, tokens, vectors

torch.set_num_threads(1)


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def sums_at_once(model: nn.Module, batches: list[Inputs], names: set[str]) -> dict[str, Tensor]:
    """By hooks on all layers in whole passes, padding counted."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, torch.zeros(())) + x.t() @ x

        return add

    handles = [layer.register_forward_pre_hook(hook(n)) for n, layer in linears_of(model).items() if n in names]
    with torch.no_grad():
        for batch in batches:
            call(model, batch)
    for handle in handles:
        handle.remove()
    return sums


def collected(model: nn.Module, batches: list[Inputs]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    idle = calibrate(model, linears_of(model), batches, sums.__setitem__)
    assert set(idle) == linears_of(model).keys() - sums.keys()
    return sums


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class InPlace(nn.Module):
    """Writes into what a block returned, and into what it will read."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.head = nn.ModuleList([Step() for _ in range(4)]), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x).mul_(2).add_(x)
        return self.head(x)


class Skips(nn.Module):
    """A U-Net's connections: early outputs are read late, and a layer runs between the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.ModuleList([Step(), Step()]), nn.ModuleList([Step(), Step()])
        self.between = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for step in self.down:
            x = step(x)
            kept.append(x)
        x = self.between(x)
        for step in self.up:
            x = step(x + kept.pop())
        return x


class Backwards(nn.Module):
    """Runs its blocks from the last, and one layer of another twice."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.shared = nn.ModuleList([Step() for _ in range(3)]), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for step in reversed(self.steps):
            x = self.shared(step(x))
        return x


class Averaged(nn.Module):
    """What each block returned is read at once for an average that a head reads at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.head = nn.ModuleList([Step() for _ in range(3)]), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        means = []
        for step in self.steps:
            x = step(x)
            means.append(x.mean(1))
        return self.head(torch.stack(means).sum(0))


class Named(nn.Module):
    """Blocks that take and return mappings by name."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([self.Block() for _ in range(3)])

    class Block(Step):
        def forward(self, *, state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:  # type: ignore[override]
            return {"x": super().forward(state["x"]) * scale, "count": state["count"] + 1}

    def forward(self, x: Tensor) -> Tensor:
        state = {"x": x, "count": torch.zeros(())}
        for step in self.steps:
            state = step(state=state, scale=2.0)
        return state["x"]


def numbers(seed: int = 0) -> Tensor:
    return torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(seed))


def seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@pytest.mark.parametrize(
    "kind",
    [InPlace, Skips, Averaged, Backwards, Named, Step, lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))],
)
def test_blocks_give_the_sums_of_whole_passes(kind: Callable[[], nn.Module]) -> None:
    model, batches = seeded(kind), [numbers(n) for n in range(3)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sums = collected(model, batches)  # type: ignore[arg-type]
    expected = sums_at_once(model, batches, set(sums))  # type: ignore[arg-type]
    assert sums.keys() == linears_of(model).keys()
    for name, total in sums.items():
        torch.testing.assert_close(total, expected[name], rtol=1e-4, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "name", ["ModernBERT", "DistilBERT", "T5-small", "Llama", "Gemma 3", "MobiLlama", "OLMoE", "Mamba",
             "Whisper decoder", "CLIP"],
)  # fmt: skip
def test_families_give_the_sums_of_whole_passes(name: str) -> None:
    family = FAMILIES[name]
    model = family.made()
    batches = [dict(family.inputs(rows)) for rows in (2, 3)]  # type: ignore[arg-type]
    for batch in batches:
        batch |= {"attention_mask": torch.ones_like(batch["input_ids"])} if "attention_mask" in batch else {}
    sums = collected(model, batches)  # type: ignore[arg-type]
    expected = sums_at_once(model, batches, set(sums))  # type: ignore[arg-type]
    assert sums.keys() == expected.keys()
    for layer, total in sums.items():
        scale = float(expected[layer].abs().max())
        torch.testing.assert_close(total / scale, expected[layer] / scale, rtol=0, atol=1e-4)


def test_padding_does_not_count() -> None:
    model, ids = bert(), tokens()["input_ids"]  # type: ignore[index, call-overload]
    mask = (torch.arange(10)[None] < torch.tensor([10, 7, 4, 1])[:, None]).long()
    sums = collected(model, [{"input_ids": ids, "attention_mask": mask}])
    alone: dict[str, Tensor] = {}
    for row, length in enumerate((10, 7, 4, 1)):
        batch: Inputs = {"input_ids": ids[row : row + 1, :length]}
        for name, total in sums_at_once(model, [batch], set(sums)).items():
            alone[name] = alone.get(name, torch.zeros(())) + total
    for name, total in sums.items():
        torch.testing.assert_close(total, alone[name], rtol=1e-3, atol=1e-2)


def test_a_layer_sees_what_the_quantized_layers_before_it_compute() -> None:
    model, order = mlp(), []
    layers, original = linears_of(model), mlp()
    seen: dict[str, Tensor] = {}

    def halve(name: str, hessian: Tensor) -> None:
        order.append(name)
        seen[name] = hessian
        layers[name].weight = nn.Parameter(layers[name].weight / 2)

    assert calibrate(model, layers, [vectors()], halve) == []
    assert order == ["stem", *(f"blocks.{n}.{part}" for n in range(3) for part in ("up", "down")), "classifier"]
    for names in (["stem", "blocks.0.up", "blocks.0.down"], ["blocks.1.up", "blocks.1.down"],
                  ["blocks.2.up", "blocks.2.down"], ["classifier"]):  # fmt: skip
        for name, total in sums_at_once(original, [vectors()], set(names)).items():
            torch.testing.assert_close(seen[name], total, rtol=1e-4, atol=1e-4)
        for name in names:
            layer = original.get_submodule(name)
            layer.weight = nn.Parameter(layer.weight / 2)  # type: ignore[operator]


def test_only_what_is_read_later_is_stored() -> None:
    for model, batch, expected in (
        (bert(layers=4), tokens(), [True, True, True]),
        (llama(), tokens(), [True]),
        (seeded(Skips), numbers(), [False, False, False]),
        (seeded(InPlace), numbers(), [False, False, False]),
        (seeded(Averaged), numbers(), [False, False]),
    ):
        plan = _plan_stages(model, linears_of(model), batch)
        assert plan.passed_on[:-1] == expected


# int4 by GPTQ


def correlated(rows: int, seed: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(32, 32, generator=torch.Generator().manual_seed(9)) * (torch.arange(1, 33) ** -0.7)
    return torch.randn(rows, 32, generator=draw) @ directions.t()


@pytest.mark.parametrize("group_size", [32, "channel"])
def test_a_model_loses_less_by_gptq_on_rows_that_it_has_not_seen(group_size: Any) -> None:
    sample, unseen = Sample.of(correlated(200)), correlated(100, seed=4)
    errors = {}
    for algorithm in ("absmax", "gptq"):
        plain, model = mlp(), et.apply(mlp(), et.Int4(group_size=group_size, algorithm=algorithm), sample)
        errors[algorithm] = float((logits(model, unseen) - logits(plain, unseen)).norm())
        again = et.apply(mlp(), et.Int4(group_size=group_size, algorithm=algorithm), sample)
        assert torch.equal(logits(model, unseen), logits(again, unseen))
    assert errors["gptq"] < 0.75 * errors["absmax"]


def test_auto_is_gptq_with_a_sample_and_absmax_without() -> None:
    def codes(technique: et.Int4, sample: Sample | None) -> Tensor:
        weight: Any = et.apply(mlp(), technique, sample).get_submodule("blocks.1.up").weight
        return weight.qdata

    sample = Sample.of(correlated(50))
    assert torch.equal(codes(et.Int4(), sample), codes(et.Int4(algorithm="gptq"), sample))
    assert torch.equal(codes(et.Int4(), None), codes(et.Int4(algorithm="absmax"), sample))
    assert not torch.equal(codes(et.Int4(), sample), codes(et.Int4(), None))
    assert not torch.equal(codes(et.Int4(algorithm="mse"), None), codes(et.Int4(), None))
    with pytest.raises(EdgetuneError, match="int4 needs example inputs"):
        et.apply(mlp(), et.Int4(algorithm="gptq"))


def test_as_many_batches_are_read_as_were_asked_for() -> None:
    numbered = count()

    def batches() -> Iterator[Inputs]:
        for _ in range(9):
            next(numbered)
            yield correlated(4)

    et.apply(mlp(), et.Int4(calibration_batches=3), Sample(correlated(1), batches))
    assert next(numbered) == 3


def is_unchanged(model: nn.Module, plain: nn.Module) -> bool:
    trained = all(parameter.requires_grad for parameter in model.parameters())
    state = plain.state_dict()
    return trained and all(
        type(value) is Tensor and torch.equal(value, state[name]) for name, value in model.state_dict().items()
    )


SAMPLES: dict[str, tuple[Sample, str]] = {
    "no batch": (Sample(correlated(2), lambda: iter(())), "there are no calibration batches"),
    "no row": (Sample(correlated(2), lambda: iter([correlated(0)])), "there are no calibration batches"),
    "NaN": (
        Sample.of(correlated(8).index_fill(0, torch.tensor([3]), torch.nan)),
        "not finite on the calibration batches: stem",
    ),
    "infinite": (Sample.of(correlated(8) * torch.inf), "not finite on .*: stem"),
    "another width": (Sample.of(torch.randn(4, 7)), r"does not run on its calibration batches \(RuntimeError: mat1"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_that_cannot_calibrate_is_refused_and_nothing_changes(name: str) -> None:
    sample, message = SAMPLES[name]
    model = mlp()
    with pytest.raises(EdgetuneError, match=rf"int4.*{message}"):
        et.apply(model, et.Int4(), sample)
    assert is_unchanged(model, mlp())
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())


def test_activations_that_overflow_late_leave_the_first_blocks_as_they_were() -> None:
    model = mlp()
    with torch.no_grad():
        model.blocks[2].norm.bias.fill_(3e38)  # type: ignore[index, union-attr, operator]
    plain = mlp()
    plain.load_state_dict(model.state_dict())
    with pytest.raises(EdgetuneError, match=r"not finite on the calibration batches: blocks\.2\.up"):
        et.apply(model, et.Int4(), Sample.of(correlated(20)))
    assert is_unchanged(model, plain)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("technique", [et.Int4(algorithm="absmax"), et.Int4(algorithm="gptq"), et.Int8Dynamic()])
def test_weights_that_no_scale_fits_are_refused(value: float, technique: et.Technique) -> None:
    model = mlp()
    with torch.no_grad():
        model.blocks[1].down.weight[2, 3] = value  # type: ignore[index, union-attr, operator]
    with pytest.raises(EdgetuneError, match=r"blocks\.1\.down: a weight is NaN or infinite[\s\S]*skip"):
        et.apply(model, technique, Sample.of(correlated(4)))
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_a_layer_that_no_batch_reaches_is_rounded_to_nearest_and_named() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.other = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor, other: bool = False) -> Tensor:
            return self.other(x) if other else self.body(x)

    model = seeded(Optional)
    with pytest.warns(UserWarning, match="int4: other: no calibration batch reaches these layers") as caught:
        et.apply(model, et.Int4(), Sample.of(correlated(20)))
    assert caught[0].filename == __file__
    expected: Any = et.apply(seeded(Optional), et.Int4(algorithm="absmax")).get_submodule("other").weight
    weight: Any = model.get_submodule("other").weight
    assert torch.equal(weight.qdata, expected.qdata)


@pytest.mark.parametrize("group_size", [32, "channel"])
def test_odd_samples_and_layers_still_quantize(group_size: Any) -> None:
    model, x = mlp(), correlated(30)
    with torch.no_grad():
        model.blocks[0].up.weight.zero_()  # type: ignore[index, union-attr, operator]
        model.blocks[1].norm.weight[:8] = 0.0  # type: ignore[index, union-attr, operator]  # inputs that are constant
        model.blocks[1].norm.bias[:4] = 0.0  # type: ignore[index, union-attr, operator]  # and four that are 0
    for sample in (Sample.of(x[:1]), Sample.of(x), Sample(x[:1], lambda: iter([x[:3], x[:0], x[3:10]]))):
        quantized = mlp()
        quantized.load_state_dict(model.state_dict())
        et.apply(quantized, et.Int4(group_size=group_size), sample)
        expected, values = logits(model, x), logits(quantized, x)
        assert torch.isfinite(values).all()
        assert (values - expected).norm() < 0.4 * expected.norm()
        weight: Any = quantized.get_submodule("blocks.0.up").weight
        assert not weight.dequantize().any()


def test_torchs_encoder_is_calibrated_off_its_fast_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    names = {"layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="int4: .*in_proj_weight: these weights do not belong")
        et.apply(model, et.Int4(skip=("*.out_proj",)), Sample.of(correlated(12).view(3, 4, 32)))
    assert {n for n, m in linears_of(model).items() if type(m.weight) is not nn.Parameter} == names
    assert torch.isfinite(logits_of(model(correlated(8).view(2, 4, 32)))).all()


def test_the_mode_and_the_random_state_stay() -> None:
    model = mlp().train()
    state = torch.get_rng_state()
    et.apply(model, et.Int4(), Sample.of(correlated(10)))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
