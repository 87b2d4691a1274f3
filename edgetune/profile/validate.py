"""Predictions held against measurements that others published (`devices/published.yaml`)."""

from __future__ import annotations

import math
from importlib import resources
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from edgetune.profile.cost import predict
from edgetune.profile.device import Device, Value, ids, load
from edgetune.profile.operators import DType
from edgetune.profile.rates import DEFAULT_BANDWIDTH_GB_S, TRUST_LOG, UNKNOWN_LOG
from edgetune.profile.reference import NETWORKS
from edgetune.profile.yaml_file import read_yaml
from edgetune.technique import EdgetuneError

# from the rows of devices/published.yaml: eta of decoding on a phone without any calibration, and its honest band.
ETA, ETA_LOW, ETA_HIGH = 0.55, 0.43, 0.65
_SMALL_PARAMETERS = 200e6  # below, a fixed cost per token dominates and the rule promises too much


class _Row(Value):
    device: str | None
    engine: str = Field(min_length=1)
    unpredicted: str = ""
    source: str = Field(min_length=1)

    def _check_reason(self) -> None:
        if self.device is None and not self.unpredicted:
            raise ValueError("a row without a device needs the reason, in `unpredicted`")


class LanguageRow(_Row):
    """A published decoding speed."""

    model: str
    tokens_per_s: float = Field(gt=0, le=1e6)
    block_parameters: float = Field(default=0, ge=0, le=1e13)
    block_bits: float = Field(default=16, gt=0, le=64)
    head_parameters: float = Field(default=0, ge=0, le=1e13)
    head_bits: float = Field(default=16, gt=0, le=64)

    @model_validator(mode="after")
    def _whole(self) -> LanguageRow:
        self._check_reason()
        if self.device is not None and self.block_parameters <= 0:
            raise ValueError("block_parameters is needed to predict the row")
        return self

    @property
    def gb_per_token(self) -> float:
        """Weights read for one token, in GB."""
        return (self.block_parameters * self.block_bits + self.head_parameters * self.head_bits) / 8e9


class VisionRow(_Row):
    """A published latency of one image."""

    network: str
    dtype: DType
    threads: int = Field(ge=1, le=1024)
    latency_ms: float = Field(gt=0, le=1e6)

    @model_validator(mode="after")
    def _whole(self) -> VisionRow:
        self._check_reason()
        if self.device is not None and not self.unpredicted and self.network not in NETWORKS:
            raise ValueError(f"network: {self.network!r} has no operator list; known: {', '.join(NETWORKS)}")
        return self


class Published(Value):
    """The file of published measurements."""

    format: Literal[1]
    language: tuple[LanguageRow, ...]
    vision: tuple[VisionRow, ...]


class Compared(Value):
    """One published figure beside what the descriptor predicts. `error_pct`: predicted above published is positive."""

    device: str
    engine: str
    what: str
    unit: Literal["tokens/s", "ms"]
    published: float
    predicted: float | None
    low: float | None
    high: float | None
    error_pct: float | None
    inside: bool | None  # the published figure lies in the predicted band
    source: str
    note: str = ""


class Validation(Value):
    """What `edgetune devices validate` found: descriptors that load, faults of those that do not, and the rows."""

    devices: tuple[str, ...]
    faults: tuple[str, ...]
    rows: tuple[Compared, ...]


def decode_tokens_per_s(device: Device, gb_per_token: float) -> tuple[float, float, float]:
    """Low, middle and high decoding speed: eta x GB/s / GB per token; wider the less the bandwidth is trusted.

    Source: the two-parameter rule of `devices/published.yaml` Raises `EdgetuneError` if `gb_per_token` is not positive.
    """
    if not (math.isfinite(gb_per_token) and gb_per_token > 0):
        raise EdgetuneError("GB per token must be positive", got=gb_per_token)
    fact = device.memory.bandwidth_gb_s
    bandwidth = DEFAULT_BANDWIDTH_GB_S[device.family] if fact.value is None else fact.value
    # the rows that gave the band used bandwidths of medium trust: only less trust widens it
    unsure = UNKNOWN_LOG if fact.trust is None else TRUST_LOG[fact.trust]
    widening = unsure if unsure > TRUST_LOG["medium"] else 0.0
    tokens = bandwidth / gb_per_token
    return ETA_LOW * tokens / math.exp(widening), ETA * tokens, ETA_HIGH * tokens * math.exp(widening)


def published() -> Published:
    """The measurements that others published, as shipped."""
    name = "published.yaml"
    text = (resources.files("edgetune.devices") / name).read_text(encoding="utf-8")
    return parse_published(read_yaml(text, name), name)


def parse_published(content: object, where: str) -> Published:
    """The rows from what a YAML file held; `EdgetuneError` with field and reason."""
    if not isinstance(content, dict):
        raise EdgetuneError("the file is a mapping", where=where, got=type(content).__name__)
    rows = {key: tuple(item) if isinstance(item, list) else item for key, item in content.items()}
    try:
        return Published.model_validate(rows)
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()[:8]]
        raise EdgetuneError("; ".join(lines), where=where) from error


def validate() -> Validation:
    """Load every descriptor, and predict every published row that can be predicted."""
    devices: dict[str, Device] = {}
    faults: list[str] = []
    for name in ids():
        try:
            devices[name] = load(name)
        except EdgetuneError as error:
            faults.append(str(error))
    rows = published()
    compared = [_language(row, devices) for row in rows.language] + [_vision(row, devices) for row in rows.vision]
    return Validation(devices=tuple(devices), faults=tuple(faults), rows=tuple(compared))


def _language(row: LanguageRow, devices: dict[str, Device]) -> Compared:
    device = devices.get(row.device or "")
    if device is None or row.unpredicted:
        return _compared(row, row.model, "tokens/s", row.tokens_per_s, None, _why(row))
    band = decode_tokens_per_s(device, row.gb_per_token)
    small = row.block_parameters + row.head_parameters < _SMALL_PARAMETERS
    note = "under 200 M parameters: a fixed cost per token dominates, which the rule leaves out" if small else ""
    return _compared(row, row.model, "tokens/s", row.tokens_per_s, band, note)


def _vision(row: VisionRow, devices: dict[str, Device]) -> Compared:
    what, device = f"{row.network} {row.dtype}, {row.threads} threads", devices.get(row.device or "")
    if device is None or row.unpredicted:
        return _compared(row, what, "ms", row.latency_ms, None, _why(row))
    if row.threads != device.thread_count:
        return _compared(row, what, "ms", row.latency_ms, None, f"{device.id} is described for other threads")
    cost = predict(NETWORKS[row.network](dtype=row.dtype), device)
    note = ""
    if "XNNPACK" not in row.engine:
        note = f"{row.engine} is another engine (Winograd, fp16 where the CPU has it): it ranks devices, no more"
    band = (cost.latency_low_ms, cost.latency_ms, cost.latency_high_ms)
    return _compared(row, what, "ms", row.latency_ms, band, note)


def _why(row: _Row) -> str:
    return row.unpredicted or f"no usable descriptor {row.device!r}"


def _compared(
    row: _Row,
    what: str,
    unit: Literal["tokens/s", "ms"],
    figure: float,
    band: tuple[float, float, float] | None,
    note: str,
) -> Compared:
    low, middle, high = band if band is not None else (None, None, None)
    return Compared(
        device=row.device or "none",
        engine=row.engine,
        what=what,
        unit=unit,
        published=figure,
        predicted=middle,
        low=low,
        high=high,
        error_pct=None if middle is None else 100 * (middle - figure) / figure,
        inside=None if low is None or high is None else low <= figure <= high,
        source=row.source,
        note=note,
    )
