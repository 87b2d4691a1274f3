"""Published measurements (`devices/published.yaml`), and the prediction for each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from edgetune.core.errors import EdgetuneError
from edgetune.core.numbers import MIB
from edgetune.core.validated import list_faults
from edgetune.profile.cost import predict
from edgetune.profile.device import Device
from edgetune.profile.facts import Fact, StrictRecord
from edgetune.profile.reference import NETWORKS
from edgetune.profile.reference.language import (
    ARCHITECTURES,
    QUANTIZATION_SCHEMES,
    Architecture,
    QuantizationScheme,
    decode,
    file_mib,
    prefill,
)
from edgetune.program.operators import DType, Operator
from edgetune.recipe.document import read

Quantity = Literal["decode_tokens_per_s", "prefill_tokens_per_s", "latency_ms", "file_mib", "peak_memory_mib"]
Subject = Literal["language", "vision", "other engines", "memory"]

UNITS: dict[Quantity, str] = {
    "decode_tokens_per_s": "tokens/s",
    "prefill_tokens_per_s": "tokens/s",
    "latency_ms": "ms",
    "file_mib": "MiB",
    "peak_memory_mib": "MiB",
}
_COARSE = 0.1  # a row whose rounding changes it by more is not counted


class PublishedColumn(StrictRecord):
    """A device, as configured by the source."""

    device: str = Field(min_length=1)
    threads: int | None = Field(default=None, ge=1, le=1024)  # default: the descriptor's
    ghz: float | None = Field(default=None, ge=0.1, le=10)  # of the fastest cores, default: the descriptor's
    note: str = ""


class PublishedTable(StrictRecord):
    """One table of one source."""

    engine: str = Field(min_length=1)
    setting: Literal["shell", "own app", "app"]
    quantity: Quantity
    dtype: DType | None = None  # of networks; a language model's row names its quantization scheme
    tokens: int = Field(default=0, ge=0, le=1_000_000)
    rounded_to: float = Field(default=0, ge=0, le=1e6)
    source: str = Field(min_length=1)
    columns: tuple[PublishedColumn, ...] = Field(min_length=1)
    rows: dict[str, tuple[float | None, ...]] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_table(self) -> PublishedTable:
        vision = self.quantity == "latency_ms"
        if vision != (self.dtype is not None):
            raise ValueError("dtype: latencies need one, language models name theirs in the row")
        if self.quantity == "prefill_tokens_per_s" and not self.tokens:
            raise ValueError("tokens: a prefill needs the length of its prompt")
        for name, values in self.rows.items():
            if vision and name not in NETWORKS:
                raise ValueError(f"rows.{name}: no such network; known: {', '.join(NETWORKS)}")
            if not vision:
                _language(name)
            if len(values) != len(self.columns):
                raise ValueError(f"rows.{name}: {len(values)} figures for {len(self.columns)} columns")
            for value in values:
                if value is not None and not 0 < value < 1e9:
                    raise ValueError(f"rows.{name}: a figure is positive, got {value:g}")
        return self


class Unpredicted(StrictRecord):
    """A published figure that cannot be predicted, with the reason."""

    label: str = Field(min_length=1)
    engine: str = Field(min_length=1)
    value: str = Field(min_length=1)
    why: str = Field(min_length=1)
    source: str = Field(min_length=1)


class Published(StrictRecord):
    """The file."""

    format: Literal[2]
    tables: tuple[PublishedTable, ...] = Field(min_length=1)
    unpredicted: tuple[Unpredicted, ...] = ()


@dataclass(frozen=True)
class PublishedFigure:
    """One published figure."""

    table: PublishedTable
    column: PublishedColumn
    name: str
    value: float

    @property
    def label(self) -> str:
        """A description without the device."""
        words = [self.name]
        if self.table.dtype is not None:
            words.append(self.table.dtype)
        if self.column.threads is not None:
            words.append(f"{self.column.threads} thread{'s' if self.column.threads > 1 else ''}")
        if self.table.quantity != "latency_ms":
            words.append(self.table.quantity.rpartition("_tokens")[0] or self.table.quantity.removesuffix("_mib"))
        return " ".join(words).replace("peak_memory", "peak memory")

    @property
    def subject(self) -> Subject:
        """The group that the row is counted in."""
        if self.table.quantity in ("file_mib", "peak_memory_mib"):
            return "memory"
        if "XNNPACK" not in self.table.engine:
            return "other engines"
        return "vision" if self.table.quantity == "latency_ms" else "language"

    @property
    def coarse(self) -> bool:
        """Whether rounding alone changes the figure by more than a tenth."""
        return self.table.rounded_to / 2 > _COARSE * self.value

    @property
    def operators(self) -> tuple[Operator, ...]:
        """The operators that the engine ran."""
        table = self.table
        if table.dtype is not None:
            return _network(self.name, table.dtype)
        return _model(self.name, table.quantity == "prefill_tokens_per_s", table.tokens)


def figures_of(published: Published) -> Iterator[PublishedFigure]:
    """Every figure, in the order of the file."""
    for table in published.tables:
        for name, values in table.rows.items():
            for column, value in zip(table.columns, values, strict=True):
                if value is not None:
                    yield PublishedFigure(table, column, name, value)


@cache
def load_published() -> Published:
    """The published measurements in the package."""
    name = "published.yaml"
    text = (resources.files("edgetune.devices") / name).read_text(encoding="utf-8")
    return parse(read(text, name).value, name)


def parse(content: object, where: str) -> Published:
    """The tables from the content of a YAML file. Raises `EdgetuneError` with field and reason."""
    if not isinstance(content, dict):
        raise EdgetuneError("the file is a mapping", where=where, got=type(content).__name__)
    try:
        return Published.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise EdgetuneError("; ".join(list_faults(Published, error)[:8]), where=where) from error


def device_as_run(device: Device, column: PublishedColumn) -> Device:
    """The device with the source's clock and threads. Raises for more threads than cores."""
    changes: dict[str, object] = {}
    if column.ghz is not None:
        first = device.clusters[0]
        clock = Fact(value=column.ghz, unit="GHz", source="the published table", trust="high")
        changes["clusters"] = (first.model_copy(update={"ghz": clock}), *device.clusters[1:])
    if column.threads is not None:
        if column.threads > device.cores:
            raise EdgetuneError(f"{device.id} has {device.cores} cores", got=f"{column.threads} threads")
        changes["threads"] = Fact(value=float(column.threads), source="the published table", trust="high")
    return device.model_copy(update=changes) if changes else device


def predict_figure(row: PublishedFigure, device: Device) -> float:
    """The prediction for the row, without the prior, in the row's unit."""
    quantity = row.table.quantity
    if quantity == "file_mib":
        return file_mib(*_language(row.name))
    used = device_as_run(device, row.column)
    if quantity == "peak_memory_mib":
        return _peak_mib(row, used)
    latency_ms = predict(row.operators, used).latency_ms
    if quantity == "latency_ms":
        return latency_ms
    return 1e3 / latency_ms * (row.table.tokens if quantity == "prefill_tokens_per_s" else 1)


def _peak_mib(row: PublishedFigure, device: Device) -> float:
    """With the cache for `tokens` tokens."""
    architecture, scheme = _language(row.name)
    cache_mib = row.table.tokens * architecture.cache_mib_per_token(scheme.cache_bytes)
    program_mib = file_mib(architecture, scheme)
    prediction = predict(
        row.operators, device, plan_bytes=round(cache_mib * MIB), program_bytes=round(program_mib * MIB)
    )  # fmt: skip
    return prediction.peak_memory_mib


@cache
def _network(name: str, dtype: DType) -> tuple[Operator, ...]:
    return NETWORKS[name](dtype=dtype)


@cache
def _model(name: str, prompt: bool, tokens: int) -> tuple[Operator, ...]:
    architecture, scheme = _language(name)
    return prefill(architecture, scheme, tokens) if prompt else decode(architecture, scheme, tokens)


def _language(name: str) -> tuple[Architecture, QuantizationScheme]:
    """The model and the quantization scheme of a row's name. Raises `ValueError`, as validators do."""
    model, _, scheme = name.partition(" ")
    if model not in ARCHITECTURES or scheme not in QUANTIZATION_SCHEMES:
        allowed = f"{', '.join(ARCHITECTURES)} with {', '.join(QUANTIZATION_SCHEMES)}"
        raise ValueError(f"rows.{name}: no such language model and scheme; known: {allowed}")
    return ARCHITECTURES[model], QUANTIZATION_SCHEMES[scheme]
