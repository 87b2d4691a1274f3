"""Tensor data (`.ptd`): the file in which ExecuTorch keeps weights apart from a program, each under a key.

Read and written here by the schema `flat_tensor.fbs`: executorch's own code for it imports a compiler, which takes
seconds. The file is a flatbuffer with a header after its first eight bytes, followed by the weights' bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.core.registry import require

_IDENTIFIER, _MAGIC = b"FT01", b"FH01"
_HEADER = struct.Struct("<4sIQQQQ")  # magic, length, offset and size of the flatbuffer, offset and size of the weights
_HEADER_BYTES = 48  # padded to 16
_BEFORE_HEADER = 8
_ALIGNMENT = 128  # of each weight
_FIELDS = (4, 6, 8)  # where a table's fields stand in its vtable


@dataclass(frozen=True)
class TensorLayout:
    """Type, shape and order of dimensions of a tensor that a kernel reads; the weights of delegates have none."""

    scalar_type: int
    sizes: tuple[int, ...]
    dim_order: tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One weight's bytes."""

    data: bytes
    layout: TensorLayout | None = None


def read_tensor_data(source: bytes | Path) -> dict[str, Weight]:
    """The weights of a `.ptd`, by key. Raises `ValueError` if it is not one, or is damaged."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    if data[4:8] != _IDENTIFIER or len(data) < _BEFORE_HEADER + _HEADER.size:
        raise ValueError("not tensor data of ExecuTorch")
    magic, _, _, _, base, size = _HEADER.unpack_from(data, _BEFORE_HEADER)
    if magic != _MAGIC or base + size > len(data):
        raise ValueError("the header of the tensor data does not fit the file")
    try:
        return dict(_weights(data, base))
    except (struct.error, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"the tensor data is damaged ({type(error).__name__}: {error})") from error


def write_tensor_data(weights: Mapping[str, Weight]) -> bytes:
    """A `.ptd` with these weights; equal bytes are stored once."""
    segments: dict[bytes, tuple[int, int]] = {}  # bytes -> index and offset
    body = bytearray()
    for weight in weights.values():
        if weight.data not in segments:
            body += b"\0" * (-len(body) % _ALIGNMENT)
            segments[weight.data] = len(segments), len(body)
            body += weight.data
    flat = _flatbuffer(weights, segments)
    begin = _HEADER_BYTES + len(flat)
    base = begin + -begin % _ALIGNMENT
    header = _HEADER.pack(_MAGIC, _HEADER.size, _HEADER_BYTES, len(flat), base, len(body)).ljust(_HEADER_BYTES, b"\0")
    root = struct.pack("<I", struct.unpack_from("<I", flat)[0] + _HEADER_BYTES)
    front = root + flat[len(root) : _BEFORE_HEADER] + header + flat[_BEFORE_HEADER:]
    return front.ljust(base, b"\0") + bytes(body)


def merge_tensor_data(*sources: bytes | Path) -> bytes:
    """One `.ptd` with the weights of several, whose keys differ."""
    merged: dict[str, Weight] = {}
    for source in sources:
        merged |= read_tensor_data(source)
    return write_tensor_data(merged)


def _weights(data: bytes, base: int) -> Iterator[tuple[str, Weight]]:
    root = _table(data, 0)
    segments = [(_number(t, 0, "Uint64"), _number(t, 1, "Uint64")) for t in _tables(root, 1)]
    for entry in _tables(root, 2):
        offset, size = segments[_number(entry, 1, "Uint32")]
        tensor = _inner(entry, 2)
        layout = tensor and TensorLayout(
            _number(tensor, 0, "Int8"), tuple(_numbers(tensor, 1, "Int32")), tuple(_numbers(tensor, 2, "Uint8"))
        )
        key = entry.String(entry.Pos + _offset(entry, 0)).decode()
        yield key, Weight(data[base + offset : base + offset + size], layout)


def _table(data: bytes, place: int) -> Any:
    table = require("flatbuffers.table", "export")
    return table.Table(data, place + struct.unpack_from("<I", data, place)[0])


def _offset(table: Any, field: int) -> int:
    return int(table.Offset(_FIELDS[field]))


def _number(table: Any, field: int, kind: str) -> int:
    types = require("flatbuffers.number_types", "export")
    offset = _offset(table, field)
    return int(table.Get(getattr(types, f"{kind}Flags"), table.Pos + offset)) if offset else 0


def _inner(table: Any, field: int) -> Any:
    offset = _offset(table, field)
    return _table(table.Bytes, table.Pos + offset) if offset else None


def _tables(table: Any, field: int) -> Iterator[Any]:
    offset = _offset(table, field)
    for place in range(table.VectorLen(offset) if offset else 0):
        yield _table(table.Bytes, table.Vector(offset) + 4 * place)


def _numbers(table: Any, field: int, kind: str) -> Iterator[int]:
    flags = getattr(require("flatbuffers.number_types", "export"), f"{kind}Flags")
    offset = _offset(table, field)
    for place in range(table.VectorLen(offset) if offset else 0):
        yield int(table.Get(flags, table.Vector(offset) + flags.bytewidth * place))


def _flatbuffer(weights: Mapping[str, Weight], segments: Mapping[bytes, tuple[int, int]]) -> bytes:
    builder = require("flatbuffers", "export").Builder(1024)

    def vector(items: Any, width: int, add: Any) -> int:
        builder.StartVector(width, len(items), width)
        for item in reversed(items):
            add(item)
        return int(builder.EndVector())

    stored = []
    for data, (_, offset) in segments.items():
        builder.StartObject(2)
        builder.PrependUint64Slot(0, offset, 0)
        builder.PrependUint64Slot(1, len(data), 0)
        stored.append(builder.EndObject())
    named = []
    for key, weight in weights.items():
        name, layout = builder.CreateString(key), None
        if weight.layout is not None:
            sizes = vector(weight.layout.sizes, 4, builder.PrependInt32)
            order = vector(weight.layout.dim_order, 1, builder.PrependUint8)
            builder.StartObject(3)
            builder.PrependInt8Slot(0, weight.layout.scalar_type, 0)
            builder.PrependUOffsetTRelativeSlot(1, sizes, 0)
            builder.PrependUOffsetTRelativeSlot(2, order, 0)
            layout = builder.EndObject()
        builder.StartObject(3)
        builder.PrependUOffsetTRelativeSlot(0, name, 0)
        builder.PrependUint32Slot(1, segments[weight.data][0], 0)
        if layout is not None:
            builder.PrependUOffsetTRelativeSlot(2, layout, 0)
        named.append(builder.EndObject())
    tables = [vector(each, 4, builder.PrependUOffsetTRelative) for each in (stored, named)]
    builder.StartObject(3)
    for field, table in enumerate(tables, 1):
        builder.PrependUOffsetTRelativeSlot(field, table, 0)
    builder.Finish(builder.EndObject(), file_identifier=_IDENTIFIER)
    return bytes(builder.Output())
