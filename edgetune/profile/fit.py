"""Fit a calibration to timed programs: fixed costs first, then two shares for each kind and type of operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgetune.profile.cost import Fixed, compute_us, memory_us, prior, unfolded, weights_cached
from edgetune.profile.device import Efficiency
from edgetune.profile.operators import DType, Kind, Operator
from edgetune.profile.rates import Rates
from edgetune.technique import EdgetuneError

Key = tuple[Kind, DType, bool]
Shares = tuple[float, float]  # compute, memory

COMPUTE_BOUNDS, MEMORY_BOUNDS = (1e-5, 16.0), (1e-4, 64.0)
_STEPS = (4.0, 2.0, 1.4, 1.15, 1.04, 1.01)  # of the pattern search, as factors
_PULL = 0.01  # of the prior, where the programs do not tell one share from the other
_SWEEPS = 3
_LEAST_US = 0.05


@dataclass(frozen=True)
class Timed:
    """One program and its median latency in microseconds."""

    name: str
    operators: tuple[Operator, ...]
    delegate_calls: int
    us: float


@dataclass(frozen=True)
class Fit:
    """What came out. Errors are relative, in percent, each program predicted from the others."""

    efficiencies: tuple[Efficiency, ...]
    errors_pct: dict[str, float]


def key_of(operator: Operator) -> Key:
    """What shares are fitted for."""
    return operator.kind, operator.dtype, operator.delegated


@dataclass(frozen=True)
class _Program:
    """A timed program, reduced to what the fit evaluates again and again."""

    name: str
    us: float
    fixed_us: float
    parts: tuple[tuple[Key, float, float], ...]  # key, microseconds of arithmetic and of traffic at the peak

    def predict(self, shares: dict[Key, Shares]) -> float:
        own = sum(max(c / shares[key][0], m / shares[key][1]) for key, c, m in self.parts)
        return self.fixed_us + own


def fixed_costs(one: Timed, many: Timed, portable_one: Timed, portable_many: Timed) -> Fixed:
    """Fixed costs from tiny programs: one operator against many, delegated and portable.

    Two programs whose times noise has turned around give the least positive cost, not a negative one.
    """
    delegated = _slope(one, many)
    portable = _slope(portable_one, portable_many)
    call = max(portable_one.us - portable * len(portable_one.operators), _LEAST_US)
    delegate_call = (one.us - call - delegated * len(one.operators)) / max(one.delegate_calls, 1)
    return Fixed(call=call, delegate_call=max(delegate_call, _LEAST_US), delegated=delegated, portable=portable)


def _slope(few: Timed, many: Timed) -> float:
    more = len(many.operators) - len(few.operators)
    if more <= 0:
        raise EdgetuneError(f"{many.name} must have more operators than {few.name} to tell the cost of one")
    return max((many.us - few.us) / more, _LEAST_US)


def fit(timed: Sequence[Timed], rates: Rates, fixed: Fixed) -> Fit:
    """Shares of every kind and type that occurs, and the error of each program when it is left out.

    Raises `EdgetuneError` for a latency that is not positive and finite.
    """
    programs = [_reduce(item, rates, fixed) for item in timed]
    keys = sorted({key for program in programs for key, _, _ in program.parts})
    shares = _shares(programs, {key: _start(key) for key in keys})
    errors: dict[str, float] = {}
    for left_out in programs:
        own = {key for key, _, _ in left_out.parts}
        others = [program for program in programs if program is not left_out]
        if not all(any(key == k for program in others for k, _, _ in program.parts) for key in own):
            continue  # the only program of its kind: nothing to predict it from
        refitted = _shares(others, dict(shares), only=own)
        errors[left_out.name] = 100 * abs(left_out.predict(refitted) / left_out.us - 1)
    return Fit(tuple(_efficiency(key, shares[key], programs, errors) for key in keys), errors)


def _reduce(item: Timed, rates: Rates, fixed: Fixed) -> _Program:
    if not (math.isfinite(item.us) and item.us > 0):
        raise EdgetuneError("a latency must be positive", where=item.name, got=item.us)
    operators = unfolded(item.operators)
    cached = weights_cached(operators, rates)
    parts = tuple((key_of(o), compute_us(o, rates), memory_us(o, rates, cached)) for o in operators)
    own = sum(fixed.delegated if o.delegated else fixed.portable for o in operators)
    fixed_us = fixed.call + item.delegate_calls * fixed.delegate_call + own
    return _Program(item.name, item.us, fixed_us, parts)


def _start(key: Key) -> Shares:
    guess = prior(*key)
    return guess.compute, guess.memory


def _shares(programs: Sequence[_Program], shares: dict[Key, Shares], only: set[Key] | None = None) -> dict[Key, Shares]:
    keys = sorted(shares if only is None else only)
    for _ in range(_SWEEPS if only is None else 1):
        for key in keys:
            touched = [program for program in programs if any(key == k for k, _, _ in program.parts)]
            shares[key] = _search(key, touched, shares)
    return shares


def _search(key: Key, programs: Sequence[_Program], shares: dict[Key, Shares]) -> Shares:
    """Pattern search in the logarithms of both shares: robust where the maximum makes the error flat."""
    start = _start(key)

    def loss(candidate: Shares) -> float:
        tried = {**shares, key: candidate}
        total = sum(math.log(program.predict(tried) / program.us) ** 2 for program in programs)
        return total + _PULL * sum(math.log(a / b) ** 2 for a, b in zip(candidate, start, strict=True))

    best = shares[key]
    least = loss(best)
    for step in _STEPS:
        better = True
        while better:
            better = False
            for compute, memory in (
                (step, 1),
                (1 / step, 1),
                (1, step),
                (1, 1 / step),
                (step, step),
                (1 / step, 1 / step),
            ):
                candidate = (_bounded(best[0] * compute, COMPUTE_BOUNDS), _bounded(best[1] * memory, MEMORY_BOUNDS))
                value = loss(candidate)
                if value < least - 1e-12:
                    best, least, better = candidate, value, True
    return best


def _bounded(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])


def _efficiency(key: Key, shares: Shares, programs: Sequence[_Program], errors: dict[str, float]) -> Efficiency:
    names = [program.name for program in programs if any(key == k for k, _, _ in program.parts)]
    own = [errors[name] for name in names if name in errors]
    bound = [c / shares[0] >= m / shares[1] for program in programs for k, c, m in program.parts if k == key]
    kind, dtype, delegated = key
    return Efficiency(
        kind=kind,
        dtype=dtype,
        delegated=delegated,
        compute=float(f"{shares[0]:.4g}"),
        memory=float(f"{shares[1]:.4g}"),
        compute_told=any(bound),
        memory_told=not all(bound),
        programs=len(names),
        error_pct=round(min(max(own), 1e4), 1) if own else None,
    )
