"""Why a child process that ran a program gave no answer: the runtime's messages, and one next action."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path
from typing import Any

from edgetune.core.errors import EdgetuneError, Exit, truncate_list
from edgetune.runtime import remedies

# A line of the runtime's log, and the lines that explain nothing.
_LINE = re.compile(r"^(?:\[E [^\]]*\] |E \S+ )?\[[\w.]+:\d+\] (.+)$")
_UNINFORMATIVE = re.compile(
    r"midr|^kernel '|Reading file|CPU info|^arg \d+|^dtype: |^\d+,$|^\]$|instructions don't have|^Error resizing"
)

_ACTIONS: tuple[tuple[str, str], ...] = (
    (r"Backend \w+ is not registered", "run it where that backend is, or export with target='xnnpack' to run it here"),
    (r"No method named", "ask for a method that the program has; `edgetune inspect MODEL.pte` lists them"),
    (
        r"unexpected scalar type",
        "give the inputs in the types that the program was exported with: convert with .to(dtype) or export again",
    ),
    (
        r"Attempted to (resize|change the tensor rank)|upper bound|\b0x10\b.*Input",
        "give inputs of the shapes that the program was exported for, or export it with dynamic= for other sizes",
    ),
    (
        r"Input index \(\d+\) must be less|Input \d+ has not been set|number of inputs",
        "give as many inputs as the program takes; `edgetune inspect MODEL.pte` lists them",
    ),
    (
        r"Program identifier|File size is too small|Magic|\b0x23\b|\b0x30\b|erification failed",
        "the file is damaged or of another executorch version: export it again with the installed one",
    ),
    (
        r"FlatTensor|\b0x24\b|named_data|data map",
        "give the data file (.ptd) that was written with the program: it contains the weights",
    ),
    (
        r"MmapDataLoader|\b0x22\b|No such file",
        "look at the path: the file is not there, or may not be read",
    ),
    (
        r"MemoryAllocation|MemoryError|bad_alloc|out of memory|\b0x21\b|\b0x31\b",
        "it needs more memory than there is: export a smaller batch or size, or quantize the model (et.Int4, et.Int8)",
    ),
    (
        r"XNN|xnn_|\b0x1\b|[Dd]elegate",
        "the backend fails on this program: export it with target='portable', and compare module by module",
    ),
)  # fmt: skip


def child_error(path: Path, done: subprocess.CompletedProcess[str], result: dict[str, Any] | None) -> EdgetuneError:
    """The error for a child without an answer, or with an error as its answer."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if result is not None and "error" in result:
        reasons = list(dict.fromkeys(_reasons(lines)))
        message = "; ".join([_plain(str(result["error"])), *reasons[:6]])
        action = _action(message, result)
    elif done.returncode < 0:
        message = f"the process that ran it was ended by {_signal(-done.returncode)}"
        reasons = list(dict.fromkeys(_reasons(lines[-20:])))
        message += f": {'; '.join(reasons[-2:])}" if reasons else ""
        action = _after_signal(-done.returncode)
    else:
        message = f"the process that ran it ended with code {done.returncode}: {' '.join(lines[-3:])[:500]}"
        action = _action(message, {}) if lines else "run it again, and look at the machine's own log for what ended it"
    return EdgetuneError(f"the program does not run: {message}", where=str(path), action=action, exit_code=Exit.EXPORT)


def _reasons(lines: list[str]) -> list[str]:
    """The runtime's messages about the failure, without their source locations."""
    messages = [line.group(1).strip() for line in map(_LINE.match, lines) if line is not None]
    return [reason for reason in messages if not _UNINFORMATIVE.search(reason)]


def _plain(error: str) -> str:
    return error.removeprefix("RuntimeError: ").replace("0x:", "0x")


def _action(message: str, result: dict[str, Any]) -> str:
    if result.get("kind") == "missing":
        return 'install what is missing: pip install "edgetune[export]"'
    missing = sorted(set(re.findall(r"(?:Missing operator: \[\d+\] |kernel ')([\w:.]+)", message)))
    if missing:
        hints = dict.fromkeys(filter(None, map(remedies.remedy, missing)))
        other = f"write {truncate_list(missing, 4)} with other operators: this runtime has no such kernel"
        return "; ".join(hints) or other
    kernel = re.search(r"KernelCall failed at instruction \S+ in operator ([\w:.]+)", message)
    if kernel is not None:
        kernel_remedy = remedies.remedy(kernel.group(1))
        return kernel_remedy or f"write {kernel.group(1)} otherwise: the portable kernel does not take these operands"
    for pattern, action in _ACTIONS:
        if re.search(pattern, message):
            return action
    return "run its model in eager mode on the same inputs; where that works, report this with the lines above"


def _after_signal(number: int) -> str:
    if number == signal.SIGKILL:
        return "the system most likely ran out of memory: free some, or export a smaller batch or size"
    if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        return "it was stopped from outside: run it again"
    return (
        "a kernel or a backend crashed on this program: give its data file (.ptd) if it has one; else export it with "
        "target='portable', and where that runs leave the module out of the backend"
    )


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
