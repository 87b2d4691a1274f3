"""Calibrate a machine: time programs there, fit the cost model to their operators, and store the result as JSON."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.numbers import MIB
from edgetune.core.progress import Progress
from edgetune.profile import fit, trials
from edgetune.profile.calibration import Calibration, calibration_path, write
from edgetune.profile.device import Device, load, parse
from edgetune.profile.equations import Timed
from edgetune.profile.fit import Fit
from edgetune.profile.micro.program import Micro
from edgetune.profile.rates import DEFAULT_CACHE_BYTES
from edgetune.profile.terms import CALL, DELEGATE, TRAFFIC, CacheSizes, footprint_bytes
from edgetune.profile.trials import Clocked
from edgetune.program.operators import Operator
from edgetune.recipe.document import write_yaml
from edgetune.recipe.names import HOST, SUFFIX, user_folder
from edgetune.runtime import host
from edgetune.runtime.clock.events import Instruction
from edgetune.runtime.clock.machine import usable_cores
from edgetune.runtime.hosts.place import Runner, TimingRequest
from edgetune.runtime.operator_times import Stretch, stretches, times_of

ENGINE = "ExecuTorch XNNPACK"
STEADY = 0.10  # between two timings of a program; above, one thread is used by default
_SECONDS, _QUICK_SECONDS, _ROUNDS = 0.1, 0.02, 2
_LEAST_PROGRAMS = 3
_NEAR_BYTES = float(MIB)  # of a core's second level, if unknown


def calibrate(
    out: Path | None = None, *, threads: int | None = None, quick: bool = False, progress: Progress = lambda *_: None
) -> Device:
    """Time programs on this host, fit the cost model, and write descriptor and calibration; returns the device.

    `out`: a `.yaml` file, by default `host.yaml` in the user's folder, which `load("host")` reads; the calibration is
    stored next to it. `threads`: by default all cores of the process, or one on a virtual machine or if timings with
    all of them do not repeat. `quick`: few programs, for tests; its predictions are poor. Takes up to six minutes on 2
    cores; an interrupted calibration continues where it stopped. Both files are written at the end.
    """
    path, most = _path(out), usable_cores()
    if threads is not None and not 1 <= threads <= most:
        raise EdgetuneError(f"threads must be from 1 to the {most} cores of this process", got=threads)
    folder = trials.folder_for(quick)
    failed = trials.build(folder, quick, progress)
    names = [trial.name for trial in trials.trials(quick) if trials.is_built(folder, trial.name)]
    seconds, rounds = (_QUICK_SECONDS, 1) if quick else (_SECONDS, _ROUNDS)
    notes = ["A quick calibration, for tests: predictions from it are poor."] if quick else []
    cores = threads if threads is not None else 1 if host.is_virtual() else most
    if threads is None and host.is_virtual() and most > 1:
        notes.append(
            f"One thread: this is a virtual machine, whose cores run at the same time only when its host lets them; a "
            f"small program then takes up to three times as long, for minutes. --threads {most} takes them all."
        )
    clocked, more = trials.clock(folder, names, threads=cores, seconds=seconds, rounds=rounds, progress=progress)
    if threads is None and cores > 1 and not _steady(clocked):
        notes.append(
            f"One thread: with {cores} a fifth of the programs took over {100 * STEADY:.0f} % longer at one time than "
            f"at another on this machine; --threads {cores} calibrates for them all the same."
        )
        cores = 1
        clocked, more = trials.clock(folder, names, threads=1, seconds=seconds, rounds=rounds, progress=progress)
    described = {**host.describe(cores, host.copy_gb_s(cores)), "id": path.stem}
    device = parse(described, str(path))
    networks = {trial.name: trial.family for trial in trials.trials(quick) if trial.family}
    operators = {name: trials.operators_of(folder, name) for name in names}
    notes += [f"not timed: {reason}" for reason in (*failed, *more)]
    calibration = fit_calibration(clocked, operators, networks, device, cores, notes)
    write_yaml(path, described)
    write(calibration_path(path), calibration)
    trials.forget(folder)
    return device.model_copy(update={"calibration": calibration})


def _path(out: Path | None) -> Path:
    if out is None:
        return user_folder() / (HOST + SUFFIX)
    if out.suffix != SUFFIX:
        raise EdgetuneError("a descriptor is a .yaml file", got=str(out), action=f"write to {out}{SUFFIX}")
    return out


def _steady(timings: Sequence[Clocked]) -> bool:
    """Whether four of five programs take the same time twice."""
    apart = sorted(_relative_spreads(timings))
    return not apart or apart[math.ceil(0.8 * len(apart)) - 1] <= STEADY


def noise_pct(timings: Sequence[Clocked]) -> float:
    """Spread between the timings of one program, median over programs; 0 if each was timed once."""
    apart = _relative_spreads(timings)
    return 100 * statistics.median(apart) if apart else 0.0


def _relative_spreads(timings: Sequence[Clocked]) -> list[float]:
    by_name: dict[str, list[float]] = {}
    for one in timings:
        by_name.setdefault(one.name, []).append(one.us)
    return [max(times) / min(times) - 1 for times in by_name.values() if len(times) > 1]


def fit_calibration(
    timings: Sequence[Clocked],
    operators: Mapping[str, tuple[Operator, ...]],
    networks: Mapping[str, str],
    device: Device,
    threads: int,
    notes: Sequence[str] = (),
) -> Calibration:
    """A calibration of the device from timed programs, by the least of the timings of each.

    `networks`: the names of those that are networks, with the family that is left out together, if any.
    """
    least, timed, unmatched = least_timings(timings, operators, networks)
    notes = [*notes, *unmatched]
    if len(timed) < _LEAST_PROGRAMS:
        raise EdgetuneError(
            "too few programs were timed to calibrate: " + "; ".join(notes[:3]), got=len(timed), exit_code=Exit.EXPORT
        )
    caches = caches_of(device)
    result = fit.fit(fit.shuffle_programs(timed), caches)
    load_ms, load_ms_per_mib = fit.load_costs(
        [(footprint_bytes(operators[one.name]) / MIB, one.load_ms) for one in least if one.load_ms > 0]
    )
    left_out = _reported_errors(result, timed)
    errors = [error for _, error in left_out]
    families = [(item.us, result.family_errors[item.name]) for item in timed if item.name in result.family_errors]
    return Calibration(
        device=device.id,
        date=datetime.date.today().isoformat(),
        engine=ENGINE,
        versions={name: importlib.metadata.version(name) for name in ("executorch", "torch", "torchao", "edgetune")},
        threads=threads,
        programs=sum(not item.network for item in timed),
        networks=sum(item.network for item in timed),
        error_pct=round(100 * statistics.median(map(abs, errors)), 1),
        error_p90_pct=round(100 * sorted(map(abs, errors))[math.ceil(0.9 * len(errors)) - 1], 1),
        noise_pct=round(noise_pct(timings), 1),
        interval_pct=fit.INTERVAL_PCT,
        intervals=fit.intervals([*left_out, *families]),
        call_us=result.rates.get((CALL, "1"), 0.0),
        delegate_call_us=result.rates.get((DELEGATE, "1"), 0.0),
        load_ms=load_ms,
        load_ms_per_mib=load_ms_per_mib,
        near_cache_bytes=caches.near_bytes,
        last_cache_bytes=caches.last_bytes,
        tiles=result.tiles,
        traffic={term: rate for (curve, term), rate in result.rates.items() if curve == TRAFFIC},
        curves=fit.curve_records(result, timed),
        notes=tuple(notes),
    )


def least_timings(
    timings: Sequence[Clocked], operators: Mapping[str, tuple[Operator, ...]], networks: Mapping[str, str]
) -> tuple[list[Clocked], list[Timed], list[str]]:
    """The least timing of each program, with the times of its operators from the round in which they took least.

    Also returns the programs whose record does not match their operators, which count as wholes, with the reason.
    """
    by_name: dict[str, list[Clocked]] = {}
    for one in timings:
        by_name.setdefault(one.name, []).append(one)
    least, timed, unmatched = [], [], []
    for name, own in by_name.items():
        least.append(min(own, key=lambda one: one.us))
        operator_us: tuple[float, ...] = ()
        parts: list[Stretch] = []
        recorded = [one.instructions for one in own if one.instructions]
        if recorded:
            try:
                parts = stretches(min(recorded, key=_total_us), operators[name])
                operator_us = times_of(parts, operators[name])
            except EdgetuneError as error:
                unmatched.append(f"not recorded by operator: {name}: {error.what}")
        family = networks.get(name, "")
        timed.append(Timed(name, operators[name], least[-1].us, name in networks, operator_us, tuple(parts), family))
    return least, timed, unmatched


def _total_us(instructions: Sequence[Instruction]) -> float:
    return sum(us for _, us, _ in instructions)


def _reported_errors(result: Fit, timed: Sequence[Timed]) -> list[tuple[float, float]]:
    """Microseconds and error of what is reported: left-out networks, or chains if there are no networks."""
    left_out = [item for item in timed if item.name in result.errors]
    reported = [item for item in left_out if item.network] or left_out
    if not reported:
        raise EdgetuneError(
            "no kernel was timed in two programs, so the error cannot be estimated",
            action="time more programs",
            exit_code=Exit.EXPORT,
        )
    return [(item.us, result.errors[item.name]) for item in reported]


def caches_of(device: Device) -> CacheSizes:
    """A core's second level, and half of the last, which is shared."""
    near, last = device.caches.l2_kib.value, device.caches.last_level_kib.value
    near_bytes = near * 1024 if near is not None else _NEAR_BYTES
    return CacheSizes(near_bytes, max((last * 1024 if last is not None else DEFAULT_CACHE_BYTES) / 2, near_bytes))


def calibrate_on(
    on: str,
    device_id: str,
    *,
    threads: int | None = None,
    quick: bool = False,
    python: str = "python3",
    progress: Progress = lambda *_: None,
) -> Calibration:
    """The same for a described device that `on` reaches (`ssh://user@host`): programs are built here and timed there.

    Each runs in a new process, which takes some seconds. The calibration is stored in the user's folder, where
    `load(device_id)` finds it. Raises `EdgetuneError` as `edgetune.runtime.hosts` does.
    """
    from edgetune.runtime.hosts.session import open_runner

    device, folder = load(device_id), trials.folder_for(quick)
    threads = threads if threads is not None else device.thread_count
    failed = trials.build(folder, quick, progress)
    wanted = [trial for trial in trials.trials(quick) if trials.is_built(folder, trial.name)]
    with open_runner(on, python=python) as machine:
        seconds = _QUICK_SECONDS if quick else _SECONDS
        clocked, more = clock_on(machine, folder, wanted, threads=threads, seconds=seconds, progress=progress)
    operators = {trial.name: trials.operators_of(folder, trial.name) for trial in wanted}
    networks = {trial.name: trial.family for trial in wanted if trial.family}
    notes = [f"Timed over {on.partition('://')[0]}.", *(f"not timed: {reason}" for reason in (*failed, *more))]
    calibration = fit_calibration(clocked, operators, networks, device, threads, notes)
    write(calibration_path(user_folder() / (device.id + SUFFIX)), calibration)
    trials.forget(folder)
    return calibration


def clock_on(
    machine: Runner, folder: Path, programs: Sequence[Micro], *, threads: int, seconds: float, progress: Progress
) -> tuple[list[Clocked], list[str]]:
    """As `trials.clock`, once, on another machine. Errors of the machine (no connection, no runtime) are raised."""
    clocked: list[Clocked] = []
    failed: list[str] = []
    for done, program in enumerate(programs, 1):
        path = folder / f"{program.name}.pte"
        try:
            request = TimingRequest(path, [program.inputs()], threads, seconds, energy=False, record=machine.records)
            (timing,) = machine.time(request)
            clocked.append(Clocked(program.name, 1e3 * timing.latency_ms, timing.load_ms, timing.instructions))
        except EdgetuneError as error:
            if error.exit_code != Exit.EXPORT:
                raise
            failed.append(f"{program.name}: {error.what}")
        progress("time", done, len(programs), "")
    return clocked, failed


def calibrate_from(table: Path, device_id: str, *, threads: int | None = None, out: Path | None = None) -> Calibration:
    """Fit a calibration of a described device to a table of measurements, and write it.

    `table`: a CSV with the columns `program` (path of a `.pte`, relative to the table), `latency_us`, and optionally
    `load_ms` and `kind` (`network` for a whole model). The calibration is written to `out`, by default where
    `load(device_id)` finds it. Raises `EdgetuneError` for an unreadable table or program, with the line.
    """
    device = load(device_id)
    if threads is not None and threads < 1:
        raise EdgetuneError("threads must be at least 1", got=threads)
    timings: list[Clocked] = []
    operators: dict[str, tuple[Operator, ...]] = {}
    networks: dict[str, str] = {}
    for number, row in _rows(table):
        where = f"{table}, line {number}"
        name = row["program"] or ""
        path = table.parent / name
        if not path.is_file():
            raise EdgetuneError("no such program", where=where, got=name)
        timings.append(Clocked(name, _number(row, "latency_us", where), _number(row, "load_ms", where, 0.0)))
        operators[name] = operators.get(name) or _executed_operators(path, where)
        if (row.get("kind") or "").strip() == "network":
            networks[name] = ""
    threads = threads if threads is not None else device.thread_count
    note = f"From {table.name}: {len(timings)} measurements."
    calibration = fit_calibration(timings, operators, networks, device, threads, [note])
    described = Path(device_id) if device_id.endswith(SUFFIX) else user_folder() / (device.id + SUFFIX)
    write(out or calibration_path(described), calibration)
    return calibration


def _executed_operators(path: Path, where: str) -> tuple[Operator, ...]:
    from edgetune.program.executed import executed_operators

    try:
        return executed_operators(path.read_bytes())
    except EdgetuneError as error:
        raise error.within(where) from error
    except Exception as error:  # executorch's reader raises anything for a file that is not a program
        raise EdgetuneError("the program cannot be read", where=where, got=path.name) from error


def _rows(table: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        with table.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in ("program", "latency_us") if name not in (reader.fieldnames or ())]
            rows = list(enumerate(reader, start=2))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EdgetuneError(f"the table cannot be read: {error}", where=str(table)) from error
    if missing:
        raise EdgetuneError(
            "the table lacks a column", where=str(table), got=", ".join(missing),
            action="its first line names them: program,latency_us,load_ms,kind",
        )  # fmt: skip
    return rows


def _number(row: Mapping[str, str], column: str, where: str, default: float | None = None) -> float:
    text = (row.get(column) or "").strip()
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise EdgetuneError(f"{column} must be a positive number", where=where, got=text)
    return value
