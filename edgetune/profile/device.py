"""Device descriptors: facts of a device, each with its source and how far to trust it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from edgetune.core.errors import EdgetuneError
from edgetune.core.validated import list_faults
from edgetune.profile import facts as fact_types
from edgetune.profile.calibration import Calibration, calibration_path
from edgetune.profile.calibration import read as read_calibration
from edgetune.profile.facts import Fact, Flags, StorageKind, StrictRecord
from edgetune.profile.sources import resolve_sources
from edgetune.recipe.document import read as read_yaml
from edgetune.recipe.document import read_yaml_text
from edgetune.recipe.names import HOST, SUFFIX, device_ids, packaged_ids, user_descriptors, user_folder

Family = Literal["phone", "board", "jetson", "computer", "microcontroller"]
TargetName = Literal["xnnpack", "vulkan", "coreml", "qnn", "cuda", "openvino", "ethos-u", "tosa"]

ID = r"^[a-z0-9]+(-[a-z0-9]+)*$"

_LEAST_RAM_GIB, _LEAST_GHZ = 0.125, 0.3  # the least of devices with an operating system


class Cluster(StrictRecord):
    """Cores of one kind."""

    core: str = Field(min_length=1)
    count: fact_types.Count
    ghz: fact_types.Gigahertz
    fp32_macs_per_cycle: fact_types.PerCycle  # of one core: FMA pipes x 32-bit lanes


class Memory(StrictRecord):
    """Main memory. `ram_gib`: installed; `usable_app_memory_mib`: the most that one process can use."""

    bus_bits: fact_types.Bits
    mega_transfers_per_s: fact_types.Transfers
    bandwidth_gb_s: fact_types.Bandwidth  # theoretical peak, unless the source says measured
    ram_gib: fact_types.Gibibytes
    usable_app_memory_mib: fact_types.Mebibytes

    @model_validator(mode="after")
    def _agree(self) -> Memory:
        bits, rate, given = self.bus_bits.value, self.mega_transfers_per_s.value, self.bandwidth_gb_s.value
        if bits is not None and rate is not None and given is not None:
            computed = bits / 8 * rate / 1000
            if abs(computed - given) > 0.01 * computed:
                raise ValueError(
                    f"bandwidth_gb_s: {given:g}, but {bits:g} bit / 8 x {rate:g} MT/s / 1000 is {computed:g} GB/s"
                )
        usable, ram = self.usable_app_memory_mib.value, self.ram_gib.value
        if usable is not None and ram is not None and usable > ram * 1024:
            raise ValueError(f"usable_app_memory_mib: {usable:g} MiB, more than the {ram:g} GiB fitted")
        return self


class DeviceCaches(StrictRecord):
    """Of the fastest cores: L2 of one core, last level shared by all."""

    l2_kib: fact_types.Kibibytes
    last_level_kib: fact_types.Kibibytes

    @model_validator(mode="after")
    def _agree(self) -> DeviceCaches:
        l2, last = self.l2_kib.value, self.last_level_kib.value
        if l2 is not None and last is not None and last < l2:
            raise ValueError(f"last_level_kib: {last:g}, less than the {l2:g} of one core's L2")
        return self


class Accelerator(StrictRecord):
    """A processor other than the CPU. Predictions do not use it yet.

    `target`: the ExecuTorch backend for it, one of the device's `targets`, or null with the reason.
    """

    name: str = Field(min_length=1)
    kind: Literal["gpu", "npu", "dla"]
    clock_mhz: fact_types.Megahertz
    fp16_gflops: fact_types.Gigaflops
    dense_int8_tops: fact_types.Teraops  # dense: half of a figure printed for sparse weights
    target: TargetName | None
    unreached: str = ""

    @model_validator(mode="after")
    def _agree(self) -> Accelerator:
        if (self.target is None) != bool(self.unreached):
            raise ValueError("target: either a target reaches it, or it is null with the reason in `unreached`")
        return self


class Power(StrictRecord):
    """Power of the whole device."""

    low_w: fact_types.Watts
    high_w: fact_types.Watts

    @model_validator(mode="after")
    def _agree(self) -> Power:
        low, high = self.low_w.value, self.high_w.value
        if low is not None and high is not None and low > high:
            raise ValueError(f"low_w: {low:g}, above high_w {high:g}")
        return self


class Storage(StrictRecord):
    """The storage that a program is loaded from."""

    kind: StorageKind
    read_mb_s: fact_types.MegabytesPerSecond  # sequential
    capacity_gib: fact_types.StorageGibibytes  # as sold, the smallest


class Device(StrictRecord):
    """A descriptor. `clusters` and `targets` are in order: fastest cores first, preferred backend first."""

    format: int = Field(ge=1, le=1)  # strict: a `Literal` of 1 takes `true`
    id: str = Field(pattern=ID)
    name: str = Field(min_length=1)
    soc: str = Field(min_length=1)
    family: Family
    clusters: tuple[Cluster, ...] = Field(min_length=1)
    threads: fact_types.Count  # that a program runs with
    isa: Flags
    memory: Memory
    caches: DeviceCaches
    accelerators: tuple[Accelerator, ...]
    power: Power
    storage: Storage
    targets: tuple[TargetName, ...] = Field(min_length=1)
    notes: tuple[str, ...] = ()
    no_runtime: str = ""  # why no published ExecuTorch runs on it, if so
    calibration: Calibration | None = Field(default=None, exclude=True)  # stored in another file; see `load`

    @model_validator(mode="after")
    def _agree(self) -> Device:
        for number, cluster in enumerate(self.clusters):
            if cluster.count.value is None:
                raise ValueError(f"clusters.{number}.count: the number of cores must be known")
            if self.family != "microcontroller" and (cluster.ghz.value or _LEAST_GHZ) < _LEAST_GHZ:
                raise ValueError(f"clusters.{number}.ghz: {cluster.ghz.value:g} GHz is a microcontroller's")
        if self.threads.value is None:
            raise ValueError("threads: the number of threads must be given")
        if self.threads.value > self.cores:
            raise ValueError(f"threads: {self.threads.value:g}, but there are {self.cores} cores")
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("targets: a backend is named twice")
        for number, accelerator in enumerate(self.accelerators):
            if accelerator.target is not None and accelerator.target not in self.targets:
                raise ValueError(f"accelerators.{number}.target: {accelerator.target} is not among the targets")
        ram = self.memory.ram_gib.value
        if ram is not None and (self.family == "microcontroller") != (ram < _LEAST_RAM_GIB):
            raise ValueError(f"memory.ram_gib: {ram:g} GiB is not a {self.family}'s")
        return self

    @property
    def cores(self) -> int:
        """Cores of all clusters."""
        return sum(int(cluster.count.value or 0) for cluster in self.clusters)

    @property
    def thread_count(self) -> int:
        """Threads to run a program with."""
        return int(self.threads.value or 1)

    def facts(self) -> Iterator[tuple[str, Fact | Flags | StorageKind]]:
        """Every sourced value with its dotted path, in the order of the file."""
        yield from _facts(self, "")


def _facts(value: object, path: str) -> Iterator[tuple[str, Fact | Flags | StorageKind]]:
    if isinstance(value, (Fact, Flags, StorageKind)):
        yield path, value
    elif isinstance(value, StrictRecord):
        for name in type(value).model_fields:
            yield from _facts(getattr(value, name), f"{path}.{name}" if path else name)
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _facts(item, f"{path}.{number}")


def parse(content: object, where: str) -> Device:
    """A descriptor from the content of a YAML file; one error for all its faults."""
    if not isinstance(content, dict):
        raise EdgetuneError("a descriptor is a mapping", where=where, got=type(content).__name__)
    plain, lines = resolve_sources(content)
    if "calibration" in content:
        lines.append("calibration: it belongs in a separate file; run `edgetune devices calibrate` again")
    try:
        device = Device.model_validate_json(json.dumps(plain))  # strict, but takes a list for a tuple
    except ValidationError as error:
        lines += list_faults(Device, error)
    if lines:
        raise EdgetuneError(
            "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else ""),
            where=where,
            action="correct the file; `edgetune devices add --like pixel-8 NAME` writes a whole one",
        )
    return device


def load(id_or_path: str | Path) -> Device:
    """The descriptor of that name, or in that file if it ends in `.yaml`, with its calibration, if any.

    Calibrations of shipped devices are in the user's folder. Raises `EdgetuneError` for an unknown name (with the
    nearest one), a fault in a file, and a name that is both in the package and in the user's folder.
    """
    content, where = read(id_or_path)
    device = parse(content, where)
    if str(id_or_path).endswith(SUFFIX):
        calibration_file = calibration_path(Path(id_or_path))
    else:
        if device.id != str(id_or_path):
            raise EdgetuneError(f"id: must equal the file name, {str(id_or_path)!r}", where=where, got=device.id)
        calibration_file = calibration_path(user_folder() / (device.id + SUFFIX))
    calibration = read_calibration(calibration_file)
    if calibration is not None and calibration.device != device.id:
        raise EdgetuneError(
            "device: the calibration is another device's",
            where=str(calibration_file),
            got=calibration.device,
            allowed=[device.id],
            action="move it, or run `edgetune devices calibrate` again",
        )
    return device if calibration is None else device.model_copy(update={"calibration": calibration})


def read(id_or_path: str | Path) -> tuple[object, str]:
    """The unchecked content of that descriptor's file, and its name for errors."""
    if str(id_or_path).endswith(SUFFIX):
        return _read(Path(id_or_path)), str(id_or_path)
    name, mine = str(id_or_path), user_descriptors()
    if name in packaged_ids():
        if name in mine:
            raise EdgetuneError(
                f"device {name!r} is part of edgetune and is also defined in {mine[name]}",
                action="rename your file and its id",
            )
        text = (resources.files("edgetune.devices") / (name + SUFFIX)).read_text(encoding="utf-8")
        return read_yaml(text, name + SUFFIX).value, name + SUFFIX
    if name in mine:
        return _read(mine[name]), str(mine[name])
    if name == HOST:
        raise EdgetuneError(
            "this host has no descriptor yet",
            action="run `edgetune devices calibrate` once; it takes a few minutes",
        )
    raise EdgetuneError(
        "unknown device",
        got=name,
        allowed=device_ids(),
        action="`edgetune devices list` prints all; a path ends in .yaml",
    )


def _read(path: Path) -> object:
    return read_yaml(read_yaml_text(path, "`edgetune devices list` prints those that are known"), str(path)).value
