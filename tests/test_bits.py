"""bits: allocations by Fisher information, what they claim, and what they are compared with."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgetune as et
from edgetune.core.apply import apply
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.numbers import MIB
from edgetune.core.technique import Sample
from edgetune.export import export
from edgetune.quant.allocation import BYTES, LayerBits, Width, allocate, allocate_at_random, allocate_uniformly
from edgetune.quant.bits import Bits
from edgetune.quant.sensitivity import fisher_information
from edgetune.quant.size import stored_bytes, weight_bits
from support.laws import bert, llama, mlp, tokens

torch.set_num_threads(1)


class Words(nn.Module):
    """A table, linears of several widths, a head that shares the table's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 64, padding_idx=0)
        self.up, self.down, self.odd = nn.Linear(64, 256), nn.Linear(256, 40), nn.Linear(40, 64)
        self.head = nn.Linear(64, 60, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.odd(self.down(self.up(self.table(ids)).relu())))
        return y


def words() -> Words:
    torch.manual_seed(0)
    return Words().eval()


def ids(rows: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(0, 60, (rows, 6), generator=torch.Generator().manual_seed(seed))


def sample(batches: int = 6) -> Sample:
    return Sample(ids(1), lambda: iter([ids(seed=n) for n in range(batches)]))


def bits_of(model: nn.Module) -> dict[str, int | None]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    return {name: weight_bits(layer.weight) for name, layer in layers.items()}


@pytest.mark.parametrize(
    "limit",
    [{"average_bits": 4.6}, {"average_bits": 6}, {"average_bits": 6, "embeddings": "int8"}, {"average_bits": 20},
     {"size_mib": 0.03}, {"size_mib": 0.05}, {"average_bits": 6, "score": "output"},
     {"allocation": {"*": "int8", "up": "int4", "down": "float"}}],
    ids=str,
)  # fmt: skip
def test_what_an_allocation_claims_is_stored(limit: dict[str, Any]) -> None:
    for build, batch in ((words, ids), (bert, tokens), (llama, tokens)):
        if build is not words and ("size_mib" in limit or "allocation" in limit):
            continue
        data = Sample(batch(), lambda batch=batch: iter([batch()]))  # type: ignore[misc]
        technique, model = Bits(**limit), build()
        allocation = technique.resolve(model, data)
        assert bits_of(model) == dict.fromkeys(bits_of(model)), "nothing has changed"
        apply(model, technique, data)
        assert stored_bytes(model) == pytest.approx(allocation.size_bytes, rel=0.02)
        if technique.size_mib:
            assert stored_bytes(model) <= technique.size_mib * MIB
        if technique.average_bits and technique.embeddings == "auto":
            assert allocation.average_bits <= technique.average_bits
            assert allocation.average_bits > 0.8 * min(technique.average_bits, 8)
        stored: dict[Width, int | None] = {"int4": 4, "int4-channel": 4, "int8": 8, "float": None}
        assert bits_of(model) == {name: stored[width] for name, width in allocation.widths().items()}


def test_a_head_tied_to_its_table_is_stored_once_in_8_bits() -> None:
    data = Sample(tokens(), lambda: iter([tokens()]))
    pair = ("lm_head", "model.embed_tokens")
    for limit in ({"average_bits": 7.5}, {"allocation": {"*": "int4", "lm_head": "int8", "*.embed_tokens": "int8"}}):
        model = llama(tied=True)
        technique = Bits(algorithm="mse", **limit)
        allocation = technique.resolve(model, data)
        assert {allocation.widths()[name] for name in pair} == {"int8"}
        apply(model, technique, data)
        assert stored_bytes(model) == allocation.size_bytes
    assert bits_of(apply(llama(tied=True), Bits(average_bits=4.6, algorithm="mse"), data))["lm_head"] == 4
    apart = {"allocation": {"*": "int4", "lm_head": "int8"}}
    model = llama(tied=True)
    allocation = Bits(algorithm="mse", **apart).resolve(model, data)
    apply(model, Bits(algorithm="mse", **apart), data)
    assert stored_bytes(model) == allocation.size_bytes


def test_an_allocation_is_read_back() -> None:
    model, data = words(), sample()
    allocation = Bits(average_bits=6).resolve(model, data)
    mapping = allocation.to_mapping()
    again = Bits(allocation=mapping).resolve(model, data)
    assert again.widths() == allocation.widths()
    assert again.size_bytes == allocation.size_bytes
    assert str(allocation).startswith(f"allocation: {allocation.average_bits:.2f} bits on average: ")
    assert all(f" {choice.layer}: " in str(allocation) for choice in allocation.choices)
    assert Bits(average_bits=6).resolve(model, data) == allocation, "seeded"


def test_the_fisher_information_is_the_expected_squared_gradient() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(5, 3)
    expected = torch.zeros(4, 3)
    for row, label in itertools.product(range(5), range(3)):
        logits = model(x[row])
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor(label)), model[0].weight)
        expected += logits.softmax(-1)[label].detach() * gradient.square() / 5
    drawn = fisher_information(model, {"0": model[0]}, [x] * 400, seed=1)["0"]
    torch.testing.assert_close(drawn, expected, rtol=0.2, atol=0.05 * float(expected.max()))
    assert model[0].weight.requires_grad
    assert model[0].weight.grad is None


def test_the_information_of_one_value_is_that_of_a_normal() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 1)), torch.randn(50, 3)
    drawn = fisher_information(model, {"0": model[0]}, [x] * 100, seed=1)["0"]
    torch.testing.assert_close(drawn, x.square().mean(0, keepdim=True), rtol=0.15, atol=0.0)


def test_padded_tokens_do_not_count() -> None:
    model, batch = llama(), tokens()
    padded = {name: F.pad(value, (0, 3)) for name, value in batch.items()}  # type: ignore[union-attr]
    layers: Any = {"head": model.get_submodule("lm_head")}
    torch.testing.assert_close(
        fisher_information(model, layers, [padded], 0)["head"], fisher_information(model, layers, [batch], 0)["head"]
    )


def menu(losses: dict[str, dict[Width, float]]) -> dict[str, list[LayerBits]]:
    sizes: dict[Width, int] = {"int4-channel": 8, "int4": 9, "int8": 16, "float": 64}
    return {n: [LayerBits(n, False, w, 16, sizes[w], loss) for w, loss in of.items()] for n, of in losses.items()}


def test_bits_go_to_the_layers_that_need_them() -> None:
    losses: dict[str, dict[Width, float]] = {
        name: {"int4-channel": 2 * loss, "int4": loss, "int8": loss / 200, "float": 0.0}
        for name, loss in (("a", 1.0), ("b", 50.0), ("c", 3.0))
    }
    best = allocate(menu(losses), {BYTES: 35 + 100}, {BYTES: 100})
    assert [choice.width for choice in best] == ["int4", "int8", "int4"]
    tried = itertools.product(*menu(losses).values())
    within = [sum(c.loss for c in choices) for choices in tried if sum(c.size_bytes for c in choices) <= 35]
    assert sum(choice.loss for choice in best) == min(within)
    assert [choice.width for choice in allocate_uniformly(menu(losses), {BYTES: 35})] == ["int4"] * 3
    random = [allocate_at_random(menu(losses), {BYTES: 35}, seed) for seed in range(8)]
    assert all(30 <= sum(choice.size_bytes for choice in choices) <= 35 for choices in random)
    assert len(set(random)) > 2
    with pytest.raises(EdgetuneError, match=r"no allocation of bits.*allowed: size_mib from 1\.0") as caught:
        allocate(menu(losses), {BYTES: 23.0}, {BYTES: MIB})
    assert caught.value.exit_code == Exit.BUDGET


def sensitive() -> nn.Module:
    """Three equal layers side by side; the outputs of the second count a hundred times."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(64, 4, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = 0.1 * self.a(x) + 10 * self.b(x) + 0.1 * self.c(x)
            return y

    torch.manual_seed(1)
    return Three().eval()


def test_a_layer_that_counts_gets_8_bits_and_the_model_loses_less() -> None:
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(2))
    data = Sample(x[:1], lambda: iter(x.split(30)))
    allocation = Bits(average_bits=6.1).resolve(sensitive(), data)
    assert allocation.widths()["b"] in ("int8", "float")
    ours, uniform, random, wide, narrow = allocation.compared
    names = ("this", "uniform", "random", "all in 8 bits", "all in 4 bits")
    assert (ours.name, uniform.name, random.name, wide.name, narrow.name) == names
    assert ours.kl < 0.2 * min(uniform.kl, random.kl)
    assert ours.size_bytes == allocation.size_bytes
    assert narrow.size_bytes < ours.size_bytes < wide.size_bytes
    assert max(wide.kl, ours.kl) < 0.2 * narrow.kl
    assert "KL divergence on held-out batches, weights rounded to nearest: this (" in allocation.summary()
    relative = Bits(average_bits=6.1, score="output").resolve(sensitive(), data)
    assert relative.widths()["b"] != "float", "outputs alone do not say which layer counts"


def test_all_in_8_and_4_bits_are_what_rounding_every_layer_so_gives() -> None:
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(2))
    data = Sample(x[:1], lambda: iter(x.split(30)))
    *_, wide, narrow = Bits(average_bits=6.1).resolve(sensitive(), data).compared
    held_out = torch.cat(x.split(30)[8:])
    with torch.no_grad():
        expected = sensitive()(held_out).log_softmax(-1)
    for measured, width in ((wide, "int8"), (narrow, "int4")):
        model = apply(sensitive(), Bits(allocation={"*": width}, algorithm="mse"), data)
        with torch.no_grad():
            logits = model(held_out).log_softmax(-1)
        assert measured.kl == pytest.approx(float(F.kl_div(logits, expected, log_target=True, reduction="batchmean")))
        assert measured.size_bytes == stored_bytes(model)


def test_a_tied_head_is_stored_once_in_8_bits_and_apart_in_4() -> None:
    data = Sample(tokens(), lambda: iter([tokens()]))
    technique = Bits(average_bits=6, algorithm="mse")
    model = llama(tied=True)
    for measured, width in zip(technique.resolve(model, data).compared[-2:], ("int8", "int4"), strict=True):
        uniform = apply(llama(tied=True), Bits(allocation={"*": width}, algorithm="mse"), data)  # type: ignore[dict-item]
        assert measured.size_bytes == pytest.approx(stored_bytes(uniform), rel=0.02)
    apply(model, technique, data)
    widths = technique.bit_widths(model)
    assert sum(layer.share_pct for layer in widths.layers) < 100
    bits = {layer.layer: layer.bits for layer in widths.layers}
    assert bits["model.layers.0.mlp.down_proj"] in (4.5, 4.25, 5.0, 8.5, 9.0)


def test_its_program_computes_what_the_model_does(tmp_path: Path) -> None:
    model = apply(
        words(), Bits(allocation={"*": "int4", "up": "int4-channel", "head": "int8", "odd": "float"}), sample()
    )
    artifact = export(model, ids(1), tmp_path / "model.pte", check_inputs=[ids()], one_row=True)
    assert artifact.manifest.main.parity is not None
    parity = artifact.manifest.main.parity
    assert parity.max_relative_difference is not None
    assert parity.max_relative_difference < 0.02, "ties of rounding activations"


def test_a_written_width_that_does_not_fit_is_named() -> None:
    model = words()
    with pytest.warns(UserWarning, match=r"bits: odd: .*8 bits instead of 4") as caught:
        apply(model, Bits(allocation={"*": "int4"}, algorithm="mse"))
    assert caught[0].filename == __file__
    assert bits_of(model) == {"table": 4, "up": 4, "down": 4, "odd": 8, "head": 4}


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(64, 4), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y


def test_a_layer_that_nothing_depends_on_is_named() -> None:
    x = torch.randn(20, 64)
    with pytest.warns(UserWarning, match="bits: idle: no calibration batch reaches these layers") as caught:
        model = apply(Idle().eval(), Bits(average_bits=7), Sample.of(x))
    assert caught[0].filename == __file__
    assert bits_of(model) == {"used": 8, "idle": 4}


class TwoOutputs(Idle):
    """Logits and boxes, as of a detector."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.used(x), self.idle(x)


def test_a_layer_of_another_output_than_the_logits_keeps_8_bits() -> None:
    with pytest.warns(UserWarning, match="bits: idle: the logits do not depend on these layers.*get 8 bits"):
        model = apply(TwoOutputs().eval(), Bits(average_bits=7), Sample.of(torch.randn(20, 64)))
    assert bits_of(model) == {"used": 4, "idle": 8}


def test_a_limit_that_cannot_be_met_is_answered_in_its_unit() -> None:
    narrow = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20)).eval()  # 8 bits at least
    with pytest.raises(EdgetuneError, match=r"average_bits: no allocation[\s\S]*got 6\.0; allowed: from 9\.") as error:
        apply(narrow, Bits(average_bits=6), Sample.of(torch.randn(20, 20)))
    assert error.value.exit_code == Exit.BUDGET
    least = float(str(error.value).split("from ")[1].splitlines()[0])
    apply(narrow, Bits(average_bits=least), Sample.of(torch.randn(20, 20)))


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({}, sample(), "give one of average_bits, size_mib and allocation"),
        ({"latency_ms": 1}, sample(), "latency_ms and device go together"),
        ({"latency_ms": 1, "device": "pixel-8"}, sample(), "the times of layers on a device are needed"),
        ({"average_bits": 5, "size_mib": 1}, sample(), "give one of"),
        ({"allocation": {"nothing": "int4"}}, sample(), "allocation: the pattern matches no layer: got 'nothing'"),
        ({"allocation": {"*": "int3"}}, sample(), "allocation.*int4"),
        ({"average_bits": 5}, None, "needs example inputs"),
        ({"average_bits": 5}, Sample(ids(), lambda: iter([])), "no calibration batches"),
        ({"average_bits": 5}, Sample(ids(), lambda: iter([ids()[:0]])), "no rows"),
        ({"size_mib": 0.01}, sample(), "allowed: size_mib from 0.0"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], data: Sample | None, message: str) -> None:
    model = words()
    with pytest.raises(EdgetuneError, match=message):
        apply(model, Bits(**settings), data)
    assert bits_of(model) == dict.fromkeys(bits_of(model))


@pytest.mark.parametrize(("score", "values"), [("fisher", "outputs of the model"), ("output", "inputs of these")])
def test_inputs_that_are_not_finite_are_an_error(score: str, values: str) -> None:
    x = torch.randn(20, 32)
    x[3] = torch.nan
    with pytest.raises(EdgetuneError, match=f"the {values} .*not finite on the calibration batches"):
        apply(mlp(), Bits(average_bits=6, score=score), Sample.of(x))  # type: ignore[arg-type]


@pytest.mark.parametrize("score", ["fisher", "output"])
def test_batches_that_the_model_does_not_take_are_an_error(score: str) -> None:
    with pytest.raises(EdgetuneError, match="does not run on its calibration batches"):
        apply(mlp(), Bits(average_bits=6, score=score), Sample.of(torch.randn(20, 31)))  # type: ignore[arg-type]


def test_a_model_without_gradients_is_refused_and_has_output_errors() -> None:
    class Detached(Words):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).detach()

    with pytest.raises(EdgetuneError, match=r"no gradients[\s\S]*score: output"):
        apply(Detached().eval(), Bits(average_bits=6), sample())
    assert 4 in bits_of(apply(Detached().eval(), Bits(average_bits=6, score="output"), sample())).values()


def test_a_run_says_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.checkpoints import run_steps

    monkeypatch.chdir(tmp_path)
    bits = "bits: {average_bits: 5, latency_ms: 100, device: pixel-8}"
    row = run_steps(f"train: {{updates: 2, batch_size: 8}}, {bits}").rows[-1]
    assert row.step == "bits"
    assert "bits on average: " in row.note
    assert " ms predicted; KL divergence on the calibration batches, for want of others" in row.note
    assert "uniform (" in row.note
    assert row.widths is not None
    assert [one.name for one in row.widths.measured][-2:] == ["all in 8 bits", "all in 4 bits"]
    assert not row.widths.held_out
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert 'id="plot-widths-2"' in page
    assert "KL divergence on the calibration batches, nats" in page
    import yaml

    text = Path("run/allocation.yaml").read_text(encoding="utf-8")
    assert re.search(r"int\S+ +bert.encoder.layer.0.output.dense: [\d,]+ bytes, [\d.e-]+ ms, loss", text)
    written = yaml.safe_load(text)
    assert set(written["allocation"].values()) <= {"int4", "int4-channel", "int8", "float"}
    widths = {"int4": 4, "int4-channel": 4, "int8": 8, "float": None}
    common = widths[written["allocation"].pop("*")]
    expected = {name: widths[width] for name, width in written["allocation"].items()}
    stored = bits_of(et.open_run("run").model)
    assert stored == dict.fromkeys(stored, common) | expected


def times(model: nn.Module, device: str) -> dict[str, float]:
    """4 bits per channel are twice as fast as all others; a program of them takes 7 + 4 x 1 ms."""
    assert device == "pixel-8"
    layers: Any = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    fast = {n: bits == 4 and layers[n].weight.block_size[1] > 32 for n, bits in bits_of(model).items() if n in layers}
    return {"": 7.0} | {f"{name}.sub": 1.0 if is_fast else 2.0 for name, is_fast in fast.items()}


def test_a_time_is_a_limit_too() -> None:
    data = Sample(ids(1), sample().batches, layers_ms=times)
    wide = Bits(latency_ms=15, device="pixel-8").resolve(words(), data)
    assert wide.latency_ms == 15
    assert {c.width for c in wide.choices} <= {"int8", "float"}
    fast = Bits(latency_ms=13, device="pixel-8", average_bits=20).resolve(words(), data)
    assert fast.latency_ms <= 13
    assert sum(choice.width == "int4-channel" for choice in fast.choices if not choice.is_table) == 2
    assert "13 ms predicted" in fast.summary()
    with pytest.raises(EdgetuneError, match=r"latency_ms.: 11.*allowed: latency_ms from 12.000"):
        Bits(latency_ms=11, device="pixel-8").resolve(words(), data)
