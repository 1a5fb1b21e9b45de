"""Arrays of a file that is still to be laid out, on disk and not in memory: what a container makes before it knows them all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.errors import OutputError
from nybble.files.safetensors import layout
from nybble.files.unnamed import UnnamedFile

Tagged = tuple[str, NDArray[Any]]
"""(safetensors dtype tag, array)."""
ALIGNMENT = 64


class Spilled(MutableMapping[str, Tagged]):
    """Name -> (tag, array), each written to a file without a name when it is put, and read from it as it is looked at."""

    def __init__(self, folder: Path) -> None:
        """The file lies in a folder. Raises OutputError where it cannot, there and when arrays are put."""
        self._file, self._size = UnnamedFile(folder, "arrays"), 0
        self._places: dict[str, tuple[str, np.dtype[Any], tuple[int, ...], int]] = {}

    def __setitem__(self, name: str, tagged: Tagged) -> None:
        tag, array = tagged
        data, start = _bytes(np.ascontiguousarray(array)), -(-self._size // ALIGNMENT) * ALIGNMENT
        self._file.write(data, start)
        self._places[name], self._size = (tag, array.dtype, array.shape, start), start + data.nbytes

    def __getitem__(self, name: str) -> Tagged:
        tag, dtype, shape, start = self._places[name]
        array = np.empty(shape, dtype)
        self._file.read(_bytes(array), start)
        return tag, array

    def __delitem__(self, name: str) -> None:
        del self._places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def described(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (tag, shape), those of wide values first, so that every tensor of a file is aligned to its type."""
        order = sorted(self._places, key=lambda name: (-self._places[name][1].itemsize, name))
        return {name: (self._places[name][0], self._places[name][2]) for name in order}

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """All arrays as a safetensors file, one in memory at a time. Raises OutputError."""
        entries = self.described()
        head, places = layout(entries, metadata)
        try:
            with open(path, "wb") as out:
                out.write(head)
                for name in entries:
                    array = self[name][1]
                    out.write(_bytes(array.astype(array.dtype.newbyteorder("<"), copy=False)))
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            size = len(head) + sum(length for _, length in places.values())
            raise OutputError(f"cannot write {path} ({size:,} bytes): {error.strerror or error}") from error


def _bytes(array: NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
