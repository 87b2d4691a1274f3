"""Apply `key=value` overrides to a recipe's plain values, before they are validated.

`seed`, `model.max_length`, `export.target` are fields of the recipe; `train.epochs` is that field of every step called
train, `train[2].epochs` of the second one, `steps.3.ratio` of the third step. Positions count from one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgetune.core import registry
from edgetune.core.errors import EdgetuneError
from edgetune.core.other_names import nearest
from edgetune.core.places import Key, KeyPath, format_path
from edgetune.core.validated import setting_names
from edgetune.recipe.document import Document, read

VARIANT = "variant"  # the key that chooses one of the recipe's own named sets


def parse_overrides(settings: Iterable[str]) -> dict[str, Any]:
    """`["train.epochs=2"]` as a mapping; each value is read as YAML.

    >>> parse_overrides(["train.epochs=2", "lora.targets=['*.query']", "name=x"])
    {'train.epochs': 2, 'lora.targets': ['*.query'], 'name': 'x'}
    """
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise EdgetuneError("an override has the form key=value", got=setting, action="for example train.epochs=2")
        if key.strip() in overrides:
            raise EdgetuneError("the override is given twice", got=key.strip())
        overrides[key.strip()] = read(text, f"override {setting}").value
    return overrides


def apply_overrides(
    document: Document, overrides: Mapping[str, Any], top: Sequence[str]
) -> tuple[Document, list[EdgetuneError]]:
    """The document with `overrides` applied (those of a selected variant first), and errors for the rest.

    Args:
        document: a recipe whose steps are all of the form `{name: settings}`.
        overrides: dotted key -> plain value.
        top: the recipe's own field names.
    """
    errors: list[EdgetuneError] = []
    chosen: dict[str, Any] = {}
    variants = document.value.get("variants") or {}
    if VARIANT in overrides and isinstance(variants, dict):
        name = overrides[VARIANT]
        if isinstance(name, str) and isinstance(variants.get(name), dict):
            chosen = {key: (value, f"variant {name}: ") for key, value in variants[name].items()}
        else:
            allowed = list(variants) or ["(this recipe has no variants)"]
            errors.append(EdgetuneError("no such variant", where="override variant", got=name, allowed=allowed))
    chosen |= {key: (value, "override ") for key, value in overrides.items() if key != VARIANT}
    values, places = copy.deepcopy(document.value), dict(document.places)
    for key, (value, label) in chosen.items():
        place = f"{label}{key}={value}"
        try:
            for path in _paths(values, key, top):
                _set(values, path, copy.deepcopy(value))
                for below in [p for p in places if p[: len(path)] == path]:
                    del places[below]
                places[path] = place
                for length in range(1, len(path)):  # sections that the override brought
                    places.setdefault(path[:length], place)
        except EdgetuneError as error:
            errors.append(error.within(place))
    return Document(document.name, values, places), errors


def _paths(values: dict[str, Any], key: str, top: Sequence[str]) -> list[KeyPath]:
    first, *rest = (_parse_segment(part) for part in key.split("."))
    below: KeyPath = ()
    for name, position in rest:
        below += (int(name) - 1 if name.isdecimal() else name,) if position is None else (name, position - 1)
    name, position = first
    steps = [next(iter(step)) if isinstance(step, dict) and step else "" for step in _steps(values)]
    if name == "steps":
        at = below[0] if position is None and below else (position or 0) - 1
        if not isinstance(at, int) or not 0 <= at < len(steps):
            allowed = [f"steps.{index + 1}.{step}" for index, step in enumerate(steps)]
            raise EdgetuneError("no such step; steps are numbered from 1", got=key, allowed=allowed)
        below = below[1:] if position is None else below
        return [("steps", at, steps[at], *(below[1:] if below[:1] == (steps[at],) else below))]
    if name in steps:
        positions = [index for index, step in enumerate(steps) if step == name]
        if position is not None and not 1 <= position <= len(positions):
            allowed = [f"{name}[{count + 1}]" for count in range(len(positions))]
            raise EdgetuneError(
                f"no such step {name}; they are numbered from 1", got=f"{name}[{position}]", allowed=allowed
            )
        return [("steps", i, name, *below) for i in (positions if position is None else [positions[position - 1]])]
    if name not in top:
        allowed = [*dict.fromkeys(filter(None, steps)), *top]
        near = nearest(name, allowed, cutoff=0.75) or _field_of_step(name, steps)
        raise EdgetuneError("no such field or step", got=name, allowed=allowed, near=near)
    return [(name, *(() if position is None else (position - 1,)), *below)]


def _field_of_step(name: str, steps: Iterable[str]) -> str:
    """`train.learning_rate` for `lr`: the setting of a step that was probably meant; else empty."""
    for step in dict.fromkeys(steps):
        table = {**registry.TECHNIQUES, **registry.STEPS}
        near = nearest(name, setting_names(registry.load(table[step])), cutoff=0.9) if step in table else ""
        if near:
            return f"{step}.{near}"
    return ""


def _steps(values: dict[str, Any]) -> list[Any]:
    steps = values.get("steps")
    return steps if isinstance(steps, list) else []


def _parse_segment(part: str) -> tuple[str, int | None]:
    """`train[2]` as ("train", 2)."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(\d+)\])?", part)
    if not match:
        raise EdgetuneError("not a dotted key", got=part, action="for example train.epochs, or train[2].epochs")
    return match[1], int(match[2]) if match[2] else None


def _set(values: Any, path: KeyPath, value: Any) -> None:
    """Write `value` at `path`, and create missing mappings on the way."""
    at: Any = values
    for index, key in enumerate(path):
        done: KeyPath = path[:index]
        if isinstance(at, list) and len(at) == 1 and isinstance(key, str):
            at = at[0]  # one budget is a list of one
        if isinstance(at, dict) and isinstance(key, str):
            inner = at.get(key)
        elif isinstance(at, list) and isinstance(key, int):
            if not 0 <= key < len(at):
                raise EdgetuneError(
                    "no such position; they are numbered from 1", got=key + 1, allowed=[f"1 to {len(at)}"]
                )
            inner = at[key]
        else:
            kind = "a list; give a position" if isinstance(at, list) else "no mapping"
            raise EdgetuneError(
                f"{format_path(done)} is {kind}", got=_format_key(key), action="" if done else "give a field"
            )
        if index == len(path) - 1:
            at[key] = value
        elif inner is None:
            at[key] = {}
        elif isinstance(inner, str) and path[:1] in (("model",), ("data",)) and index == 0:
            at[key] = {"source": inner}
        at = at[key]


def _format_key(key: Key) -> str:
    return str(key + 1) if isinstance(key, int) else key
