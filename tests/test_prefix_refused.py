"""What the cached prefix refuses, and leaves the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from edgetune.adapt.prompt import Prompt
from edgetune.adapt.sherl import SHERL
from edgetune.core.apply import apply
from edgetune.core.errors import EdgetuneError
from edgetune.core.technique import Sample
from edgetune.sparse.update import SparseUpdate
from edgetune.train.prefix.cache import PrefixCache
from support.laws import bert, cnn, llama, mlp, tokens
from support.prefixes import (
    Arrays,
    Centred,
    Skip,
    close,
    fit,
    freeze,
    seeded,
    sparse,
    texts,
)

torch.set_num_threads(1)

# What is refused, and leaves the model as it was


def refused(model: nn.Module, split: Any, folder: Path, match: str) -> EdgetuneError:
    """Opening raises, and the model is as it was."""
    model.train()
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    with pytest.raises(EdgetuneError, match=match) as error:
        PrefixCache.open(model, split, folder=folder)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    return error.value


def test_dropout_in_the_prefix_is_refused_and_named(tmp_path: Path) -> None:
    model = freeze(bert(3), "bert.embeddings", "bert.encoder.layer.0")
    error = refused(model, texts(), tmp_path, r"draws random numbers: bert\.embeddings\.dropout")
    assert "sparse-update" in error.action
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for block in model.bert.encoder.layer:  # also kept as a number
        block.attention.self.attention_dropout = 0.0
        if hasattr(block.attention.self, "dropout_prob"):
            block.attention.self.dropout_prob = 0.0
    PrefixCache.open(model, texts(), folder=tmp_path).close()


def test_a_prefix_put_into_eval_mode_by_hand_is_taken_as_it_is(tmp_path: Path) -> None:
    model = freeze(bert(3), "bert.embeddings", "bert.encoder.layer.0").train()
    model.bert.embeddings.eval()
    model.bert.encoder.layer[0].eval()
    expected = gradients_by_hand(model, None)
    with PrefixCache.open(model, texts(), folder=tmp_path) as cache:
        close(expected, gradients_by_hand(model, cache), 1e-5)


def gradients_by_hand(model: Any, cache: PrefixCache | None) -> Any:
    inputs, labels = texts().batch([1, 12])
    model.zero_grad()
    torch.manual_seed(0)
    if cache is None:
        logits = model(**inputs).logits
    else:
        with cache.rows([1, 12]):
            logits = model(**inputs).logits
    loss = functional.cross_entropy(logits, labels)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_batch_statistics_in_the_prefix_are_refused(tmp_path: Path) -> None:
    model = freeze(cnn(), "stem", "norm", "blocks.0")
    refused(model, Arrays(3, 16, 16), tmp_path, r"changes its buffers: norm, blocks\.0\.norm1")


def test_a_skip_connection_across_the_boundary_is_refused_even_if_it_adds_nothing(tmp_path: Path) -> None:
    error = refused(
        sparse(seeded(Skip)), Arrays(32), tmp_path, r"something reads the outputs of the stages before blocks\.1"
    )
    assert "leave cache_prefix out" in error.action


def test_rows_that_meet_are_refused(tmp_path: Path) -> None:
    refused(sparse(seeded(Centred)), Meeting(), tmp_path, "depends on its batch or its padding")


class Meeting(Arrays):
    """Many rows, so that those of the check do not stand in one chunk."""

    def __init__(self) -> None:
        super().__init__(32)
        self.inputs = torch.randn(70, 32, generator=torch.Generator().manual_seed(9))

    def __len__(self) -> int:
        return 70


def test_nothing_frozen_at_the_front_is_refused(tmp_path: Path) -> None:
    refused(mlp(), Arrays(32), tmp_path, "nothing is frozen before the first stage that trains: got 'stem'")
    refused(sparse(mlp(), "bias"), Arrays(32), tmp_path, "nothing is frozen")
    refused(mlp().requires_grad_(False), Arrays(32), tmp_path, "nothing trains")


def test_augmented_rows_are_refused(tmp_path: Path) -> None:
    refused(sparse(mlp()), Arrays(32, noise=0.1), tmp_path, "the inputs of a row are not the same each time")


def test_rows_that_begin_to_change_are_refused(tmp_path: Path) -> None:
    model, split = sparse(mlp()), Arrays(32)
    with PrefixCache.open(model, split, folder=tmp_path) as cache:
        fit(model, split, cache, epochs=1)
        split.inputs[3] += 1
        with pytest.raises(EdgetuneError, match="the inputs of row 3 change"):
            fit(model, split, cache, epochs=1)


def test_other_inputs_than_those_of_the_rows_are_refused(tmp_path: Path) -> None:
    model, split = sparse(bert(3)), texts()
    inputs, _ = split.batch([1, 2])
    with PrefixCache.open(model, split, folder=tmp_path) as cache:
        with pytest.raises(EdgetuneError, match="4 tokens wide, and the longest row has more"), cache.rows([1, 3]):
            model(**inputs)
        with (
            pytest.raises(EdgetuneError, match="the attention mask does not fit the rows' lengths"),
            cache.rows([2, 1]),
        ):
            model(**inputs)
        with pytest.raises(EdgetuneError, match=r"input_ids is \(2, 4\) instead of \(3, 4\)"), cache.rows([1, 2, 0]):
            model(**inputs)
        with pytest.raises(EdgetuneError, match="attention_mask is missing"), cache.rows([1, 2]):
            model(input_ids=inputs["input_ids"])
        flipped = {name: value.flip(1) for name, value in inputs.items()}
        with pytest.raises(EdgetuneError, match="pad on the right"), cache.rows([1, 2]):
            model(**flipped)
        swapped = {"input_ids": inputs["input_ids"] + 1, "attention_mask": inputs["attention_mask"]}
        with pytest.raises(EdgetuneError, match="the inputs of row 1 change"), cache.rows([1, 2]):
            model(**swapped)
        with torch.no_grad(), cache.rows([1, 2]):  # and goes on working
            assert torch.isfinite(model(**inputs).logits).all()


def test_values_too_large_for_fp16_are_refused(tmp_path: Path) -> None:
    model = sparse(mlp())
    with torch.no_grad():
        model.stem.bias += 1e6  # type: ignore[union-attr]
    with pytest.raises(EdgetuneError, match="too large for fp16") as error:
        PrefixCache.open(model, Arrays(32), folder=tmp_path, dtype="fp16")
    assert error.value.action == "set cache_dtype to fp32"
    PrefixCache.open(model, Arrays(32), folder=tmp_path).close()


@pytest.fixture(autouse=True)
def _no_stray_files(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob("use-*.lock"))  # every cache was closed


def test_adapters_that_reach_across_the_prefix(tmp_path: Path) -> None:
    head, sample = SparseUpdate(scheme={"*": "frozen", "classifier": "full"}), Sample.of(tokens())
    beside = apply(bert(4), [head, SHERL(width=4)], sample)
    refused(beside, texts(), tmp_path, match="reads the outputs of the stages before bert.encoder.layer.2")
    before = apply(llama(), Prompt(kind="prefix", tokens=2))
    refused(before, texts(causal=True), tmp_path, match="the inputs differ in more than one size")
