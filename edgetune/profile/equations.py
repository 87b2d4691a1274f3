"""What timed programs say of the rates of the kernels' terms, as equations, and the positive rates that fit them best.

A program whose operators were recorded gives an equation for each of them, one for each stretch of the backend's calls
and one for the whole: the backend counts its kernels in whole microseconds, a call as a whole is timed exactly. Any
other program gives one equation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgetune.core.registry import require
from edgetune.profile.terms import (
    CALL,
    DELEGATE,
    SINGLE,
    TRAFFIC,
    CacheSizes,
    KernelTile,
    Key,
    curve_of,
    delegate_calls_of,
    moved_bytes,
    terms_of,
    traffic_terms,
)
from edgetune.program.operators import DType, Operator
from edgetune.runtime.operator_times import Stretch

Rates = dict[Key, float]
Terms = Mapping[Key, float]
Floats = NDArray[np.float64]

_NETWORK_IMPORTANCE = 2.0  # of a network that is known as a whole alone, which shows operators in context
_SUM_IMPORTANCE = 3.0  # of a recorded sum, beside the square root of the number of its operators
_UNCERTAIN_US = 7.0  # errors of a kernel's own time are relative to the hypotenuse of it and this
_EXACT_US = 0.5  # the same for a stretch of kernels, or a kernel outside of the backend
_LEAST_US = 0.05  # of a recorded operator
_SOFT = 0.1  # relative errors above it get less weight
_SWEEPS = 8
_OVERLAP = 2.5  # exponent of the norm of computing and waiting: 1 would be one after the other
_EVEN = 1e-3  # pull towards equal shares for kernels that always occur together


@dataclass(frozen=True)
class Timed:
    """One program and its latency in microseconds, and that of each of its operators and stretches if recorded.

    `network`: not a chain of one operator. `family`: of networks that are alike, and are left out together.
    """

    name: str
    operators: tuple[Operator, ...]
    us: float
    network: bool = False
    operator_us: tuple[float, ...] = ()
    stretches: tuple[Stretch, ...] = ()
    family: str = ""


@dataclass(frozen=True)
class Setting:
    """What the terms depend on besides the operator."""

    caches: CacheSizes
    tiles: Mapping[DType, KernelTile] = field(default_factory=dict)
    stand_ins: Mapping[str, str] = field(default_factory=dict)  # curve -> the one fitted in its place

    def tile(self, dtype: DType) -> KernelTile:
        """The tile of this type's products."""
        return self.tiles.get(dtype, SINGLE)


@dataclass(frozen=True)
class OperatorTerms:
    """The terms of one operator: what it computes, and what it waits for beyond the caches meanwhile."""

    own: Terms
    traffic: Terms

    def us(self, rates: Mapping[Key, float]) -> float:
        """Microseconds by these rates; a term without a rate counts nothing."""
        return overlapped(*(sum(size * rates.get(key, 0.0) for key, size in terms.items()) for terms in self.both))

    @property
    def both(self) -> tuple[Terms, Terms]:
        """The two, in order."""
        return self.own, self.traffic


def overlapped(own_us: float, traffic_us: float) -> float:
    """The time of computing and of waiting for memory meanwhile: a smooth maximum of the two."""
    return float((own_us**_OVERLAP + traffic_us**_OVERLAP) ** (1 / _OVERLAP))


@dataclass(frozen=True)
class Equation:
    """Operators and calls that take `us` together. `scale_us`: what the error is relative to."""

    parts: Sequence[OperatorTerms]
    calls: Terms
    us: float
    scale_us: float
    importance: float


def parts_of(operators: Sequence[Operator], setting: Setting) -> list[OperatorTerms]:
    """The terms of each operator of a program."""
    moved = moved_bytes(operators)
    parts: list[OperatorTerms] = []
    for operator in operators:
        curve = curve_of(operator)
        curve = setting.stand_ins.get(curve, curve)
        own, traffic = terms_of(operator, setting.tile(operator.dtype)), traffic_terms(operator, moved, setting.caches)
        named = ((curve, own), (TRAFFIC, traffic))
        parts.append(OperatorTerms(*({(name, term): size for term, size in terms.items()} for name, terms in named)))
    return parts


def calls_of(operators: Sequence[Operator]) -> dict[Key, float]:
    """The call of a program, and those of the backend."""
    return {(CALL, "1"): 1.0, (DELEGATE, "1"): float(delegate_calls_of(operators))}


def program_us(parts: Sequence[OperatorTerms], calls: Terms, rates: Mapping[Key, float]) -> float:
    """Microseconds of a program."""
    return sum(size * rates.get(key, 0.0) for key, size in calls.items()) + sum(part.us(rates) for part in parts)


def equations_of(item: Timed, setting: Setting) -> Iterator[Equation]:
    """What one timed program says."""
    parts, calls = parts_of(item.operators, setting), calls_of(item.operators)
    if not item.operator_us:
        yield Equation(parts, calls, item.us, item.us, _NETWORK_IMPORTANCE if item.network else 1.0)
        return
    yield Equation(parts, calls, item.us, item.us, _SUM_IMPORTANCE * len(parts) ** 0.5)
    for part, measured_us in zip(parts, item.operator_us, strict=True):
        us = max(measured_us, _LEAST_US)
        yield Equation([part], {}, us, math.hypot(us, _UNCERTAIN_US), 1.0)
    for one in item.stretches:
        us, own = max(one.us, _LEAST_US), parts[one.places.start : one.places.stop]
        importance = _SUM_IMPORTANCE * len(own) ** 0.5
        yield Equation(own, {(DELEGATE, "1"): float(one.calls)}, us, math.hypot(us, _EXACT_US), importance)


class System:
    """Equations as matrices, of which any part can be solved."""

    def __init__(self, equations: Sequence[Equation]) -> None:
        sparse = require("scipy.sparse", "a calibration")
        numbers: dict[int, int] = {}  # of each operator's parts, which several equations share
        parts: list[OperatorTerms] = []
        rows: list[int] = []
        columns: list[int] = []
        for row, one in enumerate(equations):
            for part in one.parts:
                if id(part) not in numbers:
                    numbers[id(part)] = len(parts)
                    parts.append(part)
                rows.append(row)
                columns.append(numbers[id(part)])
        keys = {key for part in parts for terms in part.both for key in terms}
        self.keys = sorted(keys.union(*(one.calls for one in equations)))
        self._own, self._traffic = (self._matrix([part.both[which] for part in parts]) for which in (0, 1))
        self._calls = self._matrix([one.calls for one in equations])
        shape = (len(equations), len(parts))
        self._sums = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape)
        self._us = np.array([one.us for one in equations])
        self._scale_us = np.array([one.scale_us for one in equations])
        self._importance = np.array([one.importance for one in equations]) ** 0.5

    def _matrix(self, rows: Sequence[Terms]) -> Floats:
        place = {key: index for index, key in enumerate(self.keys)}
        matrix = np.zeros((len(rows), len(self.keys)))
        for row, terms in enumerate(rows):
            for key, size in terms.items():
                matrix[row, place[key]] = size
        return matrix

    def solve(self, chosen: NDArray[np.bool_] | None = None) -> Rates:
        """Positive rates with the least relative error, from all equations or from those `chosen`.

        The time of an operator is homogeneous in the rates, so that it is the sum of its derivatives times the rates
        (Euler): each sweep solves that linear system with the derivatives at the rates of the sweep before. Terms that
        grow together in all equations are only determined by their sum; a slight pull on each term's part (Hoerl and
        Kennard 1970) shares it evenly, where plain least squares would give all of it to one.
        """
        nnls = require("scipy.optimize", "a calibration").nnls
        every = np.ones(len(self._us), dtype=bool) if chosen is None else chosen
        sums, calls, scale_us, importance = (
            part[every] for part in (self._sums, self._calls, self._scale_us, self._importance)
        )
        goal = self._us[every] / scale_us
        full = (sums @ (self._own + self._traffic) + calls) / scale_us[:, None]  # as if nothing overlapped
        used = np.flatnonzero(full.any(axis=0))
        own, traffic, calls, full = self._own[:, used], self._traffic[:, used], calls[:, used], full[:, used]
        weights, rates = importance, np.ones(len(used))
        shares = np.ones(len(own)), np.ones(len(own))
        for _ in range(_SWEEPS):
            matrix = (sums @ (shares[0][:, None] * own + shares[1][:, None] * traffic) + calls) / scale_us[:, None]
            lengths = np.linalg.norm(full * weights[:, None], axis=0)  # of a term that hides behind others, too
            weighted = matrix * weights[:, None] / lengths
            # least squares of the triangle has the same solution as that of all rows
            triangle = np.linalg.cholesky(weighted.T @ weighted + _EVEN**2 * np.eye(len(used)))
            side = np.linalg.solve(triangle, weighted.T @ (goal * weights))
            solution, _ = nnls(triangle.T, side, maxiter=50 * len(used))
            rates = solution / lengths
            shares = _derivatives(own @ rates, traffic @ rates)
            errors = np.abs(matrix @ rates - goal)
            weights = importance / np.maximum(1, errors / _SOFT) ** 0.5
        return {self.keys[place]: float(rate) for place, rate in zip(used, rates, strict=True)}


def _derivatives(own_us: Floats, traffic_us: Floats) -> tuple[Floats, Floats]:
    """Of `overlapped`, by each of the two."""
    whole = np.maximum((own_us**_OVERLAP + traffic_us**_OVERLAP) ** (1 / _OVERLAP), 1e-12)
    power = _OVERLAP - 1
    return (own_us / whole) ** power, (traffic_us / whole) ** power
