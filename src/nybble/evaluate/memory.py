"""How much memory this process holds, and the machine that it runs on. No torch, no psutil.

    Linux     resident set and its peak from /proc/self/status (VmRSS, VmHWM); the peak can be reset
    macOS     resident set from `ps`, peak from getrusage; the peak is of the whole life of the process
    others    None: not measured rather than guessed

All sizes are bytes. The resident set is what the process really occupies: pages of a mapped file count once they are
touched, memory that was asked for but never written does not. Left out: swap, and memory of a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def resident_bytes() -> int | None:
    """Bytes of memory that the process occupies now; None where the system does not tell."""
    system: str = sys.platform  # as a plain string, so that a type checker reads every branch
    if system.startswith("linux"):
        return _status("VmRSS")
    if system == "darwin":
        return _ps_resident()
    return None


def peak_bytes() -> int | None:
    """The most bytes that the process has occupied since its start or `reset_peak()`; None where not known."""
    system: str = sys.platform
    if system.startswith("linux"):
        return _status("VmHWM")
    if system == "darwin":
        import resource  # does not exist on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, kilobytes elsewhere
    return None


def reset_peak() -> bool:
    """Let `peak_bytes()` start again from the present size. False where the system cannot.

    The peak is then that of the whole life of the process.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def release() -> None:
    """Collect garbage and give freed memory back to the system (with glibc; another C library decides itself)."""
    gc.collect()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def machine() -> dict[str, Any]:
    """`cpu` (name), `cores` (that this process may use), `memory_bytes` (or None), `system`."""
    return {
        "cpu": _cpu_name(),
        "cores": _cores(),
        "memory_bytes": _memory_bytes(),
        "system": platform.platform(terse=True),
    }


def _status(field: str) -> int | None:
    """A field of /proc/self/status, e.g. "VmRSS:    12345 kB", in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _ps_resident() -> int | None:
    try:
        shown = subprocess.run(
            ["/bin/ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True, timeout=10
        ).stdout
        return int(shown) * 1024
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    """Physical memory, or the limit set for this process's control group where that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
