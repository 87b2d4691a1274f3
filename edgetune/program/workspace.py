"""The memory that XNNPACK plans for the tensors between the operators of a delegate.

As in its `memory-planner.c`: the largest tensor first, each in the tightest gap among those that live while it does; an
operator of one value writes over its input, if nothing else reads that.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgetune.program.xnnpack import FUNCTIONS, XnnpackDelegate

_PADDING_BYTES, _ALIGNMENT_BYTES = 16, 64
_IN_PLACE = FUNCTIONS | {
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "softmax", "static-reshape", "copy",
    "squared-difference",
}  # fmt: skip


@dataclass
class _Block:
    """Memory for one tensor, or for several that are written over each other. From the first node to the last."""

    size: int
    first: int
    last: int
    start: int = 0

    @property
    def end(self) -> int:
        return self.start + self.size


def workspace_bytes(delegate: XnnpackDelegate) -> int:
    """The size of the workspace of one delegate. Those of a program share the largest."""
    placed: list[_Block] = []
    for block in sorted(_blocks(delegate), key=lambda block: -block.size):
        beside = [other for other in placed if other.first <= block.last and other.last >= block.first]
        block.start = _tightest_gap(block.size, sorted(beside, key=lambda other: other.start))
        placed.append(block)
    return max((block.end for block in placed), default=0)


def _blocks(delegate: XnnpackDelegate) -> list[_Block]:
    blocks: dict[int, _Block] = {}
    readers: dict[int, int] = {}
    for node in delegate.nodes:
        for index in node.inputs:
            readers[index] = readers.get(index, 0) + 1
    for place, node in enumerate(delegate.nodes):
        for index in node.inputs:
            if index in blocks:
                blocks[index].last = place
        value = delegate.values[node.output]
        if value.external:
            continue
        size = -(-(value.bytes + _PADDING_BYTES) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        alone = [blocks[i] for i in node.inputs if i in blocks and readers[i] == 1 and blocks[i].size == size]
        blocks[node.output] = alone[0] if node.name in _IN_PLACE and alone else _Block(size, place, place)
    return list({id(block): block for block in blocks.values()}.values())


def _tightest_gap(size: int, beside: list[_Block]) -> int:
    """Where it starts: in the smallest gap that holds it, or after all. `beside`: by their starts."""
    start, best, spare = 0, None, 0
    for block in beside:
        gap = block.start - start
        if gap >= size and (best is None or gap < spare):
            best, spare = start, gap
        start = max(start, block.end)
    return start if best is None else best
