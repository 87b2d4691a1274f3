"""Latency and memory of a program, measured on this host in a child process."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import THIS_HOST, Measured

if TYPE_CHECKING:
    from edgetune.program.artifact import Artifact
    from edgetune.runtime.run import State, Timing

WIDE = 1.5  # p90 over p10: above, something else was running
NOISY_PCT = 5.0  # a median less certain than this gets a note
DRIFT_PCT = 10.0  # and so does one that drifted further than this
_BLOCKS = 10
# Factors of a median absolute deviation: to a standard deviation; for ten values (Croux and Rousseeuw, n / (n - 0.8));
# Student's quantile for 0.37 times nine degrees of freedom, its efficiency
_DEVIATIONS = 1.4826 * 1.087 * 3.0
_HEATED_C, _SLOWED = 5.0, 0.9


def spread(latencies_ms: Sequence[float]) -> float:
    """p90 over p10."""
    low, high = _quantile(latencies_ms, 0.1), _quantile(latencies_ms, 0.9)
    return high / low if low > 0 else float("inf")


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def noise_pct(latencies_ms: Sequence[float]) -> float | None:
    """Half of the median's 95 % interval, in percent of it. None below ten runs.

    From the medians of ten consecutive blocks, so that slow changes count, by their median absolute deviation, which
    ignores a burst of other work in one block.
    """
    whole = statistics.median(latencies_ms)
    if len(latencies_ms) < _BLOCKS or whole <= 0:
        return None
    edges = [round(place * len(latencies_ms) / _BLOCKS) for place in range(_BLOCKS + 1)]
    medians = [statistics.median(latencies_ms[edges[place] : edges[place + 1]]) for place in range(_BLOCKS)]
    centre = statistics.median(medians)
    deviation = statistics.median(abs(median - centre) for median in medians)
    return 100 * _DEVIATIONS * deviation / math.sqrt(_BLOCKS) / whole


def drift_pct(latencies_ms: Sequence[float]) -> float | None:
    """Increase of the median from the first third of the runs to the last, in percent of the median."""
    third = len(latencies_ms) // 3
    whole = statistics.median(latencies_ms)
    if third < 1 or whole <= 0:
        return None
    return 100 * (statistics.median(latencies_ms[-third:]) - statistics.median(latencies_ms[:third])) / whole


def summarize_timing(timing: Timing, threads: int, call: str = "", device: str = THIS_HOST, note: str = "") -> Measured:
    """A timing of a call as an entry of the ledger. `note`: a caveat to add."""
    notes = [note, *_noise_notes(timing.latencies_ms), *_state_notes(timing.states)]
    return Measured(
        device=device,
        call=call,
        latency_ms=statistics.median(timing.latencies_ms),
        latency_p10_ms=_quantile(timing.latencies_ms, 0.1),
        latency_p90_ms=_quantile(timing.latencies_ms, 0.9),
        load_ms=timing.load_ms,
        peak_memory_mib=max(timing.peak_memory_mib - timing.empty_memory_mib, 0.0),
        runs=len(timing.latencies_ms),
        threads=threads,
        note="; ".join(filter(None, notes)),
        first_ms=timing.first_ms,
        noise_pct=noise_pct(timing.latencies_ms),
        drift_pct=drift_pct(timing.latencies_ms),
        cores=timing.cores,
        energy_mj=timing.energy_mj,
        energy_note=timing.energy_note,
        temperature_c=_hottest_c(timing.states),
        clock_mhz=_fastest_mhz(timing.states),
    )


def _noise_notes(latencies_ms: Sequence[float]) -> list[str]:
    wide, noise, drift = spread(latencies_ms), noise_pct(latencies_ms), drift_pct(latencies_ms)
    notes = [f"p90 is {wide:.1f} times p10: other work was running"] if wide > WIDE else []
    if noise is not None and noise > NOISY_PCT:
        notes.append(f"noisy: the median is certain to about {noise:.0f} % only")
    if drift is not None and abs(drift) > DRIFT_PCT:
        way = "slower" if drift > 0 else "faster"
        notes.append(f"the last third of the runs was {abs(drift):.0f} % {way} than the first")
    return notes


def _hottest_c(states: Sequence[State]) -> tuple[float, float] | None:
    """Before and after the runs, of the sensor that is hottest after them."""
    after = states[-1].temperature_c if states else {}
    name = max(after, key=lambda sensor: after[sensor], default="")
    before = states[0].temperature_c.get(name) if states else None
    return (before, after[name]) if before is not None else None


def _fastest_mhz(states: Sequence[State]) -> tuple[float, float] | None:
    """The fastest core's clock before the runs, and its lowest after any batch."""
    fastest = [max(state.clock_mhz.values()) for state in states if state.clock_mhz]
    return (fastest[0], min(fastest[1:])) if len(fastest) > 1 else None


def _state_notes(states: Sequence[State]) -> list[str]:
    """Whether the machine got hot or slowed down, as far as its sensors show."""
    heat, clock = _hottest_c(states), _fastest_mhz(states)
    notes = []
    if heat is not None and heat[1] - heat[0] >= _HEATED_C:
        notes.append(f"it warmed from {heat[0]:.0f} to {heat[1]:.0f} degrees Celsius")
    if clock is not None and clock[1] < _SLOWED * clock[0]:
        notes.append(f"the clock fell from {clock[0]:.0f} to {clock[1]:.0f} MHz: throttled")
    return notes


def inputs_of(artifact: Artifact) -> tuple[Tensor, ...]:
    """Inputs of the shapes and types that the manifest states: whole numbers are one, the others normal noise.

    One is a valid token, segment and attention mask wherever a table has two rows.
    """
    draw = torch.Generator().manual_seed(0)
    made: list[Tensor] = []
    for spec in artifact.manifest.main.inputs:
        dtype = getattr(torch, spec.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise EdgetuneError("the manifest states an input of an unknown type", where=spec.name, got=spec.dtype)
        noise = torch.randn(spec.shape, generator=draw).to(dtype)
        made.append(noise if dtype.is_floating_point else torch.ones(spec.shape, dtype=dtype))
    return tuple(made)
