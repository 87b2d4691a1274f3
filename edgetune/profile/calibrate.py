"""Calibrate this host: time micro-programs, fit the cost model to them, and write a descriptor."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.profile import host, micro
from edgetune.profile.cost import Fixed
from edgetune.profile.device import HOST, SUFFIX, Calibration, Device, ids, load, parse, user_folder
from edgetune.profile.fit import Fit, Timed, fit, fixed_costs
from edgetune.profile.measure import WIDE, spread, time_on_host
from edgetune.profile.rates import rates_of
from edgetune.profile.yaml_file import write_yaml
from edgetune.registry import technique
from edgetune.technique import EdgetuneError, Exit, Sample

if TYPE_CHECKING:
    from edgetune.export.lower import Lowered

Progress = Callable[[str, int, int], None]  # what is done now, how many are done, of how many

_SECONDS, _QUICK_SECONDS = 0.5, 0.05  # of timing, per program
_LEAST_PROGRAMS = 3


@dataclass(frozen=True)
class _Clocked:
    timed: Timed
    spread: float  # p90 / p10 of its runs


def calibrate(
    out: Path | None = None, *, threads: int | None = None, quick: bool = False, progress: Progress | None = None
) -> Device:
    """Time micro-programs on this host, fit the cost model, and write the descriptor; returns it.

    `out`: a `.yaml` file, by default `host.yaml` in the user's folder, where `load("host")` finds it. `threads`: by
    default all cores of the process. `quick`: few programs, for tests; its predictions are poor. Takes about three
    minutes on 2 cores; the file is written in one step at the end, so a run that is stopped leaves the old one.
    """
    path = _path(out)
    threads = threads if threads is not None else host.cores()
    if not 1 <= threads <= host.cores():
        raise EdgetuneError(f"threads must be from 1 to the {host.cores()} cores of this process", got=threads)
    described = {**host.describe(threads, host.copy_gb_s(threads)), "id": path.stem}
    bare = parse(described, str(path))
    tiny, programs = micro.tiny(), micro.quick() if quick else micro.programs()
    clocked, failed = _clock((*tiny, *programs), threads, _QUICK_SECONDS if quick else _SECONDS, progress)
    if len(clocked) - len(tiny) < _LEAST_PROGRAMS:
        raise EdgetuneError(
            "too few micro-programs could be timed to calibrate: " + "; ".join(failed[:3]), exit_code=Exit.EXPORT
        )
    one, many, portable_one, portable_many = (clocked[item.name].timed for item in tiny)
    fixed = fixed_costs(one, many, portable_one, portable_many)
    timed = [clocked[item.name].timed for item in programs if item.name in clocked]
    fitted = fit(timed, rates_of(bare), fixed)
    described["calibration"] = _section(fitted, fixed, threads, len(clocked))
    described["notes"] = _notes(clocked, failed, quick)
    device = parse(described, str(path))
    write_yaml(path, described)
    return device


def _path(out: Path | None) -> Path:
    if out is None:
        return user_folder() / (HOST + SUFFIX)
    if out.suffix != SUFFIX:
        raise EdgetuneError("a descriptor is a .yaml file", got=str(out), action=f"write to {out}{SUFFIX}")
    return out


def _clock(
    programs: Sequence[micro.Micro], threads: int, seconds: float, progress: Progress | None
) -> tuple[dict[str, _Clocked], list[str]]:
    """Build and time each program; those that could not be, with the reason. Without the tiny ones it cannot go on."""
    clocked: dict[str, _Clocked] = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="edgetune-calibrate-") as folder:
        for number, item in enumerate(programs):
            if progress is not None:
                progress(item.name, number, len(programs))
            try:
                path = Path(folder) / f"{item.name}.pte"
                clocked[item.name] = _time(item, _build(item, path), path, threads, seconds)
            except EdgetuneError as error:
                if item.name.startswith("tiny-"):
                    raise error.within(f"calibration, {item.name}") from error
                failed.append(f"{item.name}: {error.what}")
        if progress is not None:
            progress("fit", len(programs), len(programs))
    return clocked, failed


def _build(item: micro.Micro, path: Path) -> Lowered:
    """Lowered and written, without the comparison that `export` makes: these programs are only timed."""
    from edgetune.export.lower import Positional, lower
    from edgetune.export.targets import find

    model, inputs = item.module().eval(), item.inputs()
    if item.quantize:
        model = technique(item.quantize)().apply(model, Sample.of(inputs))
    lowered = lower(Positional(model, inputs).eval(), inputs, find(item.target))
    path.write_bytes(lowered.data)
    return lowered


def _time(item: micro.Micro, lowered: Lowered, path: Path, threads: int, seconds: float) -> _Clocked:
    """The calmer of two timings, if the first was disturbed."""
    best = time_on_host(path, item.inputs(), threads=threads, seconds=seconds)
    if spread(best.latencies_ms) > WIDE:
        again = time_on_host(path, item.inputs(), threads=threads, seconds=seconds)
        best = min(best, again, key=lambda timing: spread(timing.latencies_ms))
    us = statistics.median(best.latencies_ms) * 1e3
    return _Clocked(Timed(item.name, lowered.operators, lowered.delegates, us), spread(best.latencies_ms))


def _section(fitted: Fit, fixed: Fixed, threads: int, programs: int) -> dict[str, Any]:
    errors = sorted(fitted.errors_pct.values())
    if not errors:
        raise EdgetuneError("no kind of operator was timed twice: the error cannot be told", exit_code=Exit.EXPORT)
    versions = {name: importlib.metadata.version(name) for name in ("executorch", "torch", "torchao", "edgetune")}
    section = Calibration(
        date=datetime.date.today().isoformat(),
        engine="ExecuTorch XNNPACK",
        versions=versions,
        threads=threads,
        programs=programs,
        error_pct=round(statistics.median(errors), 1),
        error_p90_pct=round(min(errors[math.ceil(0.9 * (len(errors) - 1))], 1e4), 1),
        call_us=round(fixed.call, 3),
        delegate_call_us=round(fixed.delegate_call, 3),
        delegated_operator_us=round(fixed.delegated, 3),
        portable_operator_us=round(fixed.portable, 3),
        efficiencies=fitted.efficiencies,
    )
    return section.model_dump(mode="json")


def _notes(clocked: dict[str, _Clocked], failed: Sequence[str], quick: bool) -> list[str]:
    wide = [name for name, item in clocked.items() if item.spread > WIDE]
    notes = ["A quick calibration, for tests: predictions from it are poor."] if quick else []
    if wide:
        notes.append(
            f"{len(wide)} of {len(clocked)} programs were disturbed while they were timed "
            f"(p90 over p10 above {WIDE:g}): calibrate again on an idle machine."
        )
    return notes + [f"not timed: {reason}" for reason in failed]


def host_device() -> Device | None:
    """The calibrated descriptor of this host, or `None` if it was never calibrated."""
    return load(HOST) if HOST in ids() else None
