"""Every field of a descriptor, found by walking the model, mutated: refused with the field and a reason."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from edgetune.cli.main import main
from edgetune.core.errors import EdgetuneError
from edgetune.profile import device
from edgetune.profile.facts import Fact, Flags, StorageKind, StrictRecord
from edgetune.profile.sources import resolve_sources
from edgetune.recipe import document

HUGE = 10**400  # no double holds it
BAD = (0, -1, math.nan, math.inf, -math.inf, 1e308, HUGE, True, "furlong", None, [], {}, {"value": 1}, ...)
# a free text: any words are right, so only what is no text is wrong
TEXTS = {"id", "name", "soc", "clusters.0.core", "accelerators.0.name", "no_runtime"}
OPTIONAL = {"notes"}  # may be left out: there is nothing to say
# a device without an accelerator, one without any of the flags (ARMv6), and one with nothing to say
EMPTY = {"accelerators", "isa.value", "notes"}


def put(tree: Any, path: str, value: Any) -> Any:
    """A copy with the value at the dotted path replaced, or removed for `...`."""
    changed = copy.deepcopy(tree)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node = changed
    for part in parents:
        node = node[part]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return changed


def get(tree: Any, path: str) -> Any:
    """What stands at the dotted path; `...` where nothing does."""
    for part in path.split("."):
        try:
            tree = tree[int(part) if part.isdigit() else part]
        except (KeyError, IndexError, TypeError):
            return ...
    return tree


def known() -> dict[str, Any]:
    """A descriptor in which every number is known."""
    content, _ = device.read("galaxy-s23")
    assert isinstance(content, dict)
    plain, faults = resolve_sources(content)
    assert not faults
    told = {"source": "a test", "trust": "low"}
    values = {
        "usable_app_memory_mib": (3000, "MiB"), "clock_mhz": (700, "MHz"), "fp16_gflops": (4000, "GFLOPS"),
        "dense_int8_tops": (10, "TOPS"), "low_w": (1, "W"), "high_w": (8, "W"), "read_mb_s": (2000, "MB/s"),
    }  # fmt: skip
    for path, fact in device.load("galaxy-s23").facts():
        if fact.value is None:
            value, unit = values[path.rpartition(".")[2]]
            plain = put(plain, path, {"value": value, "unit": unit, **told})
    whole: dict[str, Any] = plain
    return whole


def fields(kind: type[StrictRecord], path: str = "") -> Iterator[str]:
    """The dotted path of every field of the model, one element for each list; a calibration is no part of it."""
    for name, info in kind.model_fields.items():
        here = f"{path}{name}"
        if name == "calibration":
            continue
        yield here
        inner = info.annotation
        if get_args(inner) and isinstance(get_args(inner)[0], type) and issubclass(get_args(inner)[0], StrictRecord):
            yield from fields(get_args(inner)[0], f"{here}.0.")
        elif isinstance(inner, type) and issubclass(inner, StrictRecord):
            yield from fields(inner, f"{here}.")


WHOLE = known()
FIELDS = tuple(fields(device.Device))


def allowed(path: str, bad: Any) -> bool:
    """Whether this is no mutation: a right value, or what stands there already."""
    if bad is ...:
        return path in OPTIONAL
    if bad == [] and isinstance(bad, list):
        return path in EMPTY
    return bad == "furlong" and (path in TEXTS or path.endswith(".source"))


def refusal(path: str, content: Any) -> str:
    with pytest.raises(EdgetuneError) as caught:
        device.parse(content, "mine.yaml")
    error = caught.value
    assert error.where == "mine.yaml", path
    assert error.action, path
    return error.what


def test_the_walk_finds_every_field() -> None:
    assert len(FIELDS) > 130
    assert {"clusters.0.ghz.value", "storage.kind.trust", "accelerators.0.target", "memory", "isa.unknown"} <= {*FIELDS}
    found = {re.sub(r"\.\d+", ".0", path) for path, _ in device.parse(WHOLE, "mine.yaml").facts()}
    assert found <= set(FIELDS)
    assert all(fact.value is not None for _, fact in device.parse(WHOLE, "mine.yaml").facts())


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_mutated_is_refused_with_its_path_and_a_reason(path: str) -> None:
    parent = path.rpartition(".")[0]
    for bad in BAD:
        if bad is ... and get(WHOLE, path) is ...:
            continue
        if allowed(path, bad):
            device.parse(put(WHOLE, path, bad), "mine.yaml")
            continue
        told = refusal(path, put(WHOLE, path, bad))
        place, _, reason = told.partition(": ")
        # a fault of value and source together is one of the number, not of one of its parts; that of a target that
        # is given and yet said to be unreached is told of the target
        other = path.replace("unreached", "target") if get(WHOLE, f"{parent}.value") is ... else parent
        assert place.startswith((path, other)), told
        assert len(reason) > 8, (path, bad, told)


@pytest.mark.parametrize("path", ["", *(path for path in FIELDS if isinstance(get(WHOLE, path), dict))])
def test_an_unknown_key_is_refused_everywhere(path: str) -> None:
    place = f"{path}.colour".lstrip(".")
    assert re.match(rf"{re.escape(place)}: unknown field", refusal(path, put(WHOLE, place, 1)))


def test_a_calibration_is_no_part_of_the_file() -> None:
    for section in (None, {}, {"date": "2026-01-01"}):
        assert refusal("calibration", {**WHOLE, "calibration": section}).startswith("calibration: ")


def test_every_unit_but_the_right_one_is_refused() -> None:
    units = {get(WHOLE, f"{path}.unit") for path in FIELDS} - {...}
    assert len(units) >= 12
    for path, fact in device.parse(WHOLE, "mine.yaml").facts():
        if not isinstance(fact, Fact):
            told = refusal(path, put(WHOLE, f"{path}.unit", "GHz"))
            assert told.startswith(f"{path}.unit: unknown field"), told
            continue
        for unit in {*units, "ghz", "Gb/s", "MB", ""} - {fact.unit}:
            told = refusal(path, put(WHOLE, f"{path}.unit", unit))
            assert told.startswith(f"{path}: the unit is {fact.unit or 'none'}, got {unit or 'none'}"), told


def test_a_null_has_a_reason_and_nothing_else() -> None:
    for path, fact in device.parse(WHOLE, "mine.yaml").facts():
        null = {"value": None, "unknown": "nobody knows"}
        if path == "threads" or path.endswith(".count"):
            assert "must be" in refusal(path, put(WHOLE, path, null))
            continue
        assert dict(device.parse(put(WHOLE, path, null), "mine.yaml").facts())[path].value is None
        for key, value in (("source", "a page"), ("trust", "low"), ("value", ...), ("unknown", ""), ("unknown", ...)):
            assert refusal(path, put(put(WHOLE, path, null), f"{path}.{key}", value)).startswith(path), (path, key)
        assert isinstance(fact, (Fact, Flags, StorageKind))


@pytest.mark.parametrize(
    ("sources", "fact", "reason"),
    [
        ({"a": {"source": "a page", "trust": "low"}}, {"from": "b"}, r"^memory.ram_gib.from: 'b' is not under sources"),
        ({}, {"from": "b"}, r"^memory.ram_gib.from: 'b' is not under sources \(there are none\)"),
        ({"a": {"source": "a page", "trust": "low"}}, {"from": ["a"]}, r"^memory.ram_gib.from: \['a'\] is not"),
        ({"a": {"source": "a page", "trust": "low"}}, {"from": "a", "trust": "low"}, r"ram_gib.from: .* given twice"),
        (
            {"a": {"source": "a page", "trust": "sure"}},
            {"from": "a"},
            r"^sources.a.trust: must be one of the",
        ),
        ({"a": {"source": "", "trust": "low"}}, {"from": "a"}, r"^sources.a.source: must have at least 1"),
        ({"a": {"trust": "low"}}, {"from": "a"}, r"^sources.a.source: is missing"),
        ({"a": {"source": "a page", "trust": "low", "url": "x"}}, {"from": "a"}, r"^sources.a.url: unknown field"),
        ({"a": 4}, {"from": "a"}, r"^sources.a: "),
        (
            {"a": {"source": "a page", "trust": "low"}},
            {"source": "b", "trust": "low"},
            r"^sources.a: nothing is from it",
        ),
        (7, {"source": "b", "trust": "low"}, r"^sources: must be a mapping"),
        (None, {"source": "b", "trust": "low"}, r"^sources: must be a mapping"),
    ],
)
def test_sources_told_once_are_held_to_the_same(sources: Any, fact: dict[str, Any], reason: str) -> None:
    content = {**put(WHOLE, "memory.ram_gib", {"value": 8, "unit": "GiB", **fact}), "sources": sources}
    assert re.search(reason, refusal("sources", content))


def test_a_source_told_once_is_the_same_as_one_told_there() -> None:
    content, _ = device.read("galaxy-s23")
    assert isinstance(content, dict)
    plain, _ = resolve_sources(content)
    assert "from" in str(content)
    assert device.parse(plain, "x.yaml") == device.parse(content, "x.yaml") == device.load("galaxy-s23")


def leaves(tree: Any, path: str = "") -> Iterator[str]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, item in items:
        here = f"{path}.{key}".lstrip(".")
        yield from leaves(item, here) if isinstance(item, (dict, list)) and item else (here,)


def test_every_line_of_a_file_mutated_on_disk_is_refused(tmp_path: Path) -> None:
    content, _ = device.read("alif-ensemble-e7")
    path = tmp_path / "alif-ensemble-e7.yaml"
    document.write_yaml(path, content)
    assert device.load(path) == device.load("alif-ensemble-e7")
    for number, leaf in enumerate(leaves(content)):
        bads = (-1, math.nan, 1e308, ...)
        in_list = leaf.rpartition(".")[2].isdigit()  # an element may go: what is left is a shorter list
        bad = bads[number % (3 if in_list else 4)]
        document.write_yaml(path, put(content, leaf, bad))
        with pytest.raises(EdgetuneError) as caught:
            device.load(path)
        first = leaf.split(".")[0]
        assert str(caught.value).startswith(f"{path}"), leaf
        assert first in str(caught.value).removeprefix(str(path)), (leaf, bad, str(caught.value))


@pytest.mark.parametrize(
    ("text", "changed", "told"),
    [
        ("value: 890, unit: MHz", "value: -890, unit: MHz", "accelerators.0.clock_mhz: -890 is outside 10 to 5000 MHz"),
        ("value: 890, unit: MHz", "value: .nan, unit: MHz", "clock_mhz.value: a number must be finite"),
        ("value: 890, unit: MHz", "value: 890, unit: GHz", "accelerators.0.clock_mhz: the unit is MHz, got GHz"),
        ("value: 8, unit: GiB", "value: eight, unit: GiB", "memory.ram_gib.value: must be a number: got 'eight'"),
        ("threads: {value: 4", "threads: {value: 99", "threads: 99, but there are 9 cores"),
        ("family: phone", "family: fridge", "family: must be one of the allowed values: got 'fridge'"),
        ("targets: [xnnpack", "targets: [xnpack", "targets.0: must be one of the allowed values: got 'xnpack'"),
        ("format: 1", "format: 1\ncolour: 2", "colour: unknown field: got 'colour'"),
        ("trust: high", "trust: certain", "trust: must be one of the allowed values: got 'certain'"),
    ],
)
def test_the_command_line_says_field_and_reason(
    text: str, changed: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, _ = device.read("pixel-8")
    whole = yaml.safe_dump(content, default_flow_style=None, sort_keys=False, width=1000)
    assert text in whole
    path = tmp_path / "mine.yaml"
    path.write_text(whole.replace(text, changed), encoding="utf-8")
    assert main(["devices", "validate", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "mine.yaml" in said.err
    assert told in said.err
    assert "Traceback" not in said.err
