from __future__ import annotations

import pytest
from torch import nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import matches, refuse_shared, replace, select
from support.laws import llama, mlp


def test_patterns_choose_in_the_models_order_and_skip_takes_away() -> None:
    model = mlp()
    chosen = select(model, ["*.down", "blocks.*.up"], ["blocks.1.*"], nn.Linear)
    assert list(chosen) == ["blocks.0.up", "blocks.0.down", "blocks.2.up", "blocks.2.down"]
    assert chosen["blocks.2.up"] is model.get_submodule("blocks.2.up")


def test_a_pattern_means_whole_names() -> None:
    assert not matches("my_query", ["*.query"])
    assert not matches("encoder.query.lora", ["*.query"])
    assert matches("stem", ["*.stem"])


@pytest.mark.parametrize(
    ("include", "skip", "what"),
    [
        (["blocks.0.up", "*.uqp"], [], r"targets.*'\*\.uqp'"),
        (["blocks.0.up"], ["*.nothing"], r"skip.*'\*\.nothing'"),
        (["blocks.0.up"], ["*.up"], "also skipped"),
        ([], [], "no pattern"),
        ("blocks.0.up", [], "list"),
        (["blocks.0.norm"], [], "matches no layer"),  # there, but no linear
    ],
)
def test_what_matches_nothing_raises(include: list[str], skip: list[str], what: str) -> None:
    with pytest.raises(EdgetuneError) as caught:
        select(mlp(), include, skip, nn.Linear)
    assert caught.match(what)


def test_the_error_names_the_near_layer() -> None:
    with pytest.raises(EdgetuneError, match=r"did you mean 'classifier'"):
        select(mlp(), ["clasifier"])


def test_shared_weights_are_refused() -> None:
    tied, free = llama(tied=True), llama()
    with pytest.raises(EdgetuneError, match=r"lm_head shares its weight with model\.embed_tokens"):
        refuse_shared(tied, {"lm_head": tied.lm_head})
    refuse_shared(free, {"lm_head": free.lm_head})


def test_replace_puts_the_new_layer_in_its_place() -> None:
    model, new = mlp(), nn.Identity()
    replace(model, "blocks.1.up", new)
    replace(model, "stem", new)
    assert model.get_submodule("blocks.1.up") is new
    assert model.stem is new
