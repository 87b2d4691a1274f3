"""`import edgetune` against `import torch`, in fresh processes taken in turn: the median of each, and their ratio."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

PAIRS = 15


def seconds(module: str) -> float:
    """Wall time of a fresh interpreter that imports the module."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    times: dict[str, list[float]] = {"torch": [], "edgetune": []}
    for turn in range(PAIRS + 1):
        for module, found in times.items():
            taken = seconds(module)
            if turn:  # the first of each warms the disk cache
                found.append(taken)
    torch, edgetune = (statistics.median(found) for found in times.values())
    print(f"import torch {torch:.2f} s, import edgetune {edgetune:.2f} s: {edgetune / torch:.2f} times (held to 1.30)")


if __name__ == "__main__":
    main()
