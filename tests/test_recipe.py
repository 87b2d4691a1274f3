"""Recipes: round trips, overrides, every error at once with its line, order rules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.registry import STEPS, TECHNIQUES
from edgetune.profile import device
from edgetune.recipe import recipe
from edgetune.recipe.document import MOST_BYTES
from edgetune.recipe.outline import outline
from edgetune.recipe.overrides import parse_overrides
from edgetune.recipe.recipe import Recipe

TEXT = """\
name: mine
model: {source: minilm, max_length: 32}
data: tweets
steps:
  - sparse-update
  - lora: {rank: 4, targets: ["*.query"]}
  - train: {learning_rate: 1e-3}
  - prune: {ratio: 0.3}
  - train: {distill: {teacher: prune}}
  - int4:
export: {target: xnnpack}
profile: {devices: [pixel-8]}
budget: {device: pixel-8, latency_ms: 20}
variants:
  smoke: {train.epochs: null, train.updates: 4, data.train_rows: 64}
"""
TOP = "name, description, seed, model, data, steps, export, profile, budget, variants"


def parsed(text: str = TEXT, *changes: str) -> Recipe:
    return recipe.parse(text, "mine.yaml", parse_overrides(changes))


def complaint(text: str = TEXT, *changes: str) -> str:
    with pytest.raises(EdgetuneError) as caught:
        parsed(text, *changes)
    assert caught.value.exit_code == 2
    return str(caught.value)


def settings(found: Recipe, name: str) -> list[Any]:
    return [step.settings for step in found.steps if step.name == name]


# What a good recipe gives


def test_values_arrive() -> None:
    found = parsed()
    assert [step.name for step in found.steps] == ["sparse-update", "lora", "train", "prune", "train", "int4"]
    assert (found.model.source, found.model.max_length, found.data.source, found.seed) == ("minilm", 32, "tweets", 0)
    assert settings(found, "lora")[0].rank == 4
    assert settings(found, "train")[0].learning_rate == 1e-3  # PyYAML itself would give text
    assert found.budget[0].latency_ms == 20


@pytest.mark.parametrize("change", ["export=", "export=null"])
def test_a_recipe_without_export(change: str) -> None:
    assert parsed(TEXT, change, "budget=[]").export is None
    with pytest.raises(EdgetuneError, match=r"line 13, budget\.latency_ms: nothing in the recipe provides") as caught:
        parsed(TEXT, change)
    assert "add export, and pixel-8 under profile.devices" in str(caught.value)


def test_an_unknown_target_is_found_before_any_work() -> None:
    with pytest.raises(EdgetuneError, match=r"export\.target: unknown target: got 'xnpack'.*did you mean 'xnnpack'"):
        parsed(TEXT.replace("target: xnnpack", "target: xnpack"))


TALKING = TEXT.replace("model: {source: minilm, max_length: 32}", "model: {source: smollm2, max_length: 32}").replace(
    "data: tweets", "data: conversations"
)


def test_a_language_program_is_compared_on_few_texts_unless_told() -> None:
    assert parsed().export == recipe.ExportSettings(target="xnnpack", language=False)
    found = parsed(TALKING, "export.language=true").export
    assert found is not None
    assert (found.language, found.max_tokens, found.rows_to_check(100)) == (True, 512, 8)
    assert parsed(TALKING, "export.language=true", "export.check_rows=20").export.rows_to_check(100) == 20
    assert [recipe.ExportSettings().rows_to_check(available) for available in (30, 3000)] == [30, 500]
    again = parsed(TALKING, "export.language=true", "export.max_tokens=64")
    assert recipe.from_plain(again.resolve()) == again


@pytest.mark.parametrize(
    ("text", "changes", "told"),
    [
        (TEXT, ["export.language=true"], "minilm is not a causal language model, so its program cannot generate text"),
        (
            TALKING,
            ["export.max_tokens=64"],
            "max_tokens is the cache size of a text-generation program, but language is false",
        ),
        (TALKING, ["export.language=true", "export.max_tokens=1"], "must be at least 2"),
        (TALKING, ["export.language=yes"], "must be true or false"),
    ],
)
def test_a_program_that_cannot_talk_is_found_before_any_work(text: str, changes: list[str], told: str) -> None:
    found = complaint(text, *changes)
    assert told in found
    assert "export" in found.partition(told)[0]


def test_resolved_is_the_same_recipe() -> None:
    found = parsed()
    assert recipe.parse(found.to_yaml(), "other.yaml") == found
    assert recipe.from_plain(found.resolve()) == found
    assert yaml.safe_load(found.to_yaml()) == found.resolve()


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parsed().seed = 3


def test_name_comes_from_the_file() -> None:
    assert parsed(TEXT.replace("name: mine\n", "")).name == "mine"


def test_digest_changes_with_results_only() -> None:
    plain = parsed().digest
    assert parsed(TEXT.replace("name: mine", "name: mine\ndescription: words")).digest == plain
    assert parsed(TEXT.replace("smoke", "quick")).digest == plain
    assert parsed(TEXT, "seed=0").digest == plain
    changes = ("seed=1", "lora.rank=5", "data.train_rows=100", "train[2].learning_rate=2e-3", "export.check_rows=7")
    for change in changes:
        assert parsed(TEXT, change).digest != plain, change


def test_plan_shows_the_implied_finalizing() -> None:
    planned = [(p.step, p.name) for p in outline(parsed())]
    assert planned == [
        (1, "sparse-update"),
        (2, "lora"),
        (3, "train"),
        (None, "finalize"),
        (4, "prune"),
        (5, "train"),
        (6, "int4"),
        (None, "export"),
        (None, "verify"),
        (None, "profile"),
        (None, "budget"),
    ]
    assert outline(parsed())[3].detail.startswith("lora, sparse-update")
    explicit = parsed(TEXT.replace("  - prune:", "  - finalize\n  - prune:"))
    assert [p.step for p in outline(explicit) if p.name == "finalize"] == [4]


@pytest.mark.parametrize("name", recipe.packaged_recipes())
def test_golden_recipes_and_their_variants(name: str) -> None:
    found = recipe.load(name)
    assert found.name == name
    assert found.description
    assert "smoke" in found.variants
    smoke = recipe.load(name, {"variant": "smoke"})
    assert smoke.digest != found.digest
    assert recipe.parse(smoke.to_yaml(), "again.yaml") == smoke


# Overrides


def test_overrides_reach_one_step_or_all() -> None:
    assert [t.batch_size for t in settings(parsed(TEXT, "train.batch_size=7"), "train")] == [7, 7]
    assert [t.batch_size for t in settings(parsed(TEXT, "train[2].batch_size=7"), "train")] == [32, 7]
    assert [t.batch_size for t in settings(parsed(TEXT, "steps.3.batch_size=7"), "train")] == [7, 32]
    assert [t.batch_size for t in settings(parsed(TEXT, "steps[5].train.batch_size=7"), "train")] == [32, 7]


@pytest.mark.parametrize(
    ("change", "read_back"),
    [
        ("seed=7", lambda r: r.seed == 7),
        ("model.max_length=16", lambda r: r.model.max_length == 16),
        ("data.train_rows=9", lambda r: r.data.train_rows == 9),
        ("data=csv:rows.csv", lambda r: r.data.source == "csv:rows.csv"),
        ("data.source=csv:a=b.csv", lambda r: r.data.source == "csv:a=b.csv"),
        ("lora.targets=['*.key', '*.value']", lambda r: settings(r, "lora")[0].targets == ("*.key", "*.value")),
        ("train[2].distill.weight=0.25", lambda r: settings(r, "train")[1].distill.weight == 0.25),
        ("train[1].distill.teacher=lora", lambda r: settings(r, "train")[0].distill.teacher == "lora"),
        ("budget.size_mib=3", lambda r: (r.budget[0].size_mib, r.budget[0].latency_ms) == (3, 20)),
        ("budget.1.latency_ms=3", lambda r: r.budget[0].latency_ms == 3),
        ("profile.devices=[host, pixel-8]", lambda r: r.profile.devices == ("host", "pixel-8")),
    ],
)
def test_override(change: str, read_back: Any) -> None:
    found = parsed(TEXT, change)
    assert read_back(found), found


def test_explicit_overrides_win_over_the_variant() -> None:
    found = parsed(TEXT, "variant=smoke", "train[2].updates=9")
    assert [t.updates for t in settings(found, "train")] == [4, 9]
    assert found.data.train_rows == 64


def test_overrides_leave_the_given_mapping_alone() -> None:
    given = {"lora.targets": ["*.key"]}
    recipe.parse(TEXT, "mine.yaml", given)
    assert given == {"lora.targets": ["*.key"]}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            "trian.epochs=2",
            "override trian.epochs=2: no such field or step: got 'trian'; allowed: sparse-update, lora, train, prune, "
            "int4, name, description, seed, model, data, steps, export ... and 3 more; did you mean 'train'?",
        ),
        (
            "train[3].epochs=2",
            "override train[3].epochs=2: no such step train; they are numbered from 1: got 'train[3]'; "
            "allowed: train[1], train[2]; did you mean 'train[2]'?",
        ),
        (
            "lora.rank=eight",
            "mine.yaml, step 2 (override lora.rank=eight), lora.rank: must be a whole number: got 'eight'",
        ),
        ("variant=smok", "override variant: no such variant: got 'smok'; allowed: smoke; did you mean 'smoke'?"),
        ("epochs", "an override has the form key=value: got 'epochs'\n  next: for example train.epochs=2"),
        ("seed.x=1", "mine.yaml, override seed.x=1, seed: must be a whole number: got {'x': 1}"),
        ("seed=[1", "override seed=[1, line 1, column 3: not YAML: while parsing a flow sequence expected ',' or ']', "
         "but got '<stream end>'\n  next: close each [ with ]"),
    ],
)  # fmt: skip
def test_override_errors(change: str, text: str) -> None:
    assert complaint(TEXT, change) == text


# Errors


def test_every_error_at_once() -> None:
    text = """\
model: {max_length: "32"}
data: {source: tweets, train_row: 3}
sed: 1
steps:
  - lroa
  - lora: {rank: 2.5, targets: ["*"]}
  - {lora: {}, train: {}}
  - train: {distill: {teacher: prunes}}
budget: {device: pixel-99}
"""
    fields = truncate_list(type(parsed().data).model_fields)
    steps = truncate_list([*TECHNIQUES, *STEPS])
    assert (
        complaint(text)
        == f"""\
mine.yaml: 10 errors:
mine.yaml, line 1, model.source: is missing
mine.yaml, line 1, model.max_length: must be a whole number: got '32'
mine.yaml, line 2, data.train_row: unknown field: got 'train_row'; allowed: {fields}; did you mean 'train_rows'?
mine.yaml, line 3, sed: unknown field: got 'sed'; allowed: {TOP}; did you mean 'seed'?
mine.yaml, step 1 (line 5): unknown step: got 'lroa'; allowed: {steps}; \
did you mean 'lora'?
mine.yaml, step 2 (line 6), lora.rank: must be a whole number: got 2.5
mine.yaml, step 3 (line 7): a step is one name with its settings: got ['lora', 'train']
  next: write `- name`, or `- name: {{setting: value}}`; a dash before every step
mine.yaml, step 4 (line 8), train.distill.teacher: the teacher is the model just before an earlier step: \
got 'prunes'; allowed: lora
mine.yaml, line 9, budget: limits nothing: allowed: latency_ms, size_mib, train_memory_mib, peak_memory_mib
  next: give at least one of them
mine.yaml, line 9, budget.device: unknown device: got 'pixel-99'; \
allowed: {truncate_list((*device.device_ids(), "host"))}; did you mean 'pixel-9'?"""
    )


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("name: mine", "name: ../mine", "mine.yaml, line 1, name: must look like"),
        ("minilm,", "minilmm,", "mine.yaml, line 2, model.source: unknown model: got 'minilmm'"),
        ("tweets", "twets", "mine.yaml, line 3, data.source: unknown data: got 'twets'"),
        ("rank: 4", 'rank: "4"', "mine.yaml, step 2 (line 6), lora.rank: must be a whole number: got '4'"),
        ("rank: 4", "rank: true", "mine.yaml, step 2 (line 6), lora.rank: must be a whole number: got True"),
        ("rank: 4", "rank: 0", "mine.yaml, step 2 (line 6), lora.rank: must be "),
        ("lora: {rank: 4, ", "lora: {rnak: 4, ", "did you mean 'rank'?"),
        ("prune: {ratio: 0.3}", "prune: 0.3", "mine.yaml, step 4 (line 8), prune: settings must be a mapping: got 0.3"),
        ("ratio: 0.3", "ratio: .nan", "mine.yaml, line 8, steps.4.prune.ratio: a number must be finite"),
        ("teacher: prune", "teacher: int4", "got 'int4'; allowed: sparse-update, lora, train, prune"),
        ("[pixel-8]", "pixel-8", "line 12, profile.devices: must be a list, as in ['pixel-8']: got 'pixel-8'"),
        ("latency_ms: 20", "latency_ms: -1", "mine.yaml, line 13, budget.latency_ms: must be more than 0: got -1"),
        ("train.updates", "trian.updates", "mine.yaml, line 15, variants.smoke, override trian.updates=4: no such"),
        (
            "  - sparse-update\n",
            "  - finalize\n",
            "mine.yaml, step 1 (line 5), finalize: there is nothing to finalize here",
        ),
    ],
)
def test_one_wrong_thing(old: str, new: str, text: str) -> None:
    assert old in TEXT
    assert text in complaint(TEXT.replace(old, new, 1))


def test_order_is_checked_before_any_work() -> None:
    text = TEXT.replace("  - sparse-update\n", "  - int4\n  - sparse-update\n").replace("  - int4:\n", "")
    assert complaint(text).splitlines()[3:5] == [
        "mine.yaml, step 3 (line 7), lora: cannot follow int4, which leaves integer weights",
        "  next: put lora before int4",
    ]
    assert "step 4 (line 8), train: cannot follow int4" in complaint(text)


def test_a_technique_cannot_stand_twice() -> None:
    text = TEXT.replace("  - int4:", "  - int4\n  - int4:")
    assert "step 7 (line 11), int4: occurs twice" in complaint(text)


@pytest.mark.parametrize("text", ["", "[]", "3", "just words", "null"])
def test_not_a_mapping(text: str) -> None:
    assert complaint(text).startswith("mine.yaml: a recipe is a mapping")


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*path, key))


def changed(plain: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    whole: Any = copy.deepcopy(plain)
    at = whole
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return whole


@pytest.mark.parametrize("value", [None, True, -1, 0, 1.5, 10**30, "x", "", [], ["x"], {}, {"x": 1}, [[]]], ids=repr)
def test_no_value_of_any_field_escapes_as_another_error(value: Any) -> None:
    plain = parsed().resolve()
    for path in paths_of(plain):
        text = refusal(changed(plain, path, value))
        assert text == "" or text.startswith("mine.yaml"), (path, value, text)
        assert "pydantic" not in text
        assert "Input should" not in text, (path, value, text)


def refusal(plain: dict[str, Any]) -> str:
    """The error's text; empty where the recipe is good."""
    try:
        recipe.from_plain(plain, "mine.yaml")
    except EdgetuneError as error:
        return str(error)
    return ""


def test_no_unknown_key_is_taken() -> None:
    plain = parsed().resolve()
    for path in [(), *paths_of(plain)]:
        inner: Any = plain
        for key in path:
            inner = inner[key]
        if isinstance(inner, dict) and path[:1] != ("variants",):
            with pytest.raises(EdgetuneError, match="surplus"):
                recipe.from_plain(changed(plain, (*path, "surplus"), 1))


def test_a_removed_mapping_is_named() -> None:
    for key in ("model", "data", "steps"):
        plain = {k: v for k, v in parsed().resolve().items() if k != key}
        assert f", {key}: " in complaint(yaml.safe_dump(plain))


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert recipe.load(path) == parsed() == recipe.load(str(path))
    path.write_bytes(b"name: \xff")
    with pytest.raises(EdgetuneError, match="not UTF-8: byte 6"):
        recipe.load(path)
    path.write_bytes(b"#" * (MOST_BYTES + 1))
    with pytest.raises(EdgetuneError, match="larger than 256 KiB"):
        recipe.load(path)
    with pytest.raises(EdgetuneError, match="no such recipe"):
        recipe.load(tmp_path / "none.yaml")
    with pytest.raises(EdgetuneError) as caught:
        recipe.load("text-minilmm")
    assert "did you mean 'text-minilm'?" in str(caught.value)
