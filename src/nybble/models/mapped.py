"""Giving back the memory of mapped files whose contents have been copied.

transformers leaves the weights it loads in one private mapping of the file, which lives as long as any tensor of it does
(a bias is enough). Pages that were read stay resident until someone says that they need not.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

MADV_DONTNEED = 4
ENTRY = np.dtype("<u8")
"""Of /proc/self/pagemap, one a page."""
PRESENT, SWAPPED, OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def give_back(array: NDArray[Any]) -> int:
    """Give the whole pages of a C-contiguous array back to the system, where nothing can be lost by it: all of them are
    unchanged pages of a file, which come back by themselves when they are read again.

    Returns the bytes given back: 0 for other memory, for changed pages, and on systems other than Linux.
    """
    page = mmap.PAGESIZE
    first = -(-array.ctypes.data // page) * page
    size = (array.ctypes.data + array.nbytes) // page * page - first
    if size <= 0 or not sys.platform.startswith("linux") or not _only_of_file(first // page, size // page):
        return 0
    return size if _madvise()(first, size, MADV_DONTNEED) == 0 else 0


def trim() -> None:
    """Give back what the allocator keeps of freed memory, where it can be asked to (glibc): freed arrays of a few megabytes stay
    in its pools, one for each thread, and add up to gigabytes."""
    function = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if function is not None:
        function(0)


def _only_of_file(first: int, count: int) -> bool:
    """Whether every page is one of a file (a page that was written to is no longer) or was never touched."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(first * ENTRY.itemsize)
            entries = np.frombuffer(file.read(count * ENTRY.itemsize), dtype=ENTRY)
    except OSError:
        return False
    in_memory = (entries & PRESENT) != 0
    return len(entries) == count and not (entries & SWAPPED).any() and bool((entries[in_memory] & OF_FILE).all())


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
