"""Fit a calibration to timed programs: positive rates for every term, by non-negative least squares.

Each program is one equation: its measured microseconds are the sum of its operators' terms times their rates. The loss
is of relative errors, with less weight for large ones. Rates that cannot be negative make every prediction positive and
increasing in each size. (Lawson and Hanson 1974, chapter 23, by scipy.)
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgetune.core.errors import EdgetuneError
from edgetune.core.registry import require
from edgetune.profile.calibration import Curve, Traffic
from edgetune.profile.terms import (
    CALL,
    DELEGATE,
    SINGLE,
    TRAFFIC,
    WEIGHTS,
    CacheSizes,
    KernelTile,
    Key,
    curve_of,
    family_of,
    footprint_bytes,
    is_product,
    shared_terms,
    terms_of,
)
from edgetune.program.operators import DType, Operator

Rates = dict[Key, float]
Equation = Mapping[Key, float]

INTERVAL_PCT = 90.0
_FOLDS = 8
_NETWORK_WEIGHT = 2.0  # of a network's equation, which shows the cost of operators in context
_SOFT = 0.1  # relative errors above it get less weight
_SWEEPS = 6
_EVEN = 1e-3  # pull towards equal shares for kernels that always occur together
_TILE_ROWS, _TILE_COLUMNS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16), (8, 16, 32)
_TILED: tuple[DType, ...] = ("fp32", "int8", "8da4w")
_FEW = 12  # programs that a kernel must occur in, if it leads none
_NEXT_TO_NOTHING_US = 1e-3  # of a kernel that adds nothing to its programs
_LEAST_LOG = math.log(1.03)  # least half width: two timings of one program differ by as much


@dataclass(frozen=True)
class Timed:
    """One program and its latency in microseconds. `network`: not a chain of one operator."""

    name: str
    operators: tuple[Operator, ...]
    us: float
    network: bool = False


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
class Fit:
    """The result. Errors are relative, with each program predicted from others alone."""

    rates: Rates
    tiles: dict[DType, KernelTile]
    errors: dict[str, float]  # predicted over measured, less one
    stand_ins: dict[str, str] = field(default_factory=dict)

    def us(self, operators: Sequence[Operator], caches: CacheSizes) -> float:
        """Microseconds of a program."""
        return predicted_us(equation(operators, Setting(caches, self.tiles, self.stand_ins)), self.rates)


def equation(operators: Sequence[Operator], setting: Setting) -> Counter[Key]:
    """The terms of a whole program, summed over its operators."""
    total: Counter[Key] = Counter({(CALL, "1"): 1.0})  # type: ignore[dict-item]
    footprint, delegated = footprint_bytes(operators), False
    for operator in operators:
        if operator.delegated and not delegated:
            total[(DELEGATE, "1")] += 1
        delegated = operator.delegated
        own = curve_of(operator)
        curve = setting.stand_ins.get(own, own)
        for term, size in terms_of(operator, setting.tile(operator.dtype)).items():
            total[(curve, term)] += size  # type: ignore[assignment]
        for key, size in shared_terms(operator, footprint, setting.caches).items():
            total[key] += size  # type: ignore[assignment]
    return total


def predicted_us(terms: Equation, rates: Mapping[Key, float]) -> float:
    """The sum of the terms times their rates; a term without a rate counts nothing."""
    return sum(size * rates.get(key, 0.0) for key, size in terms.items())


def fit(timed: Sequence[Timed], caches: CacheSizes) -> Fit:
    """Rates and tiles, and the error of each program when it is left out.

    Raises `EdgetuneError` for a latency that is not positive and finite, and for no programs.
    """
    if not timed:
        raise EdgetuneError("no timed program: there is nothing to fit")
    for item in timed:
        if not (math.isfinite(item.us) and item.us > 0):
            raise EdgetuneError("a latency must be positive", where=item.name, got=item.us)
        if not item.operators:
            raise EdgetuneError("a timed program has no operators", where=item.name)
    tiles = _tiles(timed, caches)
    setting = Setting(caches, tiles, stand_ins(timed))
    equations = [equation(item.operators, setting) for item in timed]
    rates = solve(timed, equations)
    return Fit(rates, tiles, _left_out(timed, equations), dict(setting.stand_ins))


def stand_ins(timed: Sequence[Timed]) -> dict[str, str]:
    """Curves that occur in too few programs to be fitted, and the curves that replace them.

    They are of the same kernel in another type that leads a chain: rates fitted to few programs are mere residuals.
    """
    programs: Counter[str] = Counter()
    leading: set[str] = set()
    for item in timed:
        programs.update({curve_of(operator) for operator in item.operators})
        if not item.network:
            leading |= _leading(item)
    substitutes: dict[str, str] = {}
    for curve, count in programs.items():
        kin = sorted(other for other in leading if family_of(other) == family_of(curve) and other != curve)
        if count < _FEW and curve not in leading and kin:
            substitutes[curve] = kin[0]
    return substitutes


def _leading(item: Timed) -> set[str]:
    """The curves of a chain: its leader, and those that occur at least half as often."""
    counts = Counter(curve_of(operator) for operator in item.operators)
    return {curve for curve, count in counts.items() if 2 * count >= max(counts.values())}


def _leader(item: Timed) -> str:
    """The curve of the operator that a chain repeats."""
    return Counter(curve_of(operator) for operator in item.operators).most_common(1)[0][0]


def solve(timed: Sequence[Timed], equations: Sequence[Equation]) -> Rates:
    """Positive rates with the least relative error.

    Terms that grow together in all programs are only determined by their sum; a slight pull on each term's part
    (Hoerl and Kennard 1970) shares it evenly, where plain least squares would give all of it to one.
    """
    nnls = require("scipy.optimize", "a calibration").nnls
    keys = sorted({key for terms in equations for key in terms})
    place = {key: index for index, key in enumerate(keys)}
    matrix = np.zeros((len(timed), len(keys)))
    for row, (item, terms) in enumerate(zip(timed, equations, strict=True)):
        for key, size in terms.items():
            matrix[row, place[key]] = size / item.us
    importance = np.array([_NETWORK_WEIGHT if item.network else 1.0 for item in timed]) ** 0.5
    weights = importance
    rates = np.zeros(len(keys))
    for _ in range(_SWEEPS):
        weighted = matrix * weights[:, None]
        pull = np.diag(_EVEN * np.linalg.norm(weighted, axis=0))
        goal = np.concatenate([weights, np.zeros(len(keys))])
        rates, _ = nnls(np.vstack([weighted, pull]), goal, maxiter=50 * len(keys))
        errors = np.abs(matrix @ rates - 1)
        weights = importance / np.maximum(1, errors / _SOFT) ** 0.5
    return dict(zip(keys, (float(rate) for rate in rates), strict=True))


def _left_out(timed: Sequence[Timed], equations: Sequence[Equation]) -> dict[str, float]:
    """The error of each program in eight-fold cross-validation; none if one of its kernels is in no other program."""
    errors: dict[str, float] = {}
    for fold in range(min(_FOLDS, len(timed))):
        kept = [index for index in range(len(timed)) if index % _FOLDS != fold]
        if not kept:
            continue
        rates = solve([timed[index] for index in kept], [equations[index] for index in kept])
        fitted_curves = {curve for index in kept for curve, _ in equations[index]}
        for index in range(fold, len(timed), _FOLDS):
            if all(curve in fitted_curves for curve, _ in equations[index]):
                error = predicted_us(equations[index], rates) / timed[index].us - 1
                errors[timed[index].name] = error
    return errors


def _tiles(timed: Sequence[Timed], caches: CacheSizes) -> dict[DType, KernelTile]:
    """The tile of each type that best fits the programs with products of that type."""
    tiles: dict[DType, KernelTile] = {}
    for dtype in _TILED:
        own = [item for item in timed if any(is_product(o) and o.dtype == dtype for o in item.operators)]
        if len(own) < 2 * _FOLDS:
            continue
        wide = [KernelTile(rows=1, columns=columns) for columns in _TILE_COLUMNS]
        columns = min(wide, key=lambda tile: _misfit(own, caches, dtype, tile)).columns
        high = [KernelTile(rows=rows, columns=columns) for rows in _TILE_ROWS]
        tiles[dtype] = min(high, key=lambda tile: _misfit(own, caches, dtype, tile))
    return tiles


def _misfit(timed: Sequence[Timed], caches: CacheSizes, dtype: DType, tile: KernelTile) -> float:
    equations = [equation(item.operators, Setting(caches, {dtype: tile})) for item in timed]
    rates = solve(timed, equations)
    errors = [predicted_us(terms, rates) / item.us - 1 for item, terms in zip(timed, equations, strict=True)]
    return sum(min(abs(error), 0.5) ** 2 for error in errors)


# The parts of a calibration


def curve_records(result: Fit, timed: Sequence[Timed]) -> dict[str, Curve]:
    """The rates by kernel, with the number of its programs and the error of those that it leads."""
    sample: dict[str, Operator] = {}
    programs: Counter[str] = Counter()
    leads: dict[str, list[float]] = {}
    for item in timed:
        own = {curve_of(operator): operator for operator in item.operators}
        sample.update(own)
        programs.update(own.keys())
        if item.name in result.errors and not item.network:
            leads.setdefault(_leader(item), []).append(abs(result.errors[item.name]))
    made: dict[str, Curve] = {}
    for name, operator in sorted(sample.items()):
        rates = {term: float(f"{rate:.5g}") for (curve, term), rate in result.rates.items() if curve == name}
        if not any(rates.values()):
            if programs[name] < _FEW:
                continue  # too few programs to fit it: the fallback is used
            rates["1"] = _NEXT_TO_NOTHING_US
        error = 100 * statistics.median(leads[name]) if name in leads else None
        made[name] = Curve(
            kind=operator.kind, delegated=operator.delegated, rates=rates, programs=programs[name],
            error_pct=None if error is None else round(error, 1),
        )  # fmt: skip
    return made


def traffic_record(result: Fit) -> Traffic:
    """The rates of traffic beyond the caches."""
    return Traffic(
        weights_from_last_level=result.rates.get((WEIGHTS, "last level"), 0.0),
        weights_from_memory=result.rates.get((WEIGHTS, "memory"), 0.0),
        activations_from_last_level=result.rates.get((TRAFFIC, "last level"), 0.0),
    )


def interval_log(errors: Sequence[float]) -> float:
    """Half the width of the prediction interval that covers `INTERVAL_PCT` of such errors, as a logarithm.

    The quantile is that of split conformal prediction (Lei et al. 2018, section 2.2): rank ceil((n + 1) share).
    """
    logs = sorted(abs(math.log1p(max(error, -0.99))) for error in errors)
    rank = math.ceil((len(logs) + 1) * INTERVAL_PCT / 100)
    return max(logs[min(rank, len(logs)) - 1], _LEAST_LOG) if logs else math.log(2)


def load_costs(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Milliseconds to load a program, and per MiB of its weights, from pairs (MiB, ms)."""
    nnls = require("scipy.optimize", "a calibration").nnls
    if not pairs:
        return 0.0, 0.0
    matrix = np.array([[1.0 / ms, mib / ms] for mib, ms in pairs])
    (fixed, slope), _ = nnls(matrix, np.ones(len(pairs)))
    return float(fixed), float(slope)


def shuffle_programs(timed: Sequence[Timed]) -> list[Timed]:
    """In a fixed random order, so that no fold has all sizes of one kernel."""
    order = np.random.default_rng(0).permutation(len(timed))
    return [timed[index] for index in order]
