"""Arrays of a file that is still to be laid out, on disk and not in memory: what a container makes before it knows them all."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.errors import OutputError

Tagged = tuple[str, NDArray[Any]]
"""(safetensors dtype tag, array)."""
ALIGNMENT = 64


class Spilled(MutableMapping[str, Tagged]):
    """Name -> (tag, array), each written to a file without a name when it is put, and read from it as it is looked at."""

    def __init__(self, folder: Path) -> None:
        """The file lies in a folder. Raises OutputError where it cannot, there and when arrays are put."""
        self._folder, self._size = folder, 0
        self._places: dict[str, tuple[str, np.dtype[Any], tuple[int, ...], int]] = {}
        self._map: mmap.mmap | None = None
        try:
            self._file, name = tempfile.mkstemp(dir=folder)
            weakref.finalize(self, os.close, self._file)
            os.unlink(name)
        except OSError as error:
            raise self._failed(error) from error

    def __setitem__(self, name: str, tagged: Tagged) -> None:
        tag, array = tagged
        whole = np.ascontiguousarray(array)
        data = whole.reshape(-1).view(np.uint8).data if whole.size else memoryview(b"")
        start, done = -(-self._size // ALIGNMENT) * ALIGNMENT, 0
        try:
            while done < data.nbytes:
                done += os.pwrite(self._file, data[done:], start + done)
        except OSError as error:
            raise self._failed(error) from error
        self._places[name], self._size, self._map = (tag, whole.dtype, array.shape, start), start + data.nbytes, None

    def __getitem__(self, name: str) -> Tagged:
        tag, dtype, shape, start = self._places[name]
        count = int(np.prod(shape, dtype=np.int64))
        if not count:
            return tag, np.empty(shape, dtype)
        if self._map is None:
            self._map = mmap.mmap(self._file, self._size, access=mmap.ACCESS_READ)
        return tag, np.frombuffer(self._map, dtype, count, start).reshape(shape)

    def __delitem__(self, name: str) -> None:
        del self._places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def itemsize(self, name: str) -> int:
        """Bytes of one value."""
        return self._places[name][1].itemsize

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write in {self._folder} ({self._size:,} bytes so far): {error.strerror or error}")
