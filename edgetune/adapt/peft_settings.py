"""Settings of a technique, made from the fields of a config of peft's: name, type, default and help text."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import Field

# Of peft's configs, what edgetune decides itself: targets, skip, also_train and depth say it, or the layers do.
_DECIDED = frozenset(
    ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias",
     "fan_in_fan_out")
)  # fmt: skip
_ABBREVIATIONS = re.compile(r"(?:e\.g|i\.e|etc|vs|cf|Eq|al)\.$")


def settings_of(
    config: type, names: Mapping[str, str], left_out: Collection[str], described: Mapping[str, str]
) -> dict[str, tuple[Any, Any]]:
    """Fields for `pydantic.create_model`, by edgetune's `names` for peft's where they differ.

    Without `left_out`, what edgetune decides itself, and the switches that start an adapter at random for tests of
    peft's own. `described`: texts for fields that peft leaves without.
    """
    from peft import PeftConfig

    hints = typing.get_type_hints(config)
    base = {field.name for field in dataclasses.fields(PeftConfig)}
    made = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        name, hint = field.name, hints[field.name]
        if name in base | _DECIDED or name in left_out or _is_for_tests(field, hint):
            continue
        default: Any = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        bounds: dict[str, Any] = {"ge": 1} if name == "r" else {}
        text = described.get(name) or first_sentence("".join(field.metadata.get("help", "")))
        made[names.get(name, name)] = (_choices(hint), Field(default, **bounds, description=text))
    return made


def _is_for_tests(field: dataclasses.Field[Any], hint: Any) -> bool:
    return (
        field.name.startswith("init_")
        and bool in (hint, *typing.get_args(hint)[:1])
        and field.default is True
        and (not any(typing.get_origin(a) is typing.Literal or a is str for a in typing.get_args(hint)))
    )


def _choices(hint: Any) -> Any:
    """A type without `str` where it also lists the strings."""
    members = typing.get_args(hint)
    listed = [m for m in members if m is not str]
    if str in members and any(typing.get_origin(m) is typing.Literal for m in members):
        return typing.Union[tuple(listed)]  # noqa: UP007 (of a computed tuple)
    return hint


def first_sentence(text: str) -> str:
    """The first sentence of a help text, in one line and with a full stop.

    >>> first_sentence("The rank,\\n e.g. 8. Larger is slower.")
    'The rank, e.g. 8.'
    """
    words: list[str] = []
    for word in text.split():
        words.append(word)
        if word[-1] in ".!" and not _ABBREVIATIONS.search(word):
            break
    return " ".join(words).rstrip(".:!") + "." if words else ""
