"""The measured time of each operator: what the runtime recorded, matched with the operators of the program's file.

XNNPACK has its own names for kernels, may run one operator by two of them (a sum, then its clamp), and does not run
what it has fused. Kernels and operators are matched in order, by what they compute.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.program.operator_kinds import is_free
from edgetune.program.operators import Operator
from edgetune.runtime.clock.events import DELEGATE, Instruction

_XNNPACK = "xnnpack."
_ROUNDED_US = 1.0  # XNNPACK rounds each of its times down, by less than this
_PRODUCT, _CLAMP, _RESHAPE = "product", "clamp", "staticreshape"
_KINDS = {  # names of XNNPACK's operators in a file and of its kernels, as far as letters alone do not show the same
    **dict.fromkeys(
        ("fullyconnected", "dynamicfullyconnected", "conv2d", "depthwiseconv2d", "convtranspose2d", "convolution",
         "deconvolution"),
        _PRODUCT,
    ),
    **dict.fromkeys(("globalavgpooling2d", "globalaveragepooling", "sum"), "mean"),
    **dict.fromkeys(("avgpooling2d", "averagepooling"), "average"),
    "divide": "div", "maxpooling2d": "maxpooling", "statictranspose": "transpose", "staticslice": "slice",
    "staticconstantpad": "constantpad", "concatenate": "copy", "staticresizebilinear2d": "resizebilinear",
    "invalidunaryop": "lookup",  # it has no name of its own
}  # fmt: skip


@dataclass(frozen=True)
class Stretch:
    """Neighbours that were recorded together: what the backend runs between two operators outside, or one of those."""

    places: range  # of its operators
    kernels: tuple[tuple[str, float], ...]  # names and microseconds
    us: float  # from the first to the last of them, which the kernels' rounded times only add up to about
    calls: int  # of the backend


def stretches(recorded: Sequence[Instruction], operators: Sequence[Operator]) -> list[Stretch]:
    """The operators that a call executes, in order, cut at every one outside of the backend.

    `recorded`: the call's instructions. `operators`: of the same call, in order, as they stand in `model.json`. Raises
    `EdgetuneError` (exit code 5) if the two are not of one program.
    """
    return list(_stretches(recorded, operators))


def operator_times_us(recorded: Sequence[Instruction], operators: Sequence[Operator]) -> tuple[float, ...]:
    """The time of each operator that a call executes, in microseconds; 0 if the backend fused it into another.

    Takes and raises what `stretches` does.
    """
    return times_of(stretches(recorded, operators), operators)


def times_of(parts: Sequence[Stretch], operators: Sequence[Operator]) -> tuple[float, ...]:
    """The same of a call that is cut already."""
    times = [0.0] * len(operators)
    for part in parts:
        names = [_kind(operators[place].operator) for place in part.places]
        matched = _match([_kind(name) for name, _ in part.kernels], names)
        for (_, us), index in zip(part.kernels, matched, strict=True):
            times[part.places[index]] += us
    return tuple(times)


def layer_times_ms(recorded: Sequence[Instruction], operators: Sequence[Operator]) -> dict[str, float]:
    """Milliseconds by module, "" for what belongs to none. Raises as `operator_times_us` does."""
    times_ms: dict[str, float] = {}
    for operator, us in zip(operators, operator_times_us(recorded, operators), strict=True):
        times_ms[operator.module] = times_ms.get(operator.module, 0.0) + us / 1e3
    return times_ms


def _stretches(recorded: Sequence[Instruction], operators: Sequence[Operator]) -> Iterator[Stretch]:
    outside = [place for place, one in enumerate(operators) if not one.operator.startswith(_XNNPACK)]
    alone = [name for name, _, kernels in recorded if not kernels]
    places = iter(_place_portable(alone, [operators[place].operator for place in outside]))
    start = 0
    calls: list[Instruction] = []  # of the backend, since the last operator outside
    for instruction in recorded:
        _, us, kernels = instruction
        if kernels:
            calls.append(instruction)
            continue
        index = next(places)
        if index is None:
            continue
        place = outside[index]
        yield from _inside(calls, range(start, place))
        yield Stretch(range(place, place + 1), ((operators[place].operator, us),), us, 0)
        start, calls = place + 1, []
    yield from _inside(calls, range(start, len(operators)))


def _inside(calls: Sequence[Instruction], places: range) -> Iterator[Stretch]:
    """The backend's calls between two operators outside, if there are any."""
    if not calls:
        return
    kernels = tuple(kernel for _, us, own in calls for kernel in _unrounded(us, own))
    if not places:
        raise _mismatch(kernels[0][0])
    yield Stretch(places, kernels, sum(us for _, us, _ in calls), len(calls))


def _place_portable(recorded: Sequence[str], operators: Sequence[str]) -> list[int | None]:
    """For each instruction outside of XNNPACK the index of its operator, in order; `None` for one that is free.

    Kernels from other libraries, and the runtime's own arithmetic with sizes, are recorded without a name.
    """
    rows, columns = len(recorded), len(operators)
    names = ["" if name == DELEGATE else name for name in recorded]
    free = [name != DELEGATE and (not name or is_free(f"aten.{name}")) for name in recorded]
    fits = [[name == "" or operator.endswith(f".{name}") for operator in operators] for name in names]
    possible = [[False] * (columns + 1) for _ in range(rows + 1)]  # to place what follows each of the two
    possible[rows][columns] = True
    for row in range(rows - 1, -1, -1):
        for column in range(columns, -1, -1):
            here = column < columns and fits[row][column] and possible[row + 1][column + 1]
            possible[row][column] = here or (free[row] and possible[row + 1][column])
    if not possible[0][0]:
        raise _mismatch(next((name for name in recorded if name), "none"))
    places: list[int | None] = []
    column = 0
    for row in range(rows):
        here = column < columns and fits[row][column] and possible[row + 1][column + 1]
        places.append(column if here else None)
        column += here
    return places


def _mismatch(name: str) -> EdgetuneError:
    return EdgetuneError(
        "the operators that ran are not those of the program's manifest",
        got=name,
        action="export the model again with this version of edgetune and executorch",
        exit_code=Exit.EXPORT,
    )


def _unrounded(us: float, kernels: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The kernels of a delegate with what rounding took from them: what it took beyond their sum, in equal shares."""
    lost = max(us - sum(of for _, of in kernels), 0.0) / len(kernels)
    return [(name, of + min(lost, _ROUNDED_US)) for name, of in kernels]


def _kind(name: str) -> str:
    """What an operator or a kernel computes: both `xnnpack.conv2d` and `Convolution (NHWC, F32) GEMM` are `product`."""
    plain = name.removeprefix(_XNNPACK).partition(" (")[0].partition(" #")[0].lower()
    letters = re.sub(r"[^a-z0-9]", "", "convert" if plain.startswith("convert") else plain)  # it is named by its types
    return _KINDS.get(letters, letters)


def _match(kernels: Sequence[str], operators: Sequence[str]) -> list[int]:
    """For each kernel the index of its operator: the alignment in order with the fewest differences.

    A kernel without an operator belongs to the one before it. Names of the same operator that are not known to be the
    same are taken for it where there is one on each side.
    """
    renamed = sorted(set(kernels) - set(operators) - {_CLAMP}), sorted(set(operators) - set(kernels) - {_RESHAPE})
    if len(renamed[0]) == len(renamed[1]) == 1:
        kernels = [renamed[1][0] if kernel == renamed[0][0] else kernel for kernel in kernels]
    if list(kernels) == list(operators):
        return list(range(len(operators)))
    rows, columns = len(kernels), len(operators)
    cost = [[0.0] * (columns + 1) for _ in range(rows + 1)]  # of matching what follows each kernel and operator
    for row in range(rows, -1, -1):
        for column in range(columns, -1, -1):
            if row < rows or column < columns:
                cost[row][column] = min(_steps(cost, kernels, operators, row, column))[0]
    indices: list[int] = []
    row = column = 0
    while row < rows:
        _, kind = min(_steps(cost, kernels, operators, row, column))
        if kind != "fused":
            indices.append(max(column - (kind == "further"), 0))
            row += 1
        column += kind != "further"
    return indices


def _steps(
    cost: Sequence[Sequence[float]], kernels: Sequence[str], operators: Sequence[str], row: int, column: int
) -> Iterator[tuple[float, str]]:
    """What it costs to match from here on, by what is done first."""
    if row < len(kernels) and column < len(operators) and kernels[row] == operators[column]:
        yield cost[row + 1][column + 1], "both"
    if row < len(kernels):
        yield cost[row + 1][column] + 1.0, "further"
    if column < len(operators):
        yield cost[row][column + 1] + 1.0, "fused"
