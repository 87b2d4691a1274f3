"""Time programs on this host, each in a new process pinned to a number of cores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import THIS_HOST
from edgetune.runtime.clock.machine import usable_cores
from edgetune.runtime.clock.runs import versions
from edgetune.runtime.hosts.place import TimingRequest

if TYPE_CHECKING:
    from edgetune.runtime.run import Timing

_WARM_UP_SECONDS = 1.0  # at most; it ends when the runs are steady
_ENERGY_SECONDS = 1.0


class Host:
    """Times programs here. A context, like the runners of other machines, with nothing to close."""

    name = THIS_HOST
    records = True

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *problem: object) -> None:
        """Nothing to do."""

    @property
    def cores(self) -> int:
        """Cores that a program may use."""
        return usable_cores()

    @property
    def executorch(self) -> str:
        """Its version here."""
        return versions().get("executorch", "")

    def time(self, request: TimingRequest) -> tuple[Timing, ...]:
        """Each call of the program timed; see `Runner`."""
        from edgetune.runtime.run import time_calls

        settings = {
            "threads": request.threads,
            "seconds": request.seconds,
            "warm_up_seconds": min(request.seconds, _WARM_UP_SECONDS),
            "language": request.language,
            "record": request.record,
            "energy_seconds": _ENERGY_SECONDS if request.energy else 0.0,
        }
        timings = time_calls(request.path, settings, request.calls, data=request.data)
        if not all(timing.latencies_ms for timing in timings):
            raise EdgetuneError("the program was timed, but never ran", where=str(request.path))
        return timings

    def caveat(self, built_with: dict[str, str]) -> str:
        """None for this host."""
        return ""
