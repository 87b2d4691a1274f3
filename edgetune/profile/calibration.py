"""A calibration: the rates of each kernel's terms, the tiles of products, and its error.

It is stored as JSON next to the descriptor, or in the user's folder for a descriptor that ships with edgetune.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from edgetune.core.errors import EdgetuneError
from edgetune.core.files import write_atomically
from edgetune.core.validated import list_faults
from edgetune.profile.facts import StrictRecord
from edgetune.profile.terms import SINGLE, CacheSizes, KernelTile
from edgetune.program.operators import DType, Kind

ENDING = ".calibration.json"
Rate = Annotated[float, Field(ge=0, le=1e9)]  # microseconds per unit of a term


class Curve(StrictRecord):
    """The time of one kernel: the sum of its terms (`edgetune.profile.terms`), each by its rate."""

    kind: Kind
    delegated: bool
    rates: dict[str, Rate] = Field(min_length=1)
    programs: int = Field(ge=1)  # that it was fitted to
    error_pct: float | None = Field(default=None, ge=0)  # median over left-out programs it leads, if any


class Interval(StrictRecord):
    """How well programs from some latency on are predicted."""

    from_us: float = Field(ge=0, le=1e12)
    log: float = Field(gt=0, le=10)  # half the width of the prediction interval, as a natural logarithm


class Calibration(StrictRecord):
    """The result of `edgetune devices calibrate`."""

    format: int = Field(default=4, ge=4, le=4)
    device: str = Field(min_length=1)
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    engine: str = Field(min_length=1)
    versions: dict[str, str]
    threads: int = Field(ge=1, le=1024)
    programs: int = Field(ge=1, le=100_000)  # of single operators
    networks: int = Field(ge=0, le=100_000)
    error_pct: float = Field(ge=0, le=1e4)  # median over left-out networks, or other programs if there are none
    error_p90_pct: float = Field(ge=0, le=1e4)
    noise_pct: float = Field(ge=0, le=1e4)  # median difference between two timings of one program
    interval_pct: float = Field(gt=0, lt=100)  # target coverage of the prediction interval
    intervals: tuple[Interval, ...] = Field(min_length=1)  # by rising latency, the first from 0
    call_us: Rate  # one execution of a program
    delegate_call_us: Rate
    load_ms: Rate  # of a program, and for each MiB of its weights
    load_ms_per_mib: Rate
    near_cache_bytes: float = Field(gt=0)
    last_cache_bytes: float = Field(gt=0)
    tiles: dict[DType, KernelTile]
    traffic: dict[str, Rate]  # by term, for a thousand bytes from beyond a cache
    curves: dict[str, Curve] = Field(min_length=1)
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _useful(self) -> Calibration:
        for name, curve in self.curves.items():
            if not any(curve.rates.values()):
                raise ValueError(f"curves.{name}: one of its rates must be positive")
        starts = [one.from_us for one in self.intervals]
        if starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"intervals: they must begin at 0 and rise, not {starts}")
        return self

    def interval_log(self, us: float) -> float:
        """Half the width of the interval of a program that takes so long."""
        return [one.log for one in self.intervals if one.from_us <= us][-1]

    @property
    def caches(self) -> CacheSizes:
        """The cache sizes that traffic is computed from."""
        return CacheSizes(self.near_cache_bytes, self.last_cache_bytes)

    def tile(self, dtype: DType) -> KernelTile:
        """The tile of this type's products."""
        return self.tiles.get(dtype, SINGLE)


def calibration_path(descriptor: Path) -> Path:
    """`host.calibration.json` for `host.yaml`."""
    return descriptor.with_suffix("").with_name(descriptor.stem + ENDING)


def read(path: Path) -> Calibration | None:
    """The calibration in that file; `None` if there is none. Raises `EdgetuneError` with field and reason."""
    if not path.is_file():
        return None
    try:
        return Calibration.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        fault = list_faults(Calibration, error)[0] if isinstance(error, ValidationError) else str(error)
        raise EdgetuneError(
            f"the calibration cannot be read: {fault}",
            where=str(path),
            action="run `edgetune devices calibrate` again, or remove the file",
        ) from error


def write(path: Path, calibration: Calibration) -> None:
    """Write it atomically."""
    write_atomically(path, json.dumps(calibration.model_dump(mode="json"), indent=1) + "\n")
