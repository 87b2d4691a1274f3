"""Store data once that is both a constant and a delegate's weight, such as a tied embedding table.

executorch 1.4.1 writes a tied 8-bit table twice: among the constants, for the lookup, and as data that XNNPACK packs
for the output layer. Both are ranges of the file, and the ranges may overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_MIN_BYTES = 2**12


@dataclass
class Savings:
    """How many bytes were not written a second time."""

    bytes: int = 0


@contextmanager
def dedupe_constants() -> Iterator[Savings]:
    """Inside, executorch writes delegate data that equals a constant as a range of the constants."""
    from executorch.exir._serialize import _program

    savings = Savings()
    stock_extract, stock_write = _program._extract_named_data, _program._program_to_flatbuffer
    ranges: dict[int, tuple[int, int]] = {}  # segment -> offset in the constant segment, and size

    def extract(program: Any, segments: list[Any], buffers: Sequence[bytes], names: dict[str, Any]) -> None:
        offsets, constants = _constants(program, segments)
        first = len(segments)
        stock_extract(program, segments, buffers, names)
        for index in range(first, len(segments)):
            data = bytes(segments[index].data)
            offset = _find_constant(data, offsets, constants)
            if offset is not None and offset % segments[index].alignment == 0:
                ranges[index] = offset, len(data)
                segments[index].data = _program.Cord()
                savings.bytes += len(data)

    def write(program: Any, **settings: Any) -> Any:
        for index, (offset, size) in ranges.items():
            constants = program.segments[program.constant_segment.segment_index]
            program.segments[index].offset, program.segments[index].size = constants.offset + offset, size
        ranges.clear()
        return stock_write(program, **settings)

    _program._extract_named_data, _program._program_to_flatbuffer = extract, write
    try:
        yield savings
    finally:
        _program._extract_named_data, _program._program_to_flatbuffer = stock_extract, stock_write


def _constants(program: Any, segments: list[Any]) -> tuple[list[int], memoryview]:
    """The offset of each constant in the constant segment, and that segment."""
    segment = program.constant_segment
    if segment is None or not segment.offsets or not segments:
        return [], memoryview(b"")
    return list(segment.offsets), memoryview(bytes(segments[segment.segment_index].data))


def _find_constant(data: bytes, offsets: list[int], constants: memoryview) -> int | None:
    """The offset of a constant that begins with the data."""
    if len(data) < _MIN_BYTES:
        return None
    return next((at for at in offsets if constants[at : at + len(data)] == data), None)
