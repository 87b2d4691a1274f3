"""What is known of a device: a descriptor in which every number carries where it came from and how far to trust it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgetune.profile.operators import DType, Kind
from edgetune.profile.yaml_file import read_yaml
from edgetune.technique import EdgetuneError

Trust = Literal["high", "medium", "low"]
Flag = Literal["neon", "dotprod", "fp16", "bf16", "i8mm", "sve2", "avx2", "avx512", "vnni", "amx"]
TargetName = Literal["xnnpack", "vulkan", "coreml", "mps", "qnn", "cuda", "openvino", "ethos-u", "tosa"]

SUFFIX = ".yaml"
HOST = "host"


class Value(BaseModel):
    """Base of everything in a descriptor: immutable, no unknown keys, no quiet conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Sourced(Value):
    unit: str = ""
    source: str = ""
    trust: Trust | None = None
    unknown: str = ""  # why nobody knows, where the value is null

    def _check_origin(self, known: bool) -> None:
        if known and (not self.source or self.trust is None):
            raise ValueError("a value needs its source and its trust (high, medium or low)")
        if known and self.unknown:
            raise ValueError("a value that is given cannot also be unknown")
        if not known and not self.unknown:
            raise ValueError("a null needs the reason, in `unknown`")
        if not known and (self.source or self.trust is not None):
            raise ValueError("a null has no source and no trust")


class Fact(_Sourced):
    """One number, or `None` with the reason why it is unknown."""

    value: float | None

    @model_validator(mode="after")
    def _origin(self) -> Fact:
        self._check_origin(self.value is not None)
        return self


class Flags(_Sourced):
    """Instruction set extensions as the operating system prints them, or `None` with the reason."""

    value: tuple[Flag, ...] | None

    @model_validator(mode="after")
    def _origin(self) -> Flags:
        self._check_origin(self.value is not None)
        return self


def _between(unit: str, low: float, high: float, *, whole: bool = False) -> Callable[[Fact], Fact]:
    def check(fact: Fact) -> Fact:
        if fact.unit and fact.unit != unit:
            raise ValueError(f"the unit is {unit or 'none'}, got {fact.unit!r}")
        if fact.value is not None and not low <= fact.value <= high:
            raise ValueError(f"{fact.value:g} is outside {low:g} to {high:g} {unit}".rstrip())
        if fact.value is not None and whole and fact.value != int(fact.value):
            raise ValueError(f"{fact.value:g} is not a whole number")
        return fact

    return check


Count = Annotated[Fact, AfterValidator(_between("", 1, 1024, whole=True))]
PerCycle = Annotated[Fact, AfterValidator(_between("MAC/cycle", 0.25, 1024))]
Gigahertz = Annotated[Fact, AfterValidator(_between("GHz", 0.1, 10))]
Megahertz = Annotated[Fact, AfterValidator(_between("MHz", 50, 5000))]
Bits = Annotated[Fact, AfterValidator(_between("bit", 8, 8192, whole=True))]
Transfers = Annotated[Fact, AfterValidator(_between("MT/s", 100, 50_000))]
Bandwidth = Annotated[Fact, AfterValidator(_between("GB/s", 0.1, 10_000))]
Gibibytes = Annotated[Fact, AfterValidator(_between("GiB", 0.05, 8192))]
Mebibytes = Annotated[Fact, AfterValidator(_between("MiB", 1, 8_388_608))]
Kibibytes = Annotated[Fact, AfterValidator(_between("KiB", 1, 4_194_304))]
Gigaflops = Annotated[Fact, AfterValidator(_between("GFLOPS", 1, 1e7))]
Teraops = Annotated[Fact, AfterValidator(_between("TOPS", 0.01, 1e5))]
Watts = Annotated[Fact, AfterValidator(_between("W", 0.1, 2000))]


class Cluster(Value):
    """Cores of one kind."""

    core: str = Field(min_length=1)
    count: Count
    ghz: Gigahertz
    fp32_macs_per_cycle: PerCycle  # of one core: FMA pipes x 32-bit lanes


class Memory(Value):
    """Main memory. `ram_gib` is what is fitted; `usable_app_memory_mib` what one process gets before it is killed."""

    bus_bits: Bits
    mega_transfers_per_s: Transfers
    bandwidth_gb_s: Bandwidth  # theoretical peak, except where the source says measured
    ram_gib: Gibibytes
    usable_app_memory_mib: Mebibytes

    @model_validator(mode="after")
    def _agree(self) -> Memory:
        bits, rate, given = self.bus_bits.value, self.mega_transfers_per_s.value, self.bandwidth_gb_s.value
        if bits is not None and rate is not None and given is not None:
            computed = bits / 8 * rate / 1000
            if abs(computed - given) > 0.01 * computed:
                raise ValueError(
                    f"bandwidth_gb_s is {given:g}, but {bits:g} bit / 8 x {rate:g} MT/s / 1000 is {computed:g} GB/s"
                )
        usable, ram = self.usable_app_memory_mib.value, self.ram_gib.value
        if usable is not None and ram is not None and usable > ram * 1024:
            raise ValueError(f"usable_app_memory_mib is {usable:g}, more than the {ram:g} GiB fitted")
        return self


class Caches(Value):
    """Of the fastest cores: L2 of one core, last level shared by all."""

    l2_kib: Kibibytes
    last_level_kib: Kibibytes

    @model_validator(mode="after")
    def _agree(self) -> Caches:
        l2, last = self.l2_kib.value, self.last_level_kib.value
        if l2 is not None and last is not None and last < l2:
            raise ValueError(f"last_level_kib is {last:g}, less than the {l2:g} of one core's L2")
        return self


class Gpu(Value):
    """Graphics or accelerator facts. Nothing is predicted from them yet."""

    name: str = Field(min_length=1)
    clock_mhz: Megahertz
    fp16_gflops: Gigaflops
    dense_int8_tops: Teraops  # dense: half of a figure printed for sparse weights


class Power(Value):
    """What the whole device takes."""

    low_w: Watts
    high_w: Watts

    @model_validator(mode="after")
    def _agree(self) -> Power:
        low, high = self.low_w.value, self.high_w.value
        if low is not None and high is not None and low > high:
            raise ValueError(f"low_w is {low:g}, above high_w {high:g}")
        return self


class Efficiency(Value):
    """Fitted for one kind of operator: shares of the peak arithmetic rate and of the memory bandwidth."""

    kind: Kind
    dtype: DType
    delegated: bool
    compute: float = Field(gt=0, le=16)
    memory: float = Field(gt=0, le=64)  # above 1: served from a cache
    compute_told: bool  # whether a timed program was bound by arithmetic; else the share is still the prior
    memory_told: bool  # the same for memory traffic
    programs: int = Field(ge=1)
    error_pct: float | None = Field(ge=0, le=1e4)  # left out one by one; None: too few programs to tell


class Calibration(Value):
    """What `edgetune devices calibrate` fitted to timed micro-programs."""

    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    engine: str = Field(min_length=1)
    versions: dict[str, str]
    threads: int = Field(ge=1, le=1024)
    programs: int = Field(ge=1, le=10_000)
    error_pct: float = Field(ge=0, le=1e4)  # median of the errors with each program left out in turn
    error_p90_pct: float = Field(ge=0, le=1e4)
    call_us: float = Field(gt=0, le=1e6)  # one execution of a program
    delegate_call_us: float = Field(gt=0, le=1e6)
    delegated_operator_us: float = Field(gt=0, le=1e6)
    portable_operator_us: float = Field(gt=0, le=1e6)
    efficiencies: tuple[Efficiency, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique(self) -> Calibration:
        keys = [(e.kind, e.dtype, e.delegated) for e in self.efficiencies]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"two efficiencies for {' '.join(str(part) for part in key)}")
        return self


class Device(Value):
    """A descriptor. `clusters` and `targets` stand in order: fastest cores first, preferred backend first."""

    format: Literal[1]
    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    name: str = Field(min_length=1)
    soc: str = Field(min_length=1)
    family: Literal["phone", "board", "jetson", "computer"]
    clusters: tuple[Cluster, ...] = Field(min_length=1)
    threads: Count  # to run a program with
    isa: Flags
    memory: Memory
    caches: Caches
    gpu: Gpu | None
    power: Power
    targets: tuple[TargetName, ...] = Field(min_length=1)
    notes: tuple[str, ...] = ()
    calibration: Calibration | None = None

    @model_validator(mode="after")
    def _agree(self) -> Device:
        for number, cluster in enumerate(self.clusters):
            if cluster.count.value is None:
                raise ValueError(f"clusters.{number}.count: the number of cores must be known")
        if self.threads.value is None:
            raise ValueError("threads: the number of threads must be given")
        if self.threads.value > self.cores:
            raise ValueError(f"threads is {self.threads.value:g}, but there are {self.cores} cores")
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("targets: a backend is named twice")
        return self

    @property
    def cores(self) -> int:
        """Cores of all clusters."""
        return sum(int(cluster.count.value or 0) for cluster in self.clusters)

    @property
    def thread_count(self) -> int:
        """Threads to run a program with."""
        return int(self.threads.value or 1)

    def facts(self) -> Iterator[tuple[str, Fact | Flags]]:
        """Every sourced value with its dotted path, in the order of the file."""
        yield from _facts(self, "")


def _facts(value: object, path: str) -> Iterator[tuple[str, Fact | Flags]]:
    if isinstance(value, (Fact, Flags)):
        yield path, value
    elif isinstance(value, Value):
        for name in type(value).model_fields:
            yield from _facts(getattr(value, name), f"{path}.{name}" if path else name)
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _facts(item, f"{path}.{number}")


def parse(content: object, where: str) -> Device:
    """A descriptor from what a YAML file held; every fault of the file in one error."""
    if not isinstance(content, dict):
        raise EdgetuneError("a descriptor is a mapping", where=where, got=type(content).__name__)
    try:
        return Device.model_validate(_tuples(content))
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in e['loc']) or 'file'}: {_reason(e['msg'])}" for e in error.errors()]
        raise EdgetuneError(
            "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else ""),
            where=where,
            action="correct the file; `edgetune devices show pixel-8` prints a whole one",
        ) from error


def _reason(message: str) -> str:
    plain = message.removeprefix("Value error, ")
    return plain[:1].lower() + plain[1:]


def _tuples(value: object) -> object:
    """Lists as tuples: strict validation takes no list for a tuple."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def user_folder() -> Path:
    """Where descriptors of one's own lie: `$XDG_CONFIG_HOME/edgetune/devices`, by default under `~/.config`."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    # the XDG specification says to ignore a relative path
    folder = Path(base) if base and Path(base).is_absolute() else Path.home() / ".config"
    return folder / "edgetune" / "devices"


def _shipped() -> dict[str, str]:
    folder = resources.files("edgetune.devices")
    names = [item.name for item in folder.iterdir() if item.name.endswith(SUFFIX) and item.name != "published.yaml"]
    return {name.removesuffix(SUFFIX): (folder / name).read_text(encoding="utf-8") for name in sorted(names)}


def _own() -> dict[str, Path]:
    folder = user_folder()
    return {path.stem: path for path in sorted(folder.glob("*" + SUFFIX))} if folder.is_dir() else {}


def ids() -> tuple[str, ...]:
    """Names that `load` takes: those in the package, then those in the user's folder."""
    shipped = tuple(_shipped())
    return shipped + tuple(name for name in _own() if name not in shipped)


def load(id_or_path: str | Path) -> Device:
    """The descriptor of that name, or in that file if it ends in `.yaml`.

    Raises `EdgetuneError` for an unknown name (with the nearest one), a fault in the file, and a name that stands
    both in the package and in the user's folder.
    """
    if str(id_or_path).endswith(SUFFIX):
        return _read(Path(id_or_path))
    name, shipped, own = str(id_or_path), _shipped(), _own()
    if name in shipped and name in own:
        raise EdgetuneError(
            f"device {name!r} is shipped with edgetune and also stands in {own[name]}",
            action="rename your file and its id",
        )
    if name in own:
        return _named(_read(own[name]), name, str(own[name]))
    if name in shipped:
        return _named(parse(read_yaml(shipped[name], name + SUFFIX), name + SUFFIX), name, name + SUFFIX)
    if name == HOST:
        raise EdgetuneError(
            "this host has no descriptor yet",
            action="run `edgetune devices calibrate` once; it takes a few minutes",
        )
    raise EdgetuneError(
        "unknown device", got=name, allowed=ids(), action="`edgetune devices list` prints all; a path ends in .yaml"
    )


def _read(path: Path) -> Device:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EdgetuneError(f"the descriptor could not be read ({error})", where=str(path)) from error
    return parse(read_yaml(text, str(path)), str(path))


def _named(device: Device, name: str, where: str) -> Device:
    if device.id != name:
        raise EdgetuneError(f"id: must be the file's name, {name!r}", where=where, got=device.id)
    return device
