"""Compare one program on many devices: predicted latency, memory, energy, cold start, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import Predicted
from edgetune.core.numbers import MIB, align_columns, format_number, pluralize
from edgetune.profile.calls import predict_calls
from edgetune.profile.cost import fits
from edgetune.profile.device import Device, load
from edgetune.recipe.names import HOST, device_ids
from edgetune.report.device_tables import CPU_TARGETS

if TYPE_CHECKING:
    from edgetune.program.artifact import Artifact

_MS = 1e3


@dataclass(frozen=True)
class GenerationSpeed:
    """Predicted speed of a text-generation program on one device; rates with the ends of their prediction intervals."""

    decode_tokens_s: tuple[float, float, float]  # middle, low, high
    prefill_tokens_s: tuple[float, float, float]
    first_token_ms: tuple[float, float, float]  # after a prompt of `prefill_tokens`, the program loaded


@dataclass(frozen=True)
class Line:
    """One device. `predicted`: each kind of call, that of one token first; empty if the program cannot run there."""

    device: str
    name: str
    family: str
    predicted: tuple[Predicted, ...]
    fits: bool | None  # None: its memory is unknown
    why: str = ""  # it does not fit, or this is unknown
    speed: GenerationSpeed | None = None

    @property
    def cold_start_ms(self) -> float | None:
        """Load, pack and run once; a text-generation program reads a prompt of `prefill_tokens`."""
        return self.predicted[-1].cold_start_ms if self.predicted else None


@dataclass(frozen=True)
class Comparison:
    """The program, its devices by predicted latency, and the descriptors that could not be used."""

    program: str
    target: str
    size_mib: float
    lines: tuple[Line, ...]
    faults: tuple[tuple[str, str], ...] = ()  # the descriptor, and what is wrong with it
    prefill_tokens: int | None = None  # of a text-generation program, and what its cache takes
    cache_mib: float | None = None
    notes: tuple[str, ...] = ()


def compare(artifact: Artifact | str | Path, devices: Sequence[str | Device] | None = None) -> Comparison:
    """Predict a program on these devices, by default all known ones, the fastest first.

    Left out, with the reason in `faults`: devices without a published runtime, this host if it is not calibrated, and
    by default descriptors with a fault. Raises `EdgetuneError` if a named device is unknown or has a fault, and if no
    device is left.
    """
    if isinstance(artifact, (str, Path)):
        from edgetune.program.artifact import Artifact

        artifact = Artifact.load(artifact, "model", "language")
    manifest, faults = artifact.manifest, list[tuple[str, str]]()
    lines: list[Line] = []
    for device in device_ids() if devices is None else _unique(devices):
        try:
            described = device if isinstance(device, Device) else load(device)
        except EdgetuneError as error:
            if devices is not None and device != HOST:
                raise
            action = f"; next: {error.action}" if device == HOST else ""
            faults.append((str(device), str(error).split("\n", 1)[0] + action))
            continue
        if described.no_runtime:
            faults.append((described.id, f"no runtime: {described.no_runtime}"))
            continue
        lines.append(_line(artifact, described))
    if not lines:
        raise EdgetuneError("no device is left to compare", got="; ".join(f"{name}: {fault}" for name, fault in faults))
    prefill = manifest.language.prefill_tokens if manifest.language is not None else None
    return Comparison(
        program=artifact.path.name,
        target=manifest.target,
        size_mib=manifest.total_bytes / MIB,
        lines=tuple(sorted(lines, key=_order)),
        faults=tuple(faults),
        prefill_tokens=prefill,
        cache_mib=manifest.language.cache_bytes / MIB if manifest.language is not None else None,
        notes=_notes(manifest.target, lines, prefill),
    )


def _unique(devices: Sequence[str | Device]) -> tuple[str | Device, ...]:
    """The devices without duplicates."""
    if not devices:
        raise EdgetuneError("no device is named", action="name one, or omit --devices to compare all")
    unique: list[str | Device] = []
    for device in devices:
        if device not in unique:
            unique.append(device)
    return tuple(unique)


def _line(artifact: Artifact, device: Device) -> Line:
    target, language = artifact.manifest.target, artifact.manifest.language
    if target != "portable" and target not in device.targets:
        why = f"cannot run {target} programs, only {', '.join(device.targets)}"
        return Line(device.id, device.name, device.family, (), False, why)
    predicted = predict_calls(artifact, device)
    reasons = fits(device, predicted[0].peak_memory_mib)
    memory = device.memory
    unknown = memory.usable_app_memory_mib.value is None and memory.ram_gib.value is None
    return Line(
        device=device.id,
        name=device.name,
        family=device.family,
        predicted=predicted,
        fits=None if unknown else not reasons,
        why="memory size unknown" if unknown else "; ".join(reasons),
        speed=_generation_speed(predicted, language.prefill_tokens) if language is not None else None,
    )


def _generation_speed(predicted: Sequence[Predicted], prefill_tokens: int) -> GenerationSpeed:
    token, prompt = predicted

    def tokens_s(call: Predicted, tokens: int) -> tuple[float, float, float]:
        return tuple(tokens * _MS / ms for ms in (call.latency_ms, call.latency_high_ms, call.latency_low_ms))  # type: ignore[return-value]

    first_token_ms = (prompt.latency_ms, prompt.latency_low_ms, prompt.latency_high_ms)
    return GenerationSpeed(tokens_s(token, 1), tokens_s(prompt, prefill_tokens), first_token_ms)


def _order(line: Line) -> tuple[bool, float, str]:
    """The sort key: latency, devices without a prediction last."""
    return not line.predicted, line.predicted[0].latency_ms if line.predicted else 0.0, line.device


def _notes(target: str, lines: Sequence[Line], prefill_tokens: int | None) -> tuple[str, ...]:
    """Notes on the whole table."""
    predictions = [line.predicted[0] for line in lines if line.predicted]
    notes = [
        "All values are predicted from device descriptors, for the CPU with the threads shown. None was measured.",
        "GPUs and NPUs are not predicted. Energy is an order-of-magnitude estimate.",
    ]
    shares = sorted({one.interval_pct for one in predictions if one.interval_pct is not None})
    if shares:
        coverage = " or ".join(f"{share:g} %" for share in shares)
        unchecked = " Some were never validated." if any(one.interval_pct is None for one in predictions) else ""
        notes.append(f"The intervals are designed to cover {coverage} of programs.{unchecked}")
    if prefill_tokens is not None:
        notes.append(
            f"Latency and energy are those of one token after {prefill_tokens} tokens. The time to the first token is "
            f"for a prompt of {prefill_tokens} tokens. A cold start also loads the program."
        )
    if target not in CPU_TARGETS and predictions:
        notes.append(f"Computed for the CPU cores: {target} on other hardware is not predicted.")
    return tuple(notes)


# dropped in this order if the terminal is too narrow
_SPARE_COLUMNS = ("cold ms", "calibrated", "mJ", "J/1,000 tokens", "prefill/s", "MiB")


def text(comparison: Comparison, width: int | None = None) -> str:
    """The comparison as a table for a terminal of this width, without the columns that do not fit."""
    head = ("device", *column_headings(comparison), "fits")
    rows = [(*row[:-1], _verdict(line)) for row, line in zip(rows_of(comparison), comparison.lines, strict=True)]
    table = [head, *rows]
    lines = _lines(table)
    for name in _SPARE_COLUMNS:
        if width is not None and max(map(len, lines)) > width and name in table[0]:
            index = table[0].index(name)
            table = [(*row[:index], *row[index + 1 :]) for row in table]
            lines = _lines(table)
    first = f"{comparison.program}: {comparison.target}, {format_number(comparison.size_mib)} MiB"
    if comparison.cache_mib is not None:
        first += f", and {format_number(comparison.cache_mib)} MiB of memory for its cache"
    shown = [f"{first}; predicted for the {'CPUs' if len(rows) > 1 else 'CPU'} of {pluralize(len(rows), 'device')}", ""]
    shown += lines
    reasons = [(line.device, line.why) for line in comparison.lines if line.why]
    for title, entries in (("does not fit, or unknown", reasons), ("left out", comparison.faults)):
        if entries:
            shown += ["", title, *(f"  {name}: {reason}" for name, reason in entries)]
    return "\n".join([*shown, "", *comparison.notes])


def _lines(table: Sequence[Sequence[str]]) -> list[str]:
    """Names and verdicts to the left, figures to the right."""
    return align_columns(table, right=range(1, len(table[0]) - 1))


def _verdict(line: Line) -> str:
    return "?" if line.fits is None else "yes" if line.fits else "no"


def rows_of(comparison: Comparison) -> list[tuple[str, ...]]:
    """For each line the device, its figures under `column_headings`, and whether it fits."""
    return [(line.device, *_figures(line, len(column_headings(comparison))), _fits(line)) for line in comparison.lines]


def column_headings(comparison: Comparison) -> tuple[str, ...]:
    """The headings of the figures, with units."""
    if comparison.prefill_tokens is not None:
        return (
            "threads", "tokens/s", "interval", "prefill/s", "1st token ms", "interval", "MiB", "J/1,000 tokens",
            "cold ms", "calibrated", "not predicted",
        )  # fmt: skip
    return ("threads", "ms", "interval", "MiB", "mJ", "cold ms", "calibrated", "not predicted")


def _figures(line: Line, many: int) -> tuple[str, ...]:
    """The cells between name and verdict."""
    if not line.predicted:
        return ("-",) * many
    one = line.predicted[0]
    shared = (
        format_number(one.peak_memory_mib),
        format_number(one.energy_mj),  # millijoules of one, and joules of a thousand
        format_number(line.cold_start_ms),
        "yes" if one.calibrated else "no",
        ", ".join(kind.upper() for kind in one.accelerators or ()) or "-",
    )
    threads = str(one.threads or "-")
    if line.speed is None:
        return (threads, format_number(one.latency_ms), _interval(one.latency_low_ms, one.latency_high_ms), *shared)
    decode, decode_interval = format_number(line.speed.decode_tokens_s[0]), _interval(*line.speed.decode_tokens_s[1:])
    first, first_interval = format_number(line.speed.first_token_ms[0]), _interval(*line.speed.first_token_ms[1:])
    prefill = format_number(line.speed.prefill_tokens_s[0])
    return (threads, decode, decode_interval, prefill, first, first_interval, *shared)


def _fits(line: Line) -> str:
    if line.fits is None:
        return f"? {line.why}"
    return "yes" if line.fits else f"no: {line.why}"


def _interval(low: float, high: float) -> str:
    return f"{format_number(low)} to {format_number(high)}"


def to_json_values(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values."""
    return {
        "program": comparison.program,
        "target": comparison.target,
        "size_mib": comparison.size_mib,
        "prefill_tokens": comparison.prefill_tokens,
        "cache_mib": comparison.cache_mib,
        "devices": [_line_values(line) for line in comparison.lines],
        "faults": [{"device": name, "fault": fault} for name, fault in comparison.faults],
        "notes": list(comparison.notes),
    }


def _line_values(line: Line) -> dict[str, Any]:
    one = line.predicted[0] if line.predicted else None
    values: dict[str, Any] = {
        "device": line.device,
        "name": line.name,
        "family": line.family,
        "fits": line.fits,
        "why": line.why,
        "calibrated": one.calibrated if one is not None else None,
        "cold_start_ms": line.cold_start_ms,
        "energy_j_per_1000": one.energy_mj if one is not None else None,
        "predicted": [call.model_dump(mode="json") for call in line.predicted],
    }
    if line.speed is not None:
        for name in ("decode_tokens_s", "prefill_tokens_s", "first_token_ms"):
            values[name] = dict(zip(("middle", "low", "high"), getattr(line.speed, name), strict=True))
    return values
