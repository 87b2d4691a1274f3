"""The reader of YAML: what it refuses, with the line, and what its plain words become."""

from __future__ import annotations

import pytest

from edgetune.core.errors import EdgetuneError
from edgetune.core.places import Errors
from edgetune.recipe.document import MOST_ALIASES, MOST_BYTES, read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "x.yaml, line 1, column 6: not YAML: while parsing a flow sequence expected ',' or ']'"),
        ("a: 1\nb: 2\na: 3", "x.yaml, line 3, a: given twice, first in line 1"),
        ("a: 1\n---\nb: 1", "x.yaml, line 2: a second document starts here"),
        ("a: !!python/object/apply:os.system [ls]", "x.yaml, line 1, a: tags are not supported"),
        ("a: {<<: {b: 1}}", "merge keys (<<) are not supported"),
        ("1: a", "x.yaml, line 1: a key must be text: got '1'"),
        ("? [a]\n: b", "a key must be text"),
        ("a: .inf", "x.yaml, line 1, a: a number must be finite"),
        ("a: " + "9" * 5000, "x.yaml, line 1, a: "),
        ("a: \x00", "not YAML: the character at position 3 is not allowed"),
        ("[" * 100_000, "nested deeper than 16 levels"),
        ("- " * 50_000, "nested deeper than 16 levels"),
        ("a: &a [*a]", "aliases expand to more than"),
        ("a: &a 1\nb: [" + "*a, " * (MOST_ALIASES + 1) + "]", "more than 16 aliases"),
        ("a: [" + "1, " * 20_000 + "]", "more than 10000 values"),
        ("a: " + "x" * MOST_BYTES, "larger than 256 KiB"),
    ],
    ids=lambda text: text[:20],
)
def test_reader_refuses(text: str, message: str) -> None:
    with pytest.raises(EdgetuneError) as caught:
        read(text, "x.yaml")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_reader_refuses_a_bomb() -> None:
    lines = ["a0: &a0 [" + "x, " * 100 + "]"]
    lines += [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 8)]
    with pytest.raises(EdgetuneError, match="aliases expand to more than 10000 values"):
        read("\n".join(lines), "x.yaml")


def test_reader_collects_what_is_wrong() -> None:
    with pytest.raises(Errors) as caught:
        read("a: 1\na: 2\nb: .nan\nc: !x 1", "x.yaml")
    assert len(caught.value.errors) == 3


def test_plain_scalars_are_those_of_yaml_1_2() -> None:
    text = "[no, on, 2024-01-01, 1:30, 0x10, 1e3, -.5, ~, true, 08, &a x, *a, '1']"
    expected = ["no", "on", "2024-01-01", "1:30", "0x10", 1000.0, -0.5, None, True, 8, "x", "x", "1"]
    assert read(text, "x").value == expected
