"""Validate plain values against a pydantic class: the object, or every error in plain words with its path."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar, Union

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from edgetune.core.errors import EdgetuneError
from edgetune.core.places import Key, KeyPath

Kind = TypeVar("Kind", bound=BaseModel)

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "frozen_set": "a list",
    "dict": "a mapping",
    "model": "a mapping",
    "none": "empty",
    "path": "a path",
}
_FIELD = re.compile(r"([a-z0-9_]+(?:\.[a-z0-9_]+)*): ")
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one value."""

    path: KeyPath
    what: str
    got: object = None
    allowed: tuple[str, ...] = ()
    action: str = ""
    near: str | None = None

    def at(self, where: str) -> EdgetuneError:
        """The problem as an error at this location."""
        return EdgetuneError(
            self.what, where=where, got=self.got, allowed=self.allowed, action=self.action, near=self.near
        )


def validate(kind: type[Kind], value: Mapping[str, Any]) -> tuple[Kind | None, list[Problem]]:
    """Build `kind` from plain values, without conversions: "8" is not a number, 1 is not true, 8.0 is not whole."""
    made: Kind | None = None
    problems: list[Problem] = []
    try:
        made = kind.model_validate(value)
    except ValidationError as error:
        problems = explain_errors(kind, error)
    reported = {problem.path for problem in problems}
    problems += [problem for problem in _find_conversions(kind, value) if problem.path not in reported]
    return (None if problems else made), list(_merge_problems(iter(problems)))


def explain_errors(kind: type[BaseModel], error: ValidationError) -> list[Problem]:
    """Pydantic's errors in plain words; those of a union's members are merged into one."""
    return list(_merge_problems(_problem(kind, details) for details in error.errors(include_url=False)))


def list_faults(kind: type[BaseModel], error: ValidationError, around: KeyPath = ()) -> list[str]:
    """Pydantic's errors, one line each: `memory.ram_gib: must be ...`; positions count from zero."""
    return [str(problem.at(".".join(map(str, (*around, *problem.path))))) for problem in explain_errors(kind, error)]


def _find_conversions(kind: type[BaseModel], value: Mapping[str, Any]) -> list[Problem]:
    """Values that pydantic would silently convert; a list for a tuple, or text for a path, is no mistake."""
    try:
        kind.model_validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        plain = [d for d in error.errors(include_url=False) if _name(d["type"]) in ("int", "float", "bool", "string")]
        return [_problem(kind, d) for d in plain if isinstance(d["input"], (str, int, float, bool))]
    return []


def _name(code: str) -> str:
    """The type in a pydantic code such as `int_parsing`."""
    return re.sub(r"_(type|parsing|from_float|attributes_type|parsing_size|required)$", "", code)


def setting_names(kind: type[BaseModel]) -> tuple[str, ...]:
    """The names under which the class takes its settings."""
    return tuple(field.alias or name for name, field in kind.model_fields.items())


def _merge_problems(problems: Iterator[Problem]) -> Iterator[Problem]:
    """The problems of a union's members with one value as one; a member with a deeper problem is the one meant."""
    by_path: dict[KeyPath, list[Problem]] = {}
    for problem in problems:
        by_path.setdefault(problem.path, []).append(problem)
    outer = {path[:length] for path in by_path for length in range(len(path))}
    by_path = {path: same for path, same in by_path.items() if path not in outer}
    for path, same in by_path.items():
        problem_text, kinds = same[0].what, [p.what.removeprefix("must be ") for p in same]
        if len(same) > 1 and all(p.what.startswith("must be ") for p in same):
            problem_text = "must be " + " or ".join(dict.fromkeys(kinds))
        allowed = tuple(dict.fromkeys(a for p in same for a in p.allowed))
        yield Problem(path, problem_text, same[0].got, allowed, same[0].action, same[0].near)


def _problem(kind: type[BaseModel], details: ErrorDetails) -> Problem:
    path, around = _walk(kind, details["loc"])
    code, got, context = details["type"], details.get("input"), details.get("ctx", {})
    if code == "missing":
        return Problem(path, "is missing")
    if code == "extra_forbidden":
        return Problem(path, "unknown field", path[-1], setting_names(around) if around else ())
    if code in ("literal_error", "enum"):
        return Problem(path, "must be one of the allowed values", got, _parse_choices(str(context.get("expected", ""))))
    if code in _BOUNDS:
        words, key = _BOUNDS[code]
        return Problem(path, f"must be {words} {context[key]:g}", got)
    if code in ("too_short", "string_too_short"):
        return Problem(path, f"must have at least {context.get('min_length')} entries or letters", got)
    if code in ("too_long", "string_too_long"):
        return Problem(path, f"must have at most {context.get('max_length')} entries or letters", got)
    if code == "string_pattern_mismatch":
        return Problem(path, f"must look like {context['pattern']}", got)
    inner = context.get("error")
    if isinstance(inner, EdgetuneError):
        return Problem(path, inner.what, inner.got, inner.allowed, inner.action, inner.near)
    if code in ("value_error", "assertion_error"):
        named = _FIELD.match(str(inner))  # a check over several fields names the one at fault
        path = (*path, named[1]) if named else path
        return Problem(path, str(inner)[named.end() if named else 0 :], None if isinstance(got, dict) else got)
    if _name(code) in ("list", "tuple") and isinstance(got, str):
        return Problem(path, f"must be a list, as in [{got!r}]", got)
    if _name(code) == "model" and around is not None:
        inside = setting_names(_section_class(around, path))
        return Problem(
            path, f"must be a mapping, as in {{{inside[0]}: ...}}" if inside else "must be a mapping", got, inside
        )
    if _name(code) in _TYPES:
        return Problem(path, f"must be {_TYPES[_name(code)]}", got)
    return Problem(path, details["msg"], got)


def _section_class(around: type[BaseModel], path: KeyPath) -> type[BaseModel]:
    """The class of the field that `path` ends in; one without fields if there is none."""
    fields = [field for name, field in around.model_fields.items() if path and (field.alias or name) == path[-1]]
    return next((a for field in fields for a in _members(field.annotation) if _is_model(a)), BaseModel)


def _parse_choices(text: str) -> tuple[str, ...]:
    """The values in pydantic's "'a', 'b' or 3"."""
    return tuple(quoted or bare for quoted, bare in re.findall(r"'([^']*)'|(\b[\d.]+\b)", text))


def _walk(kind: type[BaseModel], loc: tuple[Key, ...]) -> tuple[KeyPath, type[BaseModel] | None]:
    """The path of a pydantic location, without the tags of unions, and the class of its last field."""
    path: list[Key] = []
    annotations: list[Any] = [kind]
    around: type[BaseModel] | None = kind
    for part in loc:
        choices = [a for a in annotations if a is not type(None)]
        if len(choices) > 1:  # this part is the tag of a union's member
            annotations = [a for a in choices if _is_tag(part, a)] or choices
            if not any(part in setting_names(a) for a in choices if _is_model(a)):
                continue
        models = [a for a in annotations if _is_model(a)]
        holder = next((m for m in models if isinstance(part, str) and part in setting_names(m)), None)
        if holder is not None:
            field = next(f for n, f in holder.model_fields.items() if (f.alias or n) == part)
            path.append(part)
            around, annotations = holder, _members(field.annotation)
        elif isinstance(part, int) or any(_is_mapping(a) for a in annotations):
            path.append(part)
            annotations = [m for a in annotations for inner in _inner_annotations(a, part) for m in _members(inner)]
        elif models and part == loc[-1]:
            path.append(part)  # a field that the class does not know
            around = models[0]
    return tuple(path), around


def _inner_annotations(annotation: Any, part: Key) -> tuple[Any, ...]:
    inner = typing.get_args(annotation)
    if _is_mapping(annotation):
        return inner[1:]
    if typing.get_origin(annotation) is tuple and Ellipsis not in inner:
        return inner[part : part + 1] if isinstance(part, int) else ()
    return tuple(each for each in inner if each is not Ellipsis)


def _is_model(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_tag(part: Key, annotation: Any) -> bool:
    """Whether this part of a location is pydantic's tag for this member of a union: `str`, `Slice`, `dict[str,...]`."""
    name = getattr(typing.get_origin(annotation) or annotation, "__name__", "")
    return re.split(r"[\[(]", str(part))[0] == name


def _is_mapping(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (dict, Mapping)


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [m for a in typing.get_args(annotation) for m in _members(a)]
    return [annotation]
