"""What a head and an embedding share is stored once in a program.

A tied table quantized to 8 bits is the same bytes for both, but executorch 1.4.1 writes them twice: once among the
constants, for the lookup, and once as data that XNNPACK packs for its product. Both are ranges of the file, which may
be the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_LEAST = 2**12  # bytes; smaller ones are not worth a range of their own


@dataclass
class Shared:
    """How much was left out of the file."""

    bytes: int = 0


@contextmanager
def stored_once() -> Iterator[Shared]:
    """While a program is written, data of a delegate that is also a constant becomes a range of the constants."""
    from executorch.exir._serialize import _program

    found = Shared()
    stock_extract, stock_write = _program._extract_named_data, _program._program_to_flatbuffer
    ranges: dict[int, tuple[int, int]] = {}  # segment -> its place among the constants, and its size

    def extract(program: Any, segments: list[Any], buffers: Sequence[bytes], names: dict[str, Any]) -> None:
        offsets, constants = _constants(program, segments)
        first = len(segments)
        stock_extract(program, segments, buffers, names)
        for index in range(first, len(segments)):
            data = bytes(segments[index].data)
            place = _place(data, offsets, constants)
            if place is not None and place % segments[index].alignment == 0:
                ranges[index] = place, len(data)
                segments[index].data = _program.Cord()
                found.bytes += len(data)

    def write(program: Any, **settings: Any) -> Any:
        for index, (place, size) in ranges.items():
            constants = program.segments[program.constant_segment.segment_index]
            program.segments[index].offset, program.segments[index].size = constants.offset + place, size
        ranges.clear()
        return stock_write(program, **settings)

    _program._extract_named_data, _program._program_to_flatbuffer = extract, write
    try:
        yield found
    finally:
        _program._extract_named_data, _program._program_to_flatbuffer = stock_extract, stock_write


def _constants(program: Any, segments: list[Any]) -> tuple[list[int], memoryview]:
    """Where each constant begins in the constant segment, and that segment."""
    known = program.constant_segment
    if known is None or not known.offsets or not segments:
        return [], memoryview(b"")
    return list(known.offsets), memoryview(bytes(segments[known.segment_index].data))


def _place(data: bytes, offsets: list[int], constants: memoryview) -> int | None:
    """Where a constant begins that holds the data."""
    if len(data) < _LEAST:
        return None
    return next((at for at in offsets if constants[at : at + len(data)] == data), None)
