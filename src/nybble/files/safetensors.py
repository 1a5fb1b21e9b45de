"""Reading and writing safetensors files, strictly and without torch.

Format: https://github.com/huggingface/safetensors (README, "Format"): 8 bytes header length, a JSON header, then the data.
The reader refuses what the format forbids but readers let through: duplicate keys, holes, overlaps, a byte count that is
not the product of shape and dtype, anything longer than the file. Data is memory-mapped and only touched when asked for.
The writer streams to a temporary file in the same folder, flushes it to disk, reads it back, and renames it.

bfloat16 and the 8-bit floats, which numpy lacks, are given as unsigned integers of the same width.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from nybble.errors import FileFormatError, InputError, OutputError, shown
from nybble.files.folder import file_mode
from nybble.files.opening import open_file
from nybble.files.safetensors_header import ALIGNMENT, DTYPES, MAX_HEADER_BYTES, Entry, broken, read_header

__all__ = [
    "DTYPES",
    "FLOAT_TAGS",
    "MAX_HEADER_BYTES",
    "NAMES",
    "Entry",
    "SafetensorsFile",
    "file_sha256",
    "forget_pages",
    "layout",
    "widen",
    "write",
]

FLOAT_TAGS = ("F32", "F16", "BF16")
NAMES = {name: tag for tag, name in reversed(DTYPES.items()) if tag not in ("BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0")}


_open: WeakSet[SafetensorsFile] = WeakSet()


class SafetensorsFile:
    """A safetensors file, open for reading. Entries and metadata are checked at once, data is mapped when first read.

    Raises InputError when the file cannot be opened (or is a link that leaves its folder, see opening.py) and
    FileFormatError when it is not what the format promises.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open_file(self.path) as (file, status):
            self._identity = _identity(status)
            self.metadata, self.entries, self._data_start = _read_header(self.path, file, status.st_size)
        self._map: mmap.mmap | None = None
        _open.add(self)

    def read(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view of the mapped file; copy it to keep it longer than this object.

        Raises InputError for a name that is not in the file, FileFormatError when the file changed since it was opened.
        """
        if name not in self.entries:
            raise InputError(f"{self.path} has no tensor {shown(name)}; it has {len(self.entries)} others")
        entry = self.entries[name]
        dtype = np.dtype(DTYPES[entry.dtype]).newbyteorder("<")
        if entry.bytes == 0:
            return np.empty(entry.shape, dtype=dtype)
        if self._map is None:
            with open_file(self.path) as (file, status):
                if _identity(status) != self._identity:
                    raise broken(self.path, "it changed while it was being read")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = math.prod(entry.shape)
        array = np.frombuffer(self._map, dtype, count, self._data_start + entry.start).reshape(entry.shape)
        if entry.dtype == "BOOL" and (array.view(np.uint8) > 1).any():
            raise broken(self.path, f"tensor {shown(name)} BOOL has bytes other than 0 and 1")
        return array

    def sha256(self) -> str:
        """SHA-256 of the whole file."""
        return file_sha256(self.path)


def forget_pages() -> None:
    """Let go of the pages of all files that are open: they count as this process's memory once they were read, and come back by
    themselves when they are read again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for file in list(_open):
            if file._map is not None:
                file._map.madvise(mmap.MADV_DONTNEED)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What tells that a path still leads to the same file, unchanged."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_header(path: Path, file: Any, size: int) -> tuple[dict[str, str], dict[str, Entry], int]:
    """Metadata, entries, and where the data begins. Raises FileFormatError for anything that the format does not promise."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise broken(path, f"it has {len(prefix)} bytes, a header length needs 8")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or length > size - 8:
        raise broken(path, f"its header claims {length} bytes, {size - 8} follow (limit {MAX_HEADER_BYTES})")
    encoded = file.read(length)
    if len(encoded) != length:
        raise broken(path, f"its header ends after {len(encoded)} of {length} bytes")
    metadata, entries = read_header(encoded, path)
    _check_layout(path, entries, size - 8 - length)
    return metadata, entries, 8 + length


def _check_layout(path: Path, entries: dict[str, Entry], data_bytes: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise broken(path, f"tensor {shown(name)} begins at byte {entry.start}, expected {end} (hole or overlap)")
        end = entry.end
    if end != data_bytes:
        raise broken(path, f"its tensors take {end} bytes, the file holds {data_bytes} (truncated or padded)")


def widen(tag: str, values: NDArray[Any], name: str) -> NDArray[np.float32]:
    """float32 of an array with a safetensors tag. Raises FileFormatError, naming the tensor, for a tag that is no float."""
    if tag == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if tag not in (*FLOAT_TAGS, "F64"):
        raise FileFormatError(f"tensor {name!r} is {tag}, where floats (F32, F16, BF16) belong")
    return values.astype(np.float32, copy=False)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces. Raises InputError when it cannot be read."""
    digest = hashlib.sha256()
    with open_file(path) as (file, _):
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write(
    path: str | Path,
    tensors: Mapping[str, NDArray[Any]] | Iterable[tuple[str, NDArray[Any]]],
    metadata: Mapping[str, str],
    tags: Mapping[str, str] | None = None,
) -> int:
    """Write tensors in the order given and return the file's size in bytes.

    `tags` overrides the dtype tag of a tensor (`BF16` for bit patterns in uint16). The file appears under its name only
    when it is complete, flushed and read back. Raises OutputError, with nothing left behind, when that fails.
    """
    path, tags = Path(path), tags or {}
    items = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    names = ["__metadata__", *(name for name, _ in items)]
    if len(set(names)) < len(names):
        raise ValueError(f"tensor {next(name for name in names if names.count(name) > 1)!r} is given twice")
    head, places = layout({name: (tags.get(name, NAMES[array.dtype.name]), array.shape) for name, array in items}, metadata)
    size = len(head) + sum(length for _, length in places.values())
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            file.write(head)
            for _, array in items:
                little = array.astype(array.dtype.newbyteorder("<"), copy=False)
                file.write(np.ascontiguousarray(little).data)
            file.flush()
            os.fsync(file.fileno())
        written = SafetensorsFile(temporary)
        if list(written.entries) != [name for name, _ in items]:
            raise OutputError(f"{path} could not be read back as written")
        os.chmod(temporary, file_mode())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({size} bytes): {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return size


def layout(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """What a file of these tensors (name -> dtype tag, shape) begins with, and where each lies: name -> (byte, bytes)."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position, places = 0, {}
    for name, (tag, shape) in tensors.items():
        length = math.prod(shape) * np.dtype(DTYPES[tag]).itemsize
        header[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [position, position + length]}
        places[name] = position, length
        position += length
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    head = len(encoded).to_bytes(8, "little") + encoded
    return head, {name: (len(head) + start, length) for name, (start, length) in places.items()}
