"""How long ago this process was started: what a person waits for counts from there."""

from __future__ import annotations

import os
import time
from pathlib import Path


def seconds_since_start(spawned: float) -> float:
    """Seconds since this process was started, which Linux keeps to 10 ms; elsewhere since `spawned` (seconds since 1970)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time() - spawned
