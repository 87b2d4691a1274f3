"""Several saved adapters as one: by every method against the paper's formula, read by plain peft, and refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgetune as et
from edgetune.adapt.combine import Combined
from edgetune.adapt.deltas import read_deltas
from edgetune.core.errors import EdgetuneError
from support.adapters import change, save_lora
from support.family_cases import small
from support.laws import ATTENTION, BLOCKS, bert, cnn, llama, logits, mlp, tokens, vectors

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # of plain peft


def save(make: Any, technique: et.Technique, folder: Path, seed: int) -> Path:
    """An adapter whose every value moved from its start."""
    torch.manual_seed(seed)
    model = et.apply(make(), technique)
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return et.save_adapter(model, folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    lora = et.LoRA(rank=2, targets=ATTENTION, also_train=("classifier",))
    return [save(bert, lora, folder / "a", 1), save(bert, et.LoRA(rank=2, targets=("*.query",)), folder / "b", 2)]


def loaded(folder: Path, make: Any = bert) -> nn.Module:
    return et.load_adapter(make(), folder)


def by_peft(folder: Path, make: Any = bert) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(make(), str(folder)).eval()


def deltas(folder: Path, make: Any = bert) -> dict[str, Tensor]:
    return dict(read_deltas(folder, make()).tensors)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_one_with_weight_1_and_another_with_weight_0(method: Any, pair: list[Path], tmp_path: Path) -> None:
    combined = et.combine_adapters(bert(), pair, tmp_path, method=method, weights=[1, 0])
    assert combined.error < 1e-6
    close(logits(loaded(tmp_path), tokens()), logits(loaded(pair[0]), tokens()))
    close(logits(by_peft(tmp_path), tokens()), logits(loaded(pair[0]), tokens()))


def test_cat_is_the_weighted_sum_of_what_both_add(pair: list[Path], tmp_path: Path) -> None:
    combined = et.combine_adapters(bert(), pair, tmp_path, method="cat", weights=[0.5, -2])
    assert set(combined.ranks.values()) == {2, 4}  # the second adapts the queries alone
    first, second, both = (deltas(folder) for folder in (*pair, tmp_path))
    assert first.keys() == both.keys() > second.keys()
    for key, added in both.items():
        close(added, 0.5 * first[key] - 2 * second.get(key, torch.zeros(())))
    close(logits(by_peft(tmp_path), tokens()), logits(loaded(tmp_path), tokens()))


def test_svd_is_exact_at_full_rank_and_the_nearest_below(pair: list[Path], tmp_path: Path) -> None:
    whole = et.combine_adapters(bert(), pair, tmp_path / "whole", rank=32)
    assert whole.error < 1e-5
    assert set(whole.ranks.values()) == {32}
    merged = bert()
    assert et.combine_adapters(merged, pair) == Combined(None)
    torch.testing.assert_close(
        logits(loaded(tmp_path / "whole"), tokens()), logits(merged, tokens()), atol=1e-5, rtol=1e-5
    )
    default = et.combine_adapters(bert(), pair, tmp_path / "default")
    assert max(default.ranks.values()) == 4
    assert default.error < 0.01
    part = et.combine_adapters(bert(), pair, tmp_path / "part", rank=3)
    squares, left = 0.0, 0.0
    for name in part.ranks:
        weight = merged.get_submodule(name).get_parameter("weight") - bert().get_submodule(name).get_parameter("weight")
        s = np.linalg.svd(weight.detach().numpy(), compute_uv=False) ** 2
        squares, left = squares + s.sum(), left + s[3:].sum()
    assert part.error == pytest.approx((left / squares) ** 0.5, rel=1e-3)


def thinned(vector: np.ndarray, density: float) -> np.ndarray:
    """The largest values, as TIES trims."""
    kept = np.argsort(-np.abs(vector))[: int(density * len(vector))]
    return np.array([value if i in kept else 0.0 for i, value in enumerate(vector)])


def elected_mean(vectors: list[np.ndarray]) -> np.ndarray:
    """TIES, sections 3.2 and 3.3: the sign of the sum, and the mean of the values that have it."""
    merged = np.zeros_like(vectors[0])
    for i in range(len(merged)):
        values = [vector[i] for vector in vectors]
        sign = np.sign(sum(values))
        agreeing = [value for value in values if value and np.sign(value) == sign]
        merged[i] = np.mean(agreeing) if agreeing else 0.0
    return merged


def test_ties_is_the_formula_of_the_paper(pair: list[Path]) -> None:
    weights, model = [1.0, 0.7], bert()
    et.combine_adapters(model, pair, method="ties", weights=weights, density=0.3)
    first, second = (deltas(folder) for folder in pair)
    for key, tensor in first.items():
        given = [(w, own[key]) for w, own in zip(weights, (first, second), strict=True) if key in own]
        expected = elected_mean([thinned((w * d).flatten().numpy().astype(np.float64), 0.3) for w, d in given])
        added = (model.state_dict()[key] - bert().state_dict()[key]).flatten().numpy()
        np.testing.assert_allclose(added, expected, atol=1e-6)
        assert np.count_nonzero(expected) >= int(0.3 * tensor.numel())


@pytest.mark.parametrize(
    ("method", "theirs", "settings"),
    [
        ("linear", "linear", {}),
        ("cat", "cat", {}),
        ("svd", "svd", {"rank": 5}),
        ("ties", "ties_svd", {"rank": 9, "density": 0.4}),
    ],
)
def test_on_plain_loras_it_is_what_peft_computes(
    method: Any, theirs: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    import peft

    folders = [save_lora(bert(), tmp_path / name, ["query"], seed=n) for n, name in enumerate("ab")]
    model = peft.PeftModel.from_pretrained(bert(), str(folders[0]), adapter_name="a")
    model.load_adapter(str(folders[1]), adapter_name="b")
    more = {"svd_rank": settings.get("rank"), "density": settings.get("density")}
    model.add_weighted_adapter(["a", "b"], [0.6, 0.6], "c", theirs, **more)
    et.combine_adapters(bert(), folders, tmp_path / "out", method=method, weights=[0.6, 0.6], **settings)
    for key, added in deltas(tmp_path / "out").items():
        layer = model.get_submodule(f"base_model.model.{key.removesuffix('.weight')}")
        torch.testing.assert_close(added, layer.get_delta_weight("c").detach(), atol=1e-5, rtol=1e-4)  # type: ignore[operator]


def test_dare_drops_at_random_and_rescales(pair: list[Path]) -> None:
    density, first = 0.25, deltas(pair[0])
    sums, kept = dict.fromkeys(first, torch.zeros(())), []
    for seed in range(40):
        model = bert()
        et.combine_adapters(model, pair[:1], method="dare", density=density, seed=seed)
        for key, delta in first.items():
            added = model.state_dict()[key] - bert().state_dict()[key]
            left = added.abs() > 1e-7
            torch.testing.assert_close(added[left], (delta / density)[left], atol=1e-6, rtol=1e-4)
            kept.append(left.float().mean().item())
            sums[key] = sums[key] + added / 40
    assert np.mean(kept) == pytest.approx(density, abs=0.02)
    for key, delta in first.items():  # unbiased: the standard error of a value is sqrt(3 / 40) of it
        assert (sums[key] - delta).norm() < 2 * (3 / 40) ** 0.5 * delta.norm()


def test_dare_ties_elects_among_what_was_not_dropped(pair: list[Path]) -> None:
    one, again, other = bert(), bert(), bert()
    for model, seed in ((one, 0), (again, 0), (other, 1)):
        state = torch.random.get_rng_state()
        et.combine_adapters(model, pair, method="dare-ties", density=0.5, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in one.state_dict().items())
    first, second = (deltas(folder) for folder in pair)
    differs = False
    for key in second:
        added = one.state_dict()[key] - bert().state_dict()[key]
        a, b = first[key] / 0.5, second[key] / 0.5
        elected = torch.where((a + b) >= 0, 1, -1)
        mean = torch.stack([d * (d.sign() == elected) for d in (a, b)]).sum(0)
        allowed = [
            torch.zeros_like(a),
            a,
            b,
            mean / ((a.sign() == elected).int() + (b.sign() == elected).int()).clamp(1),
        ]
        nearest = torch.stack([(added - option).abs() for option in allowed]).min(0).values
        assert nearest.max() < 1e-6
        differs |= not torch.equal(one.state_dict()[key], other.state_dict()[key])
    assert differs


def test_families_that_peft_cannot_combine(tmp_path: Path) -> None:
    folders = [save(mlp, small("loha"), tmp_path / "loha", 1), save(mlp, small("lokr"), tmp_path / "lokr", 2)]
    first, second = (deltas(folder, mlp) for folder in folders)
    combined = et.combine_adapters(mlp(), folders, tmp_path / "out", weights=[1, 0.5], rank=32)
    assert combined.error < 1e-5
    merged = mlp()
    et.combine_adapters(merged, folders, weights=[1, 0.5])
    for key in first:
        close(merged.state_dict()[key] - mlp().state_dict()[key], first[key] + 0.5 * second[key])
    expected = logits(merged, vectors())
    assert (expected - logits(mlp(), vectors())).abs().max() > 0.02
    torch.testing.assert_close(logits(by_peft(tmp_path / "out", mlp), vectors()), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(
        EdgetuneError, match=r"(?s)within 1% of the adapter has rank .*rank \(rank 4 is off by \d+%, rank 8"
    ):
        et.combine_adapters(mlp(), folders, tmp_path / "out", method="ties", density=0.3)
    with pytest.raises(EdgetuneError, match="linear works on the factors of plain LoRAs"):
        et.combine_adapters(mlp(), folders, tmp_path / "out", method="linear")


def test_dora_and_pefts_starts_and_16_bits(tmp_path: Path) -> None:
    def half() -> nn.Module:
        return mlp().bfloat16()

    folder = save(half, et.LoRA(rank=2, targets=BLOCKS, dora=True), tmp_path / "dora", 1)
    added, exact = deltas(folder, half), deltas(folder, lambda: mlp().bfloat16().float())
    assert all(torch.equal(value, exact[key]) for key, value in added.items())  # not rounded to 16 bits
    combined = et.combine_adapters(half(), [folder], tmp_path / "lora", rank=8)
    assert 0 < combined.error < 0.5


def test_embeddings_and_convolutions_and_a_bias(tmp_path: Path) -> None:
    words = save(llama, et.LoRA(rank=2, targets=("*.embed_tokens", "*.q_proj")), tmp_path / "words", 1)
    et.combine_adapters(llama(), [words], tmp_path / "again")
    close(logits(by_peft(tmp_path / "again", llama), tokens()), logits(loaded(words, llama), tokens()))
    pictures = torch.randn(2, 3, 16, 16)
    stem = save(cnn, et.LoRA(rank=2, targets=("stem", "*.pointwise")), tmp_path / "stem", 1)
    et.combine_adapters(cnn(), [stem], tmp_path / "conv")
    torch.testing.assert_close(
        logits(by_peft(tmp_path / "conv", cnn), pictures), logits(loaded(stem, cnn), pictures), atol=1e-5, rtol=1e-5
    )
    shifted = save(mlp, small("beft"), tmp_path / "beft", 1)
    with pytest.raises(EdgetuneError, match=r"blocks.1.\w+: an adapter changes its bias, which a LoRA cannot"):
        et.combine_adapters(mlp(), [shifted], tmp_path / "none", rank=2)
    norms = save(mlp, small("ln_tuning"), tmp_path / "norms", 1)
    model = mlp()
    et.combine_adapters(model, [shifted, norms])
    torch.testing.assert_close(
        model.get_parameter("blocks.1.up.bias"),
        mlp().get_parameter("blocks.1.up.bias") + deltas(shifted, mlp)["blocks.1.up.bias"],
    )
    assert not torch.equal(model.get_parameter("blocks.1.norm.weight"), mlp().get_parameter("blocks.1.norm.weight"))


def test_over_4_bits_a_lora_is_combined_and_nothing_is_merged(tmp_path: Path) -> None:
    base = et.apply(mlp(), et.NF4(block_size=32))
    folders = [save_lora(mlp(), tmp_path / name, ["up"], seed=n) for n, name in enumerate("ab")]
    with pytest.raises(EdgetuneError, match="stores its weight in few bits"):
        et.combine_adapters(base, folders)
    et.combine_adapters(base, folders, tmp_path / "out", method="cat")
    rounded = et.apply(mlp(), et.Int8Dynamic(), et.Sample.of(vectors()))
    with pytest.raises(EdgetuneError, match="stores its weight in few bits"):
        et.combine_adapters(rounded, folders)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"method": "tie"}, "unknown method to combine adapters: got 'tie'.*did you mean 'ties'"),
        ({"weights": [1]}, "weights: there are 2 adapters"),
        ({"weights": [1, float("nan")]}, "weights: must be finite"),
        ({"weights": [0, 0]}, "not all 0"),
        ({"method": "ties"}, "density: the share of values to keep is above 0"),
        ({"method": "dare", "density": 1.5}, "density: .*got 1.5"),
        ({"density": 0.5}, "density: .* is for ties, dare, dare-ties"),
        ({"method": "cat", "rank": 4}, "rank: cat has the ranks of its adapters"),
        ({"rank": 0}, "rank: must be at least 1"),
        ({"rank": 33}, "query: rank is above the layer's width 32: got 33"),
        ({"folders": []}, "a list of adapters is needed"),
        ({"folders": "a"}, "a list of adapters is needed"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], problem: str, pair: list[Path], tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match=problem):
        et.combine_adapters(bert(), settings.pop("folders", pair), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_fit(pair: list[Path], tmp_path: Path) -> None:
    def refused(problem: str, *folders: Path, model: nn.Module | None = None, **settings: Any) -> None:
        with pytest.raises(EdgetuneError, match=problem):
            et.combine_adapters(model or bert(), folders, tmp_path / "out", **settings)

    refused("holds no adapter_config.json", pair[0], tmp_path / "nowhere")
    refused("for another model", *pair, model=llama())
    refused("for another base", pair[1], model=llama())
    others = [
        change(folder, tmp_path / f"of{n}", {"base_model_name_or_path": f"base{n}"}) for n, folder in enumerate(pair)
    ]
    refused("the adapters are of different bases", *others)
    name = "base_model__model__bert__encoder__layer__0__attention__self__query__lora_A__weight"
    refused("NaN", pair[0], change(pair[1], tmp_path / "nan", **{name: torch.full((2, 32), float("nan"))}))
    wide = save(bert, et.LoRA(rank=4, targets=ATTENTION), tmp_path / "wide", 3)
    refused("linear adds up factors of one rank", pair[0], wide, method="linear")
    many = [save(bert, et.LoRA(rank=20, targets=ATTENTION), tmp_path / f"many{n}", n) for n in range(2)]
    refused("the ranks add up to more than the layer's width 32", *many, method="cat")
    refused("nothing is left of the adapters", pair[0], pair[0], weights=[1, -1])
    with pytest.raises(EdgetuneError, match="linear adds up the factors of LoRAs, and without out there is none"):
        et.combine_adapters(bert(), pair, method="linear")
    refused("already has an adapter", pair[0], model=loaded(pair[0]))
    assert not (tmp_path / "out").exists()
