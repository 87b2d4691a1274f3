"""Memory that was freed, and that the process still holds."""

from __future__ import annotations

import ctypes
import sys


def release_freed_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc): it keeps gigabytes of freed small blocks."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))
