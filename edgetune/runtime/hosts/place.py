"""Where to time a program: `host`, `ssh://user@host:port` or `adb:serial`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from edgetune.core.errors import EdgetuneError

if TYPE_CHECKING:
    from edgetune.runtime.run import Timing

FORMS = ("host", "ssh://user@host", "ssh://user@host:port", "adb", "adb:serial")

# Neither a user nor a host begins with "-" (it would be an option) or contains characters special to a shell.
_SSH = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9._-]*)@)?"
    r"(?P<host>[A-Za-z0-9_][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\])(?::(?P<port>[0-9]{1,5}))?/?"
)
_SERIAL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]*")


@dataclass(frozen=True)
class TimingRequest:
    """A program to time, and the inputs of each call, which runs for about `seconds`."""

    path: Path
    calls: Sequence[tuple[Tensor, ...]]
    threads: int
    seconds: float
    data: Path | None = None  # the `.ptd` with its weights, if there is one
    language: bool = False  # it needs the kernels of language models
    energy: bool = True  # also look for a meter
    record: bool = False  # also record the time of each operator, in runs of its own

    def check_threads(self, cores: int, where: str) -> None:
        """Raise for more threads than the machine has cores."""
        if not 1 <= self.threads <= cores:
            raise EdgetuneError(
                f"threads must be from 1 to the {cores} cores there",
                where=where,
                got=self.threads,
                action=f"pass --threads {cores}",
            )


class Runner(Protocol):
    """A machine on which programs can be timed, as a context."""

    records: bool  # whether it can record the time of each operator

    @property
    def name(self) -> str:
        """The label of its measurements."""

    @property
    def cores(self) -> int:
        """Cores that a program may use there."""

    @property
    def executorch(self) -> str:
        """Its version there; empty: unknown."""

    def time(self, request: TimingRequest) -> tuple[Timing, ...]:
        """Time each call of the program in one new process. Raises `EdgetuneError` (exit code 5) if it fails."""

    def caveat(self, built_with: dict[str, str]) -> str:
        """A note to print next to measurements of a program made with these versions; may be empty."""

    def __enter__(self) -> Runner: ...

    def __exit__(self, *problem: object) -> None: ...


@dataclass(frozen=True)
class Place:
    """A machine, and how to reach it."""

    kind: Literal["host", "ssh", "adb"]
    user: str = ""
    host: str = ""
    port: int | None = None
    serial: str = ""

    def __str__(self) -> str:
        if self.kind == "ssh":
            return (f"{self.user}@" if self.user else "") + self.host + (f":{self.port}" if self.port else "")
        return f"{self.kind}:{self.serial}" if self.serial else self.kind


def parse_place(on: str) -> Place:
    """Parse `--on`. Raises `EdgetuneError` for anything but `FORMS`.

    >>> parse_place("ssh://pi@raspberrypi.local:2222")
    Place(kind='ssh', user='pi', host='raspberrypi.local', port=2222, serial='')
    >>> parse_place("adb:192.168.0.7:5555").serial
    '192.168.0.7:5555'
    """
    if on == "host":
        return Place("host")
    kind, _, serial = on.partition(":")
    if kind == "adb" and (on == "adb" or _SERIAL.fullmatch(serial)):
        return Place("adb", serial=serial)
    match = _SSH.fullmatch(on)
    port = int(match["port"]) if match is not None and match["port"] else None
    if match is None or (port is not None and not 1 <= port <= 65535):
        raise EdgetuneError(
            "not a valid place to time a program",
            got=on,
            allowed=FORMS,
            action="a user and a host are letters, digits, dots, dashes and underscores, and begin with no dash; "
            "give anything else a name in ~/.ssh/config",
        )
    return Place("ssh", match["user"] or "", match["host"].strip("[]"), port)
