"""The workspace that XNNPACK plans between the operators of a delegate."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgetune.program.workspace import workspace_bytes
from edgetune.program.xnnpack import Node, Value, XnnpackDelegate

KIB = 1024
BLOCK = KIB + 64  # with its padding, aligned


def delegate(*nodes: tuple[str, tuple[int, ...], int], sizes: dict[int, int] | None = None) -> XnnpackDelegate:
    """From (name, ids that are read, id that is written). Id 0 is the input, the last one written the output."""
    last = nodes[-1][2]
    values = {
        index: Value("fp32", ((sizes or {}).get(index, KIB) // 4,), False, 0, index in (0, last), index == last)
        for index in {0, *(out for _, _, out in nodes)}
    }
    made = [
        Node(name, {**{f"input{place}_id": i for place, i in enumerate(read)}, "output_id": out}, "")
        for name, read, out in nodes
    ]
    return XnnpackDelegate(tuple(made), values)


def test_a_function_writes_over_its_input_if_nothing_else_reads_it() -> None:
    chain = delegate(("conv2d", (0,), 1), ("sigmoid", (1,), 2), ("tanh", (2,), 3), ("conv2d", (3,), 4))
    assert workspace_bytes(chain) == BLOCK
    read_again = delegate(("conv2d", (0,), 1), ("sigmoid", (1,), 2), ("multiply", (2, 1), 3), ("conv2d", (3,), 4))
    assert workspace_bytes(read_again) == 2 * BLOCK


def test_a_layer_needs_its_input_beside_its_output() -> None:
    layers = [("conv2d", (place,), place + 1) for place in range(6)]
    assert workspace_bytes(delegate(*layers)) == 2 * BLOCK
    assert workspace_bytes(delegate(*layers, sizes={3: 3 * KIB})) == (3 * KIB + 64) + BLOCK
    shortcut = [*layers[:5], ("add", (5, 1), 6), ("conv2d", (6,), 7)]
    assert workspace_bytes(delegate(*shortcut)) == 3 * BLOCK


def test_inputs_and_outputs_lie_elsewhere() -> None:
    assert workspace_bytes(delegate(("sigmoid", (0,), 1))) == 0


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 3), st.booleans()), min_size=2, max_size=20))
def test_it_holds_what_lives_at_once_and_no_more_than_everything(cases: list[tuple[int, int, bool]]) -> None:
    nodes, sizes = [], {}
    for place, (kib, back, joined) in enumerate(cases):
        read = (place, max(place - back, 0)) if joined else (place,)
        nodes.append(("conv2d", read, place + 1))
        sizes[place + 1] = kib * KIB
    one = delegate(*nodes, sizes=sizes)
    inner = range(1, len(nodes))
    last = {index: max(place for place, (_, read, _) in enumerate(nodes) if index in read) for index in inner}
    alive = [sum(sizes[i] + 64 for i in inner if i - 1 <= place <= last[i]) for place in range(len(nodes))]
    assert max(alive) <= workspace_bytes(one) <= sum(sizes[i] + 64 for i in inner)
