"""One fact of a descriptor: value, unit, source and trust; or null with the reason why it is unknown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from edgetune.core.one_line import OneLine

Trust = Literal["high", "medium", "low"]
Flag = Literal["neon", "dotprod", "fp16", "bf16", "i8mm", "sve2", "sme", "mve", "avx2", "avx512", "vnni", "amx"]
Medium = Literal["ufs", "emmc", "nvme", "sata", "sd", "flash"]


class StrictRecord(OneLine):
    """Base of the records in descriptors and calibrations: immutable, no unknown keys, no conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FactSource(StrictRecord):
    """The source of numbers, and how far to trust it. Facts refer to it by its key under `sources`."""

    source: str = Field(min_length=1)
    trust: Trust


class _Sourced(StrictRecord):
    source: str = ""
    trust: Trust | None = None
    unknown: str = ""  # why the value is null

    @model_validator(mode="after")
    def _check_origin(self) -> _Sourced:
        has_value = getattr(self, "value", None) is not None
        if has_value and (not self.source or self.trust is None):
            raise ValueError("a value needs its source and its trust (high, medium or low)")
        if has_value and self.unknown:
            raise ValueError("a value that is given cannot also be unknown")
        if not has_value and not self.unknown:
            raise ValueError("a null needs the reason, in `unknown`")
        if not has_value and (self.source or self.trust is not None):
            raise ValueError("a null has no source and no trust")
        return self


class Fact(_Sourced):
    """One number with its unit, or `None` with the reason why it is unknown."""

    value: float | None
    unit: str = ""  # must be the field's; only counts have none


class Flags(_Sourced):
    """Instruction set extensions as the operating system prints them, or `None` with the reason."""

    value: tuple[Flag, ...] | None

    @model_validator(mode="after")
    def _check_unique(self) -> Flags:
        for flag in self.value or ():
            if (self.value or ()).count(flag) > 1:
                raise ValueError(f"{flag} is named twice")
        return self


class StorageKind(_Sourced):
    """The kind of storage that a program is read from, or `None` with the reason."""

    value: Medium | None


def _between(unit: str, low: float, high: float, *, whole: bool = False) -> Callable[[Fact], Fact]:
    def check(fact: Fact) -> Fact:
        if fact.unit != unit and (fact.unit or fact.value is not None):
            raise ValueError(f"the unit is {unit or 'none'}, got {fact.unit or 'none'}")
        if fact.value is not None and not low <= fact.value <= high:
            raise ValueError(f"{fact.value:g} is outside {low:g} to {high:g} {unit}".rstrip())
        if fact.value is not None and whole and fact.value != int(fact.value):
            raise ValueError(f"{fact.value:g} is not a whole number")
        return fact

    return check


# From a microcontroller (0.2 GHz, 2 MiB of SRAM, milliwatts) to a server.
Count = Annotated[Fact, AfterValidator(_between("", 1, 1024, whole=True))]
PerCycle = Annotated[Fact, AfterValidator(_between("MAC/cycle", 0.25, 1024))]
Gigahertz = Annotated[Fact, AfterValidator(_between("GHz", 0.01, 10))]
Megahertz = Annotated[Fact, AfterValidator(_between("MHz", 10, 5000))]
Bits = Annotated[Fact, AfterValidator(_between("bit", 8, 8192, whole=True))]
Transfers = Annotated[Fact, AfterValidator(_between("MT/s", 10, 50_000))]
Bandwidth = Annotated[Fact, AfterValidator(_between("GB/s", 0.01, 10_000))]
Gibibytes = Annotated[Fact, AfterValidator(_between("GiB", 0.0001, 8192))]
StorageGibibytes = Annotated[Fact, AfterValidator(_between("GiB", 0.0001, 131_072))]
Mebibytes = Annotated[Fact, AfterValidator(_between("MiB", 0.1, 8_388_608))]
Kibibytes = Annotated[Fact, AfterValidator(_between("KiB", 1, 4_194_304))]
MegabytesPerSecond = Annotated[Fact, AfterValidator(_between("MB/s", 0.1, 100_000))]
Gigaflops = Annotated[Fact, AfterValidator(_between("GFLOPS", 0.1, 1e7))]
Teraops = Annotated[Fact, AfterValidator(_between("TOPS", 0.001, 1e5))]
Watts = Annotated[Fact, AfterValidator(_between("W", 0.001, 2000))]
