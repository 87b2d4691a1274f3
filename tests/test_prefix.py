"""The cached prefix: the same losses and gradients, the same bits whatever the cache held, other ways to run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgetune.core.errors import EdgetuneError
from edgetune.data.dataset import Split
from edgetune.data.rows import Rows
from edgetune.tasks.image_classification import ImageClassification
from edgetune.tasks.text_classification import TextClassification
from edgetune.train.prefix.cache import PrefixCache
from edgetune.train.prefix.rows import Form, blank_template, bytes_of, fill_template, tensor_of
from support.laws import bert, mlp
from support.prefixes import (
    MODELS,
    ROWS,
    Arrays,
    Counting,
    Pair,
    Writing,
    close,
    fit,
    gradients,
    seeded,
    sparse,
    texts,
    trained_bits,
    words,
)

torch.set_num_threads(1)

# The same losses and gradients


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_without_a_cache(name: str, tmp_path: Path) -> None:
    make, split, kind = MODELS[name]
    model = make()
    indices = [9, 2, 13, 4]
    expected = gradients(model, split, indices, kind, None)
    with PrefixCache.open(model, split, folder=tmp_path) as cache:
        first = gradients(model, split, indices, kind, cache)
        again = gradients(model, split, indices, kind, cache)
    close(expected, first, 1e-5)
    assert first[0] == again[0]
    assert all(torch.equal(value, again[1][key]) for key, value in first[1].items())


def test_half_precision_is_bounded_and_takes_half_the_room(tmp_path: Path) -> None:
    model, split = sparse(bert(3)), texts()
    expected = gradients(model, split, [9, 2, 13, 4], TextClassification(), None)
    with PrefixCache.open(model, split, folder=tmp_path / "32") as whole:
        exact = kept_values(whole, split, 13)
    with PrefixCache.open(model, split, folder=tmp_path / "16", dtype="fp16") as cache:
        close(expected, gradients(model, split, [9, 2, 13, 4], TextClassification(), cache), 1e-2)
        rounded = kept_values(cache, split, 13)
        assert cache.report.mib - ROWS * 32 / 2**20 == pytest.approx((whole.report.mib - ROWS * 32 / 2**20) / 2)
    assert not torch.equal(exact, rounded)
    assert ((exact - rounded).abs() <= exact.abs() / 2048 + 2**-24).all()


def kept_values(cache: PrefixCache, split: Any, row: int) -> Tensor:
    """What the cache gives for one row."""
    inputs, _ = split.batch([row])
    return cache.kept.load({**inputs} if isinstance(inputs, dict) else {0: inputs}, [row])[0]


def test_frozen_stages_run_once_for_each_row_and_then_no_more(tmp_path: Path) -> None:
    model, split = sparse(bert(3)), texts()
    inside = Counting(
        model, "bert.embeddings.LayerNorm", "bert.encoder.layer.0.attention", "bert.encoder.layer.1.output"
    )
    trained = Counting(model, "bert.encoder.layer.2.attention.self")
    with PrefixCache.open(model, split, folder=tmp_path, chunk_rows=4) as cache:
        fit(model, split, cache, epochs=1)
        first, after = inside.count, trained.count
        fit(model, split, cache, epochs=1)
        report = cache.report
    assert inside.count == first > 0
    assert trained.count == after + 4
    assert (report.rows, report.hits + report.misses) == (ROWS, 2 * ROWS)
    assert report.misses <= 4  # one in each chunk brings the others
    assert report.stages_skipped == ("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1")
    assert (report.boundary, report.first_trained) == ("bert.encoder.layer.1", "bert.encoder.layer.2")


# The same bits, whatever the cache held


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_training_ends_with_the_same_bits_on_an_empty_a_full_and_a_partly_filled_cache(
    dtype: str, tmp_path: Path
) -> None:
    expected = trained_bits(tmp_path / "a", dtype=dtype)
    assert trained_bits(tmp_path / "a", dtype=dtype) == expected
    trained_bits(tmp_path / "b", seed=3, epochs=1, dtype=dtype)  # filled in another order
    assert trained_bits(tmp_path / "b", dtype=dtype) == expected
    (cache,) = (entry for entry in (tmp_path / "b").iterdir() if entry.is_dir())
    with (cache / "rows.bin").open("r+b") as file:  # the first rows were never kept
        file.write(bytes(32 * 5))
    assert trained_bits(tmp_path / "b", dtype=dtype) == expected
    with_cache, without = sparse(bert(3)), sparse(bert(3))
    with PrefixCache.open(with_cache, texts(), folder=tmp_path / "a", chunk_rows=4) as reused:
        losses = fit(with_cache, texts(), reused)
    assert losses == pytest.approx(fit(without, texts(), None), rel=1e-4)


def test_weights_that_train_do_not_matter_and_frozen_ones_do(tmp_path: Path) -> None:
    model = sparse(bert(3))
    with PrefixCache.open(model, texts(), folder=tmp_path) as cache:
        fit(model, texts(), cache, epochs=1)
    with PrefixCache.open(model, texts(), folder=tmp_path) as cache:  # its head and last block have moved on
        fit(model, texts(), cache, epochs=1)
        assert (cache.report.computed, cache.report.misses) == (0, 0)
        kept = kept_values(cache, texts(), 5)
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.0.output.dense.bias").add_(0.1)
    with PrefixCache.open(model, texts(), folder=tmp_path) as cache:
        assert cache.report.computed > 0
        assert not torch.equal(kept_values(cache, texts(), 5), kept)


def test_rows_that_changed_since_are_computed_again(tmp_path: Path) -> None:
    # row 8 is none of those that tell one data set from another
    model = sparse(bert(3))
    with PrefixCache.open(model, Sampled(), folder=tmp_path) as cache:
        before = kept_values(cache, Sampled(), 8)
    with PrefixCache.open(model, Sampled(changed=8), folder=tmp_path) as cache:
        assert cache.report.computed == 0
        after = kept_values(cache, Sampled(changed=8), 8)
        assert cache.report.misses == 1
    assert not torch.equal(before, after)


class Sampled(Split):
    """Forty rows, so that not all of them are looked at when a cache is opened."""

    def __init__(self, changed: int | None = None) -> None:
        rows = [[3 + (7 * n + 5 * k) % 44 for k in range(2 + n % 9)] for n in range(40)]
        if changed is not None:
            rows[changed][0] += 1
        super().__init__(TextClassification(), Rows(rows, [n % 3 for n in range(40)]), words)


# Other ways to run a model


def test_stages_that_write_in_place_and_tuples_and_tables(tmp_path: Path) -> None:
    for kind, width in ((Writing, 32), (Pair, 8)):
        model, split = sparse(seeded(kind)), Arrays(width)
        expected = gradients(model, split, [3, 8, 1], ImageClassification(), None)
        with PrefixCache.open(model, split, folder=tmp_path) as cache:
            close(expected, gradients(model, split, [3, 8, 1], ImageClassification(), cache), 1e-5)
            assert "table" not in cache.report.stages_skipped


def test_outside_of_rows_and_after_closing_the_model_is_as_ever(tmp_path: Path) -> None:
    model, split = sparse(bert(3)).eval(), texts()
    inputs, _ = split.batch([4, 7])
    other, _ = split.batch([0])
    expected = [model(**each).logits for each in (inputs, other)]
    modules = [dict(module.__dict__) for module in model.modules()]
    hooks = [list(module._forward_pre_hooks) for module in model.modules()]
    with PrefixCache.open(model, split, folder=tmp_path) as cache:
        with cache.rows([4, 7]):
            model(**inputs)
        assert torch.equal(model(**other).logits, expected[1])
        for other_model in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.bert.encoder.layer[0]))):
            assert not any("edgetune.train.prefix" in type(m.forward).__module__ for m in other_model.modules())
    assert torch.equal(model(**inputs).logits, expected[0])
    assert [module.__dict__.keys() for module in model.modules()] == [before.keys() for before in modules]
    assert [list(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_a_copy_made_while_the_cache_is_open_runs_on_its_own_weights(tmp_path: Path) -> None:
    model, split = sparse(mlp()), Arrays(32)
    with PrefixCache.open(model, split, folder=tmp_path):
        other = copy.deepcopy(model)
    with torch.no_grad():
        other.stem.weight.zero_()
        assert not torch.equal(other(split.inputs), model(split.inputs))


def test_under_autocast_the_values_keep_their_type(tmp_path: Path) -> None:
    model, split = sparse(mlp()), Arrays(32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, split, [3, 8, 1], ImageClassification(), None)
        with PrefixCache.open(model, split, folder=tmp_path) as cache:
            close(expected, gradients(model, split, [3, 8, 1], ImageClassification(), cache), 1e-2)
            with (
                torch.autocast("cpu", enabled=False),
                pytest.raises(EdgetuneError, match="autocast differs from when") as error,
                cache.rows([0]),
            ):
                model(split.batch([0])[0])
    assert error.value.got == "off"
    with pytest.raises(EdgetuneError, match="was closed"), cache.rows([0]):
        pass


def test_forms_and_nests() -> None:
    form = Form(("rows", 2, "tokens"), torch.float32)
    assert (form.shape(3, 5), form.values(4), form.row_shape(4)) == ((3, 2, 5), 8, (2, 4))
    tensor = torch.arange(30.0).view(3, 2, 5)
    row = form.row(tensor, 1, 2)
    assert torch.equal(row, tensor[1, :, :2])
    assert torch.equal(tensor_of(bytearray(bytes_of(row)), torch.float32, form.row_shape(2)), row)
    template = {"a": (form, None), "b": [Form((4,), torch.int64), "c"]}
    blank = blank_template(template, 3, 5, torch.device("cpu"), whole=False)
    assert blank["a"][0].isnan().all()
    assert blank["a"][0].untyped_storage().nbytes() == 4
    assert (blank["a"][1], blank["b"][0].tolist(), blank["b"][1]) == (None, [0, 0, 0, 0], "c")
    given = fill_template(template, [tensor, row])
    assert given["a"][0] is tensor
    assert given["b"][0] is row


@pytest.fixture(autouse=True)
def _no_stray_files(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob("use-*.lock"))  # every cache was closed
