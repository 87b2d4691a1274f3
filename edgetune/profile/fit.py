"""Fit a calibration to timed programs: the tiles of products, positive rates for every term, and the error left.

The loss is of relative errors, with less weight for large ones. Rates that cannot be negative make every prediction
positive and increasing in each size. (Lawson and Hanson 1974, chapter 23, by scipy.)
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgetune.core.errors import EdgetuneError
from edgetune.core.registry import require
from edgetune.profile.calibration import Curve, Interval
from edgetune.profile.equations import (
    Rates,
    Setting,
    System,
    Timed,
    calls_of,
    equations_of,
    parts_of,
    program_us,
)
from edgetune.profile.terms import CacheSizes, KernelTile, curve_of, family_of, is_product
from edgetune.program.operators import DType, Operator

INTERVAL_PCT = 90.0
_FOLDS = 8
_TILE_ROWS, _TILE_COLUMNS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16), (8, 16, 32)
_TILED: tuple[DType, ...] = ("fp32", "int8", "8da4w")
_MOST_PRODUCTS = 400  # that the tiles of a type are chosen by
_FEW = 12  # programs that a kernel must occur in, if it leads none
_NEXT_TO_NOTHING_US = 1e-3  # of a kernel that adds nothing to its programs
_LEAST_LOG = math.log(1.03)  # least half width: two timings of one program differ by as much


@dataclass(frozen=True)
class Fit:
    """The result. Errors are relative, with each program predicted from others alone."""

    rates: Rates
    tiles: dict[DType, KernelTile]
    errors: dict[str, float]  # predicted over measured, less one
    family_errors: dict[str, float] = field(default_factory=dict)  # of networks, with all that are like them left out
    stand_ins: dict[str, str] = field(default_factory=dict)

    def us(self, operators: Sequence[Operator], caches: CacheSizes) -> float:
        """Microseconds of a program."""
        parts = parts_of(operators, Setting(caches, self.tiles, self.stand_ins))
        return program_us(parts, calls_of(operators), self.rates)


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
        if item.operator_us and len(item.operator_us) != len(item.operators):
            raise EdgetuneError("not every operator was recorded", where=item.name, got=len(item.operator_us))
    tiles = _tiles(timed, caches)
    setting = Setting(caches, tiles, stand_ins(timed))
    equations = [(number, one) for number, item in enumerate(timed) for one in equations_of(item, setting)]
    system = System([one for _, one in equations])
    program_of = np.array([number for number, _ in equations])
    parts = [str(number % _FOLDS) for number in range(len(timed))]
    errors = _left_out(timed, parts, system, program_of, setting)
    of_families = _left_out(timed, [item.family for item in timed], system, program_of, setting)
    return Fit(system.solve(), tiles, errors, of_families, dict(setting.stand_ins))


def stand_ins(timed: Sequence[Timed]) -> dict[str, str]:
    """Curves that occur in too few programs to be fitted, and the curves that replace them.

    They are of the same kernel in another type that leads a chain: rates fitted to few programs are mere residuals.
    """
    programs: Counter[str] = Counter()
    leading: set[str] = set()
    for item in timed:
        programs.update({curve_of(operator) for operator in item.operators})
        if item.operator_us or not item.network:
            leading |= _leading(item)
    substitutes: dict[str, str] = {}
    for curve, count in programs.items():
        kin = sorted(other for other in leading if family_of(other) == family_of(curve) and other != curve)
        if count < _FEW and curve not in leading and kin:
            substitutes[curve] = kin[0]
    return substitutes


def _leading(item: Timed) -> set[str]:
    """The curves of a chain: its leader, and those that occur at least half as often; all that were recorded."""
    counts = Counter(curve_of(operator) for operator in item.operators)
    return {curve for curve, count in counts.items() if item.operator_us or 2 * count >= max(counts.values())}


def _leader(item: Timed) -> str:
    """The curve of the operator that a chain repeats."""
    return Counter(curve_of(operator) for operator in item.operators).most_common(1)[0][0]


def _left_out(
    timed: Sequence[Timed], folds: Sequence[str], system: System, program_of: NDArray[np.int_], setting: Setting
) -> dict[str, float]:
    """The error of each program when all of its fold is left out; none if a term is in no other fold.

    `program_of`: for each equation the index of its program.
    """
    errors: dict[str, float] = {}
    for fold in sorted(set(folds) - {""}):
        kept = np.array([name != fold for name in folds])[program_of]
        if not kept.any():
            continue
        rates = system.solve(kept)
        for item in (item for item, name in zip(timed, folds, strict=True) if name == fold):
            parts = parts_of(item.operators, setting)
            if all(terms.keys() <= rates.keys() for part in parts for terms in part.both):
                errors[item.name] = program_us(parts, calls_of(item.operators), rates) / item.us - 1
    return errors


def _tiles(timed: Sequence[Timed], caches: CacheSizes) -> dict[DType, KernelTile]:
    """The tile of each type that best fits its products, or the programs with them if they were not recorded."""
    tiles: dict[DType, KernelTile] = {}
    for dtype in _TILED:
        own = _with_products(timed, dtype)
        if len(own) < 2 * _FOLDS:
            continue
        wide = [KernelTile(rows=1, columns=columns) for columns in _TILE_COLUMNS]
        columns = min(wide, key=lambda tile: _misfit(own, caches, dtype, tile)).columns
        high = [KernelTile(rows=rows, columns=columns) for rows in _TILE_ROWS]
        tiles[dtype] = min(high, key=lambda tile: _misfit(own, caches, dtype, tile))
    return tiles


def _with_products(timed: Sequence[Timed], dtype: DType) -> list[Timed]:
    """Programs with products of this type; of recorded ones the products alone, the longest, each as a program."""

    def is_own(operator: Operator) -> bool:
        return is_product(operator) and operator.dtype == dtype

    whole = [item for item in timed if not item.operator_us and any(map(is_own, item.operators))]
    single = [
        Timed(f"{item.name} {place}", (operator,), us)
        for item in timed
        for place, (operator, us) in enumerate(zip(item.operators, item.operator_us, strict=False))
        if is_own(operator) and us > 0
    ]
    single.sort(key=lambda item: -item.us)
    return whole + single[:_MOST_PRODUCTS]


def _misfit(timed: Sequence[Timed], caches: CacheSizes, dtype: DType, tile: KernelTile) -> float:
    setting = Setting(caches, {dtype: tile})
    rates = System([one for item in timed for one in equations_of(item, setting)]).solve()
    errors = [
        program_us(parts_of(item.operators, setting), calls_of(item.operators), rates) / item.us - 1 for item in timed
    ]
    return sum(min(abs(error), 0.5) ** 2 for error in errors)


# The parts of a calibration


def curve_records(result: Fit, timed: Sequence[Timed]) -> dict[str, Curve]:
    """The rates by kernel, with the number of its programs and the error of those that it leads."""
    sample: dict[str, Operator] = {}
    programs: Counter[str] = Counter()
    leads: dict[str, list[float]] = {}
    for item in timed:
        own = {curve_of(operator): operator for operator in item.operators}
        sample = own | sample
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


def interval_log(errors: Sequence[float]) -> float:
    """Half the width of the prediction interval that covers `INTERVAL_PCT` of such errors, as a logarithm.

    The quantile is that of split conformal prediction (Lei et al. 2018, section 2.2): rank ceil((n + 1) share).
    """
    logs = sorted(abs(math.log1p(max(error, -0.99))) for error in errors)
    rank = math.ceil((len(logs) + 1) * INTERVAL_PCT / 100)
    return max(logs[min(rank, len(logs)) - 1], _LEAST_LOG) if logs else math.log(2)


def intervals(errors: Sequence[tuple[float, float]]) -> tuple[Interval, ...]:
    """The interval of the longest third of the programs, and that of the others, from pairs (microseconds, error).

    Short programs are known less well: what their operators cost besides their sizes counts more.
    """
    ordered = sorted(errors)
    cut = 2 * len(ordered) // 3
    if cut < _FEW:
        return (Interval(from_us=0.0, log=interval_log([error for _, error in errors])),)
    short, long = ([error for _, error in part] for part in (ordered[:cut], ordered[cut:]))
    return Interval(from_us=0.0, log=interval_log(short)), Interval(from_us=ordered[cut][0], log=interval_log(long))


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
