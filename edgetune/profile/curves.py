"""The cost of an operator on a calibrated device: its terms times the fitted rates.

An operator without a curve uses the nearest one, which the prediction names, and widens the interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from edgetune.profile.calibration import Calibration, Curve
from edgetune.profile.device import Device
from edgetune.profile.equations import overlapped
from edgetune.profile.operator_cost import OperatorCost
from edgetune.profile.rates import rates_of
from edgetune.profile.roofline import compute_us, fixed_of, memory_us, operator_cost, weights_fit_in_cache
from edgetune.profile.terms import (
    curve_of,
    family_of,
    moved_bytes,
    terms_of,
    traffic_terms,
)
from edgetune.program.operators import Operator

# Uncertainty of a stand-in, as a natural logarithm: the same kernel in another type, another kernel, a prior.
TYPE_LOG, KIND_LOG, PRIOR_LOG = math.log(1.5), math.log(2.0), math.log(3.0)
_LEAST_US = 1e-3
_SHAPES = {"macs": "several rows and columns", "one row": "one row", "one column": "one column"}  # of products


def operator_costs(operators: Sequence[Operator], device: Device, calibration: Calibration) -> list[OperatorCost]:
    """The cost of each operator."""
    rates, fixed, moved = rates_of(device), fixed_of(device), moved_bytes(operators)
    cached = weights_fit_in_cache(operators, rates)
    costs: list[OperatorCost] = []
    for operator in operators:
        curve, log, guessed = _curve(operator, calibration)
        if curve is None:
            costs.append(replace(operator_cost(operator, rates, fixed, cached), log=log, guessed=guessed))
            continue
        own_us = _own_us(operator, curve, moved, calibration)
        full_us, traffic_us = compute_us(operator, rates), memory_us(operator, rates, cached)
        costs.append(
            OperatorCost(operator, max(own_us, _LEAST_US), log, full_us, traffic_us, curve.rates.get("1", 0.0), guessed)
        )
    return costs


def _own_us(operator: Operator, curve: Curve, moved: float, calibration: Calibration) -> float:
    own = terms_of(operator, calibration.tile(operator.dtype))
    traffic = traffic_terms(operator, moved, calibration.caches)
    return overlapped(
        sum(size * _rate(curve, term) for term, size in own.items()),
        sum(size * calibration.traffic.get(term, 0.0) for term, size in traffic.items()),
    )


def _rate(curve: Curve, term: str) -> float:
    """The term's rate. A product without one for its largest term uses that of another shape, or it would be free."""
    others = _SHAPES if term in _SHAPES else ()
    return next((curve.rates[name] for name in (term, *others) if name in curve.rates), 0.0)


def _curve(operator: Operator, calibration: Calibration) -> tuple[Curve | None, float, str]:
    """The operator's curve or the nearest one, its uncertainty, and a description of a stand-in."""
    name, sizes = curve_of(operator), set(terms_of(operator, calibration.tile(operator.dtype)))
    own = calibration.curves.get(name)
    if own is not None and sizes <= set(own.rates):
        return own, 0.0, ""
    shape = next((_SHAPES[term] for term in sizes if term in _SHAPES), "")
    if own is not None and shape:
        return own, KIND_LOG, f"{name} was never calibrated with {shape}, its other products are used instead"
    guessed = f"{name} was never calibrated" + (" in such sizes" if own is not None else "")
    for other, curve in calibration.curves.items():
        if family_of(other) == family_of(name) and sizes <= set(curve.rates):
            return curve, TYPE_LOG, f"{guessed}, {other} stands in"
    if own is not None and set(own.rates) & sizes > {"1"}:
        return own, KIND_LOG, f"{guessed}, its other sizes are used instead"
    like = [
        (other.endswith(f" {operator.dtype}"), curve.programs, other, curve)
        for other, curve in calibration.curves.items()
        if (curve.kind, curve.delegated) == (operator.kind, operator.delegated) and set(curve.rates) & sizes > {"1"}
    ]
    if like:
        *_, other, curve = max(like, key=lambda item: item[:3])
        return curve, KIND_LOG, f"{guessed}, {other} stands in"
    return None, PRIOR_LOG, guessed
