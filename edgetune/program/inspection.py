"""The content of a `.pte`, as a value and as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from edgetune.core.numbers import align_columns, format_size
from edgetune.program.program_files import Record


class Slot(Record):
    """One input or output of a method. Numbers and text that are passed have neither type nor shape."""

    kind: str  # "tensor", "int", "bool", "double", "string", "list"
    dtype: str = ""
    shape: tuple[int, ...] = ()
    dynamic: bool = False  # the shape is the largest, not the only one

    def __str__(self) -> str:
        if self.kind != "tensor":
            return self.kind
        bound = "up to " if self.dynamic else ""
        return f"{self.dtype} {bound}{list(self.shape)}"


class Count(Record):
    """How often a method calls an operator."""

    name: str
    count: int


class Delegate(Record):
    """A subgraph that a backend runs. Its weights may be in `Inspection.constants` instead."""

    backend: str
    size_bytes: int
    calls: int
    settings: tuple[str, ...]  # names of its compile specs


class Method(Record):
    """One entry point of the program."""

    name: str
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    operators: tuple[Count, ...]  # kernels outside the delegates, most frequent first
    delegates: tuple[Delegate, ...]
    arenas_bytes: tuple[int, ...]  # planned memory; all of them at once


class Constant(Record):
    """One constant. Those of a delegate have neither type nor shape: only the backend knows their layout."""

    name: str
    size_bytes: int
    dtype: str = ""
    shape: tuple[int, ...] = ()
    kind: str = "constant"  # or "delegate's weight", "initial state", "external": in a .ptd

    @property
    def name_and_layout(self) -> tuple[str, str]:
        """For people: of a delegate's weight, the start of its checksum and what it is."""
        return (self.name, f"{self.dtype} {list(self.shape)}") if self.dtype else (self.name[:16], self.kind)


class FileShare(Record):
    """A share of the file."""

    name: str
    size_bytes: int


class Beside(Record):
    """The facts from `model.json`, or why it cannot be read."""

    path: str
    problem: str = ""  # why it cannot be read
    checksum_ok: bool = False
    target: str = ""
    device: str = ""
    versions: dict[str, str] = {}  # noqa: RUF012  pydantic copies it
    delegated_macs_pct: float | None = None
    parity: str = ""  # in words
    note: str = ""
    adapters: tuple[tuple[str, str], ...] = ()  # names and values for people

    def facts(self) -> list[tuple[str, str]]:
        """What it says besides the versions, as names and values for people."""
        share = "" if self.delegated_macs_pct is None else f"{self.delegated_macs_pct:.1f} % of multiply-accumulates"
        rows = [
            ("checksum", "ok" if self.checksum_ok else "WRONG: this manifest describes another program"),
            ("target", self.target),
            ("device", self.device),
            ("delegated", share),
            ("parity", self.parity),
            ("note", self.note),
            *self.adapters,
        ]
        return [(name, value) for name, value in rows if value]


class Inspection(Record):
    """A program file, taken apart. `str()` gives the text that `edgetune inspect` prints."""

    path: str
    size_bytes: int
    sha256: str
    schema_version: int
    methods: tuple[Method, ...]
    constants: tuple[Constant, ...]  # largest first
    parts: tuple[FileShare, ...]  # largest first; together the whole file
    beside: Beside | None

    def __str__(self) -> str:
        return text_of(self)


_MOST = 12  # constants and operators that are listed; the rest is counted


def text_of(inspection: Inspection) -> str:
    """All of it, most important first."""
    lines = [f"{inspection.path}: {format_size(inspection.size_bytes)}, schema version {inspection.schema_version}"]
    lines += _rows("in the file", [(part.name, format_size(part.size_bytes)) for part in inspection.parts])
    for method in inspection.methods:
        lines += _method(method)
    lines += _constants(inspection.constants)
    lines += _beside(inspection.beside)
    return "\n".join(lines)


def _method(method: Method) -> list[str]:
    lines = ["", f"method {method.name}"]
    lines += [f"  input {i}: {slot}" for i, slot in enumerate(method.inputs)]
    lines += [f"  output {i}: {slot}" for i, slot in enumerate(method.outputs)]
    arenas = " + ".join(format_size(arena) for arena in method.arenas_bytes)
    lines.append(f"  memory plan: {arenas or 'none'}")
    backends = Counter(delegate.backend for delegate in method.delegates)
    for backend, count in backends.most_common():
        taken = [delegate for delegate in method.delegates if delegate.backend == backend]
        total = format_size(sum(delegate.size_bytes for delegate in taken))
        calls = sum(delegate.calls for delegate in taken)
        lines.append(f"  delegated to {backend}: {count} {'part' if count == 1 else 'parts'}, {total}, {calls} calls")
    kernels = sum(operator.count for operator in method.operators)
    lines.append(f"  kernels outside delegates: {kernels} calls of {len(method.operators)} operators")
    lines += _columns([(str(operator.count), operator.name) for operator in method.operators[:_MOST]])
    return lines + _rest(len(method.operators))


def _constants(constants: Sequence[Constant]) -> list[str]:
    if not constants:
        return ["", "constants: none outside the delegates"]
    inside = sum(constant.size_bytes for constant in constants if constant.kind != "external")
    lines = ["", f"constants: {len(constants)}, {format_size(inside)}"]
    table = [(format_size(c.size_bytes), *reversed(c.name_and_layout)) for c in constants[:_MOST]]
    lines += _columns(table)
    return lines + _rest(len(constants))


def _beside(beside: Beside | None) -> list[str]:
    if beside is None:
        return ["", "no model.json: versions, parity and checksum are unknown"]
    if beside.problem:
        return ["", f"{beside.path} cannot be read: {beside.problem}"]
    versions = ", ".join(f"{name} {version}" for name, version in beside.versions.items())
    rows = [*beside.facts(), *([("versions", versions)] if versions else [])]
    return ["", *_rows(f"from {beside.path}", rows)]


def _rows(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    return [title, *(f"  {line}" for line in align_columns(rows))]


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"    {line}" for line in align_columns(rows, right={0})]


def _rest(total: int) -> list[str]:
    return [f"    ... and {total - _MOST} more"] if total > _MOST else []
