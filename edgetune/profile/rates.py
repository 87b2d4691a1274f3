"""The peak arithmetic rate and memory bandwidth of a device, and their uncertainty."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgetune.profile.device import Device
from edgetune.profile.facts import Fact
from edgetune.program.operators import DType, Kind

# Uncertainty of a number of this trust, as a natural logarithm (0.15: a factor of 1.16).
TRUST_LOG = {"high": 0.05, "medium": 0.15, "low": 0.30}
UNKNOWN_LOG = 0.60  # a named default stands in for the number: a factor of 1.8

# GB/s if no figure is published: the middle of what vendors list for the family.
DEFAULT_BANDWIDTH_GB_S = {"phone": 51.2, "board": 12.8, "jetson": 51.2, "computer": 20.0, "microcontroller": 1.6}
DEFAULT_GHZ = {"phone": 2.5, "board": 1.5, "jetson": 1.5, "computer": 2.5, "microcontroller": 0.2}
DEFAULT_MACS_PER_CYCLE = 8.0  # two 128-bit FMA pipes
DEFAULT_CACHE_BYTES = 1024 * 1024  # last level, where unknown: small enough not to flatter
CACHE_RATIO = 4.0  # a shared cache against main memory, usual for the chips described

_DENSE: frozenset[Kind] = frozenset({"conv", "pointwise-conv", "linear", "matmul"})


@dataclass(frozen=True)
class Rates:
    """Peak rates with the threads of the descriptor. `*_log`: uncertainty, as a natural logarithm."""

    threads_gmacs: float  # fp32, all threads in use
    core_gmacs: float  # fp32, the fastest core alone
    memory_gb_s: float
    cache_bytes: float
    flags: frozenset[str] | None
    compute_log: float
    memory_log: float
    notes: tuple[str, ...]

    def speedup(self, kind: Kind, dtype: DType) -> float:
        """Multiply-accumulates per cycle in this type, against fp32.

        SDOT takes 16 products where FMLA takes 4, SMMLA 32; bf16 is widened to fp32 by the kernels in use.
        """
        if dtype in ("fp32", "bf16"):
            return 1.0
        if dtype == "fp16":
            return 2.0 if self.flags is not None and "fp16" in self.flags else 1.0
        if kind not in _DENSE:
            return 1.5
        if self.flags is None:
            return 4.0
        if "i8mm" in self.flags:
            return 8.0
        return 4.0 if self.flags & {"dotprod", "vnni", "amx"} else 1.5

    def isa_log(self, kind: Kind, dtype: DType) -> float:
        """What unknown ISA flags add: dotprod is assumed, the truth may be i8mm or neither."""
        unknown = self.flags is None and dtype in ("int8", "8da4w", "fp16") and kind in _DENSE
        return 0.7 if unknown else 0.0


def rates_of(device: Device) -> Rates:
    """The peak rates of the fastest cores, as many as there are threads; a missing number by a named default."""
    notes: list[str] = []
    default_ghz, left, total, fastest = DEFAULT_GHZ[device.family], device.thread_count, 0.0, 0.0
    used: list[Fact] = []
    for cluster in device.clusters:
        taken = min(left, int(cluster.count.value or 0))
        if taken == 0:
            break
        ghz = _value(cluster.ghz, default_ghz, f"clock of {cluster.core} unknown: {default_ghz:g} GHz assumed", notes)
        lanes = _value(
            cluster.fp32_macs_per_cycle,
            DEFAULT_MACS_PER_CYCLE,
            f"arithmetic width of {cluster.core} unknown: {DEFAULT_MACS_PER_CYCLE:g} MAC/cycle assumed",
            notes,
        )
        total, fastest, left = total + taken * ghz * lanes, max(fastest, ghz * lanes), left - taken
        used += [cluster.ghz, cluster.fp32_macs_per_cycle]
    default = DEFAULT_BANDWIDTH_GB_S[device.family]
    bandwidth = device.memory.bandwidth_gb_s
    memory_gb_s = _value(
        bandwidth, default, f"memory bandwidth unknown: assumes the {device.family} default of {default:g} GB/s", notes
    )
    if device.isa.value is None:
        notes.append("ISA flags unknown: dotprod assumed for 8-bit types")
    cache = device.caches.last_level_kib.value
    return Rates(
        threads_gmacs=total,
        core_gmacs=fastest,
        memory_gb_s=memory_gb_s,
        cache_bytes=cache * 1024 if cache is not None else DEFAULT_CACHE_BYTES,
        flags=frozenset(device.isa.value) if device.isa.value is not None else None,
        compute_log=max(_logs(used)),
        memory_log=max(_logs([bandwidth])),
        notes=tuple(notes),
    )


def _value(fact: Fact, default: float, note: str, notes: list[str]) -> float:
    if fact.value is None:
        notes.append(note)
        return default
    return fact.value


def _logs(facts: Iterable[Fact]) -> list[float]:
    return [TRUST_LOG[fact.trust] if fact.trust is not None else UNKNOWN_LOG for fact in facts]
