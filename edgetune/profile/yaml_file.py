"""Descriptor files: YAML read by a safe loader that refuses what hides mistakes, and written in one step."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from edgetune.core.errors import EdgetuneError
from edgetune.core.files import write_whole

_MOST_CHARACTERS = 262_144


_C: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # seven times as fast, where PyYAML was built with libyaml


class _Fast(_C):  # type: ignore[misc]
    """For text without aliases; what it refuses, `_Loader` reads again and gives the reason."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if len({str(key.value) for key, _ in node.value}) != len(node.value):
            raise yaml.YAMLError("a key is given twice")
        return super().construct_mapping(node, deep)


class _Loader(yaml.SafeLoader):
    """Safe, without aliases (they can grow without bound) and without a key given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"line {line}: aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {name!r} is given twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe, and writes a value that occurs twice twice: what is written must be read again."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_yaml(text: str, where: str) -> object:
    """What the text holds; `EdgetuneError` with the line for anything unsafe or malformed."""
    if len(text) > _MOST_CHARACTERS:
        raise EdgetuneError(f"the file is longer than {_MOST_CHARACTERS} characters", where=where, got=len(text))
    if "*" not in text:  # no alias can be in it
        with suppress(yaml.YAMLError, RecursionError, ValueError):
            return yaml.load(text, _Fast)
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        fact = " ".join(str(error).split())
        raise EdgetuneError(f"not readable as YAML: {fact}", where=where, action="correct the file") from error


def write_yaml(path: Path, content: object) -> None:
    """Write so that the file is either the old one or the whole new one, also when the process is killed."""
    write_whole(path, yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))
