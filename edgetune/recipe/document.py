"""YAML text <-> plain values, with the line of each value. Safe, limited in size, and every structural error at once.

Used for recipes, overrides and device descriptors. Only JSON's values are read: mappings with text keys, lists, text,
finite numbers, true/false and null. `1e-3` is a number and `no`, `on` and `2024-01-01` are text, as in YAML 1.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from edgetune.core.errors import EdgetuneError
from edgetune.core.files import write_atomically
from edgetune.core.places import KeyPath, format_path, raise_all

MOST_BYTES = 256 * 1024
MOST_ALIASES = 16
MOST_NODES = 10_000  # after aliases are followed
MOST_DEPTH = 16


class _Reader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalar types of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_C: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # many times as fast, where PyYAML was built with libyaml


class _FastReader(_C):  # type: ignore[misc]
    yaml_implicit_resolvers = _Reader.yaml_implicit_resolvers


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_NULL, _BOOL, _INT, _FLOAT, _TEXT = (f"tag:yaml.org,2002:{n}" for n in ("null", "bool", "int", "float", "str"))
_PLAIN = {_NULL, _BOOL, _INT, _FLOAT, _TEXT, "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}
_Reader.add_implicit_resolver(_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), [*"~nN", ""])
_Reader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])
_Reader.add_implicit_resolver(_INT, re.compile(r"^[-+]?[0-9]+$"), [*"-+0123456789"])
_Reader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    [*"-+.0123456789"],
)


_MENDING = {  # what PyYAML says, and what to do about it
    "'\\t'": "indent with spaces, not with tabs",
    "mapping values are not allowed": "put a value that holds a colon into quotes, and indent with care",
    "quoted scalar": "close the quote",
    "flow mapping": "close each { with }",
    "flow sequence": "close each [ with ]",
    "block": "begin the lines that belong together in the same column",
}


@dataclass(frozen=True)
class Document:
    """Plain values and the location of each: `places[("steps", 0, "lora")]` is "line 12"."""

    name: str
    value: Any
    places: Mapping[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> tuple[str, KeyPath]:
        """The location of `path`, or of the nearest value around it, and the part of the path that it is for."""
        for shown in (path, tuple(key for key in path if not isinstance(key, int))):
            if shown in self.places:
                return self.places[shown], shown
        return self.place(path[:-1]) if path else ("", ())


def write_yaml(path: Path, content: object) -> None:
    """Write a YAML file atomically."""
    write_atomically(path, yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def read_yaml_text(path: Path, action: str = "") -> str:
    """The text of a YAML file that exists, is small enough and UTF-8; `action`: the advice if it does not exist."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise EdgetuneError(f"cannot read the file: {error.strerror}", where=str(path), action=action) from error
    if len(data) > MOST_BYTES:
        raise EdgetuneError(f"the file is larger than {MOST_BYTES // 1024} KiB", where=str(path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EdgetuneError(
            f"the file is not UTF-8: byte {error.start}", where=str(path), action="save it as UTF-8"
        ) from error


def read(text: str, name: str) -> Document:
    """Read one YAML document; `name` is what errors call it."""
    if len(text.encode("utf-8", "replace")) > MOST_BYTES:
        raise EdgetuneError(f"the text is larger than {MOST_BYTES // 1024} KiB", where=name)
    try:
        node = _compose(text, name)
    except yaml.reader.ReaderError as error:
        raise EdgetuneError(
            f"not YAML: the character at position {error.position} is not allowed", where=name
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        why = " ".join(part for part in (error.context, error.problem) if part)
        action = next((action for part, action in _MENDING.items() if part in why), "")
        raise EdgetuneError(f"not YAML: {why}", where=name + at, action=action) from error
    reading = _NodeReader(name)
    value = reading.value(node, ()) if node is not None else None
    raise_all(name, reading.errors)
    return Document(name, value, reading.places)


def _compose(text: str, name: str) -> yaml.Node | None:
    with suppress(yaml.YAMLError):  # PyYAML's own parser says better than libyaml what is wrong
        _check_limits(text, name, _FastReader)
        return yaml.compose(text, _FastReader)
    _check_limits(text, name, _Reader)
    return yaml.compose(text, _Reader)


def _check_limits(text: str, name: str, reader: type[Any]) -> None:
    """Check the parser's events before any value is built."""
    depth = aliases = documents = nodes = 0
    for event in yaml.parse(text, reader):
        mark = event.start_mark
        where = f"{name}, line {mark.line + 1}" if mark else name
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        nodes += isinstance(event, yaml.NodeEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        if depth > MOST_DEPTH:
            raise EdgetuneError(f"nested deeper than {MOST_DEPTH} levels", where=where)
        if aliases > MOST_ALIASES:
            raise EdgetuneError(f"more than {MOST_ALIASES} aliases", where=where, action="write the values out")
        if nodes > MOST_NODES:
            raise EdgetuneError(f"more than {MOST_NODES} values", where=where)
        if documents > 1:
            raise EdgetuneError("a second document starts here", where=where, action="use one document per file")


class _NodeReader:
    def __init__(self, name: str) -> None:
        self.name, self.nodes = name, 0
        self.places: dict[KeyPath, str] = {}
        self.errors: list[EdgetuneError] = []

    def error(self, node: yaml.Node, path: KeyPath, message: str, got: object = None, action: str = "") -> None:
        where = ", ".join([self.name, f"line {node.start_mark.line + 1}", *([format_path(path)] if path else [])])
        shown = got[:40] + "..." if isinstance(got, str) and len(got) > 40 else got
        self.errors.append(EdgetuneError(message, where=where, got=shown, action=action))

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.nodes += 1
        if self.nodes > MOST_NODES or len(path) > MOST_DEPTH:
            where = f"{self.name}, line {node.start_mark.line + 1}"
            raise EdgetuneError(f"aliases expand to more than {MOST_NODES} values", where=where)
        self.places.setdefault(path, f"line {node.start_mark.line + 1}")
        if node.tag not in _PLAIN:
            self.error(node, path, "tags are not supported", got=node.tag, action="write the plain value")
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or key.value == "<<":
                self.error(key, path, "merge keys (<<) are not supported", action="write the values out")
            elif not isinstance(key, yaml.ScalarNode) or key.tag != _TEXT:
                self.error(
                    key, path, "a key must be text", got=key.value if isinstance(key.value, str) else "a collection"
                )
            elif key.value in values:
                inner = (*path, key.value)
                self.error(key, inner, f"given twice, first in {self.places[inner]}", action="remove one")
            else:
                inner = (*path, key.value)
                self.places[inner] = f"line {key.start_mark.line + 1}"
                values[key.value] = self.value(value, inner)
        return values

    def scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        text, tag = str(node.value), node.tag
        if tag == _TEXT:
            return text
        if tag == _NULL:
            return None
        try:
            if tag == _BOOL:
                return {"true": True, "false": False}[text.lower()]
            number = int(text) if tag == _INT else float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except (ValueError, KeyError):  # reachable through an explicit tag, such as `!!int x`
            self.error(node, path, f"not a value of type {tag.rpartition(':')[2]}", got=text)
            return None
        if not (-(2**63) <= number < 2**63 if isinstance(number, int) else math.isfinite(number)):
            self.error(node, path, "a number must be finite and fit in 64 bits", got=text)
            return None
        return number
