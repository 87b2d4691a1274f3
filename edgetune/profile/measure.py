"""Latency and memory of a program, measured on this host in a child process."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgetune.ledger import Measured
from edgetune.profile import host
from edgetune.technique import EdgetuneError

if TYPE_CHECKING:
    from edgetune.export.artifact import Artifact
    from edgetune.export.run import Timing

THIS_HOST = "this host"
WIDE = 1.5  # p90 over p10: above, something else was running


def spread(latencies_ms: Sequence[float]) -> float:
    """p90 over p10."""
    low, high = _quantile(latencies_ms, 0.1), _quantile(latencies_ms, 0.9)
    return high / low if low > 0 else float("inf")


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def time_on_host(
    path: Path, inputs: Sequence[Tensor], *, threads: int, seconds: float, data: Path | None = None
) -> Timing:
    """Load and run the program for about `seconds`, after a warm-up of at most as long, in a fresh process.

    `data`: the `.ptd` with its weights, where they lie apart.
    """
    from edgetune.export.run import time_in_child

    warm_up = min(seconds, 1.0)
    timing = time_in_child(path, tuple(inputs), threads=threads, seconds=seconds, warm_up_seconds=warm_up, data=data)
    if not timing.latencies_ms:
        raise EdgetuneError("the program was timed, but never ran", where=str(path))
    return timing


def measure(artifact: Artifact, *, threads: int | None = None, seconds: float = 2.0) -> Measured:
    """Median latency, its p10 and p90, load time, and peak memory above an empty process, on this host.

    `threads`: by default all cores of the process. Inputs are drawn from the manifest: they are valid, not real.
    """
    threads = threads if threads is not None else host.cores()
    inputs = inputs_of(artifact)
    timing = time_on_host(artifact.path, inputs, threads=threads, seconds=seconds, data=artifact.data_path)
    return measured_of(timing, threads)


def measured_of(timing: Timing, threads: int, call: str = "") -> Measured:
    """A timing of this kind of call as the ledger keeps it."""
    wide = spread(timing.latencies_ms)
    note = f"p90 is {wide:.1f} times p10: other work was running" if wide > WIDE else ""
    return Measured(
        device=THIS_HOST,
        call=call,
        latency_ms=statistics.median(timing.latencies_ms),
        latency_p10_ms=_quantile(timing.latencies_ms, 0.1),
        latency_p90_ms=_quantile(timing.latencies_ms, 0.9),
        load_ms=timing.load_ms,
        peak_memory_mib=max(timing.peak_memory_mib - timing.empty_memory_mib, 0.0),
        runs=len(timing.latencies_ms),
        threads=threads,
        note=note,
    )


def inputs_of(artifact: Artifact) -> tuple[Tensor, ...]:
    """Inputs of the shapes and types that the manifest states: whole numbers are one, the others normal noise.

    One is a valid token, segment and attention mask wherever a table has two rows.
    """
    draw = torch.Generator().manual_seed(0)
    made: list[Tensor] = []
    for spec in artifact.manifest.inputs:
        dtype = getattr(torch, spec.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise EdgetuneError("the manifest states an input of an unknown type", where=spec.name, got=spec.dtype)
        noise = torch.randn(spec.shape, generator=draw).to(dtype)
        made.append(noise if dtype.is_floating_point else torch.ones(spec.shape, dtype=dtype))
    return tuple(made)
