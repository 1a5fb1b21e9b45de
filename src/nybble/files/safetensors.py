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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.errors import FileFormatError, InputError, OutputError

MAX_HEADER_BYTES = 100_000_000
ALIGNMENT = 8

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "uint16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "uint8",
    "F8_E5M2": "uint8",
    "F8_E8M0": "uint8",
    "C64": "complex64",
}
NAMES = {name: tag for tag, name in reversed(DTYPES.items()) if tag not in ("BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0")}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype tag (`F16`), shape, and bytes [start, end) of the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


class SafetensorsFile:
    """A safetensors file, open for reading. Entries and metadata are checked at once, data is mapped when first read.

    Raises InputError when the file cannot be opened and FileFormatError when it is not what the format promises.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                self.metadata, self.entries, self._data_start = self._read_header(file)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}") from error
        self._map: mmap.mmap | None = None

    def _broken(self, why: str) -> FileFormatError:
        return FileFormatError(f"{self.path} is not a valid safetensors file: {why}; copy or download it again")

    def _read_header(self, file: Any) -> tuple[dict[str, str], dict[str, Entry], int]:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise self._broken(f"it has {len(prefix)} bytes, a header length needs 8")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES or length > self._size - 8:
            raise self._broken(f"its header claims {length} bytes, {self._size - 8} follow (limit {MAX_HEADER_BYTES})")
        encoded = file.read(length)
        if encoded[:1] != b"{":
            raise self._broken("its header does not begin with {")
        try:
            header = json.loads(
                encoded.decode("utf-8"), object_pairs_hook=self._no_duplicates, parse_int=_whole, parse_constant=_no_constant
            )
            _check_unicode(header)
        except (ValueError, RecursionError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise self._broken(f"its header is not JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._broken("its header is not an object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._broken("its metadata is not a map of strings")
        entries = {name: self._entry(name, value) for name, value in header.items()}
        self._check_layout(entries, self._size - 8 - length)
        return metadata, entries, 8 + length

    def _no_duplicates(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise self._broken("a key stands twice in its header")
        return result

    def _entry(self, name: str, value: Any) -> Entry:
        try:
            dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise self._broken(f"tensor {name!r} lacks dtype, shape or data_offsets") from error
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._broken(f"tensor {name!r} has unknown dtype {dtype!r}")
        if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
            raise self._broken(f"tensor {name!r} has a shape or offset that is not a non-negative integer")
        if end - start != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
            raise self._broken(f"tensor {name!r} {dtype} {list(shape)} does not fill its {end - start} bytes")
        return Entry(dtype, shape, start, end)

    def _check_layout(self, entries: dict[str, Entry], data_bytes: int) -> None:
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != end:
                raise self._broken(f"tensor {name!r} begins at byte {entry.start}, expected {end} (hole or overlap)")
            end = entry.end
        if end != data_bytes:
            raise self._broken(f"its tensors take {end} bytes, the file holds {data_bytes} (truncated or padded)")

    def read(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view of the mapped file; copy it to keep it longer than this object.

        Raises InputError for a name that is not in the file.
        """
        if name not in self.entries:
            raise InputError(f"{self.path} has no tensor {name!r}; it has {len(self.entries)} others")
        entry = self.entries[name]
        dtype = np.dtype(DTYPES[entry.dtype]).newbyteorder("<")
        if entry.bytes == 0:
            return np.empty(entry.shape, dtype=dtype)
        if self._map is None:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size != self._size:
                    raise self._broken("it changed while it was being read")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = math.prod(entry.shape)
        return np.frombuffer(self._map, dtype, count, self._data_start + entry.start).reshape(entry.shape)

    def sha256(self) -> str:
        """SHA-256 of the whole file."""
        return file_sha256(self.path)


def _whole(digits: str) -> int:
    """An integer of the header. "-0" is no integer to other readers, so it is none here."""
    if digits == "-0":
        raise ValueError("-0 is not an integer")
    return int(digits)


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _check_unicode(value: Any) -> None:
    """Raise ValueError for a string, at any depth, with half a surrogate pair: Python lets it pass, UTF-8 has no such thing."""
    json.dumps(value, ensure_ascii=False).encode("utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
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
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, array in items:
        if name in header:
            raise ValueError(f"tensor {name!r} is given twice")
        tag = tags.get(name, NAMES[array.dtype.name])
        header[name] = {"dtype": tag, "shape": list(array.shape), "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for _, array in items:
                little = array.astype(array.dtype.newbyteorder("<"), copy=False)
                file.write(np.ascontiguousarray(little).data)
            file.flush()
            os.fsync(file.fileno())
        written = SafetensorsFile(temporary)
        if list(written.entries) != [name for name, _ in items]:
            raise OutputError(f"{path} could not be read back as written")
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({position + len(encoded) + 8} bytes): {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return 8 + len(encoded) + position


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
