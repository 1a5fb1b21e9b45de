"""Reading and writing GGUF files, strictly and without ggml.

    "GGUF"  version u32  tensors u64  keys u64
    of each key:    its name, its value (see gguf_values.py)
    of each tensor: its name, how many dimensions u32, each u64, the innermost first, type u32, offset u64 in the data
    data, from the next multiple of the alignment on; every tensor begins at one and is filled up to one

Format: ggml's docs/gguf.md, versions 2 and 3. The reader refuses what other readers let through: holes and overlaps, a name that
stands twice, sizes that wrap around, a row that is no whole number of blocks, anything that is longer than the file. Data is
memory-mapped and only touched when asked for. The writer streams to a temporary file in the same folder, flushes it to disk,
reads its head again, and renames it; the same input gives the same bytes.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nybble.errors import FileFormatError, InputError, OutputError, shown
from nybble.files.folder import file_mode
from nybble.files.gguf_values import MAX_KEY_BYTES, Head, Value, broken
from nybble.files.opening import open_file

MAGIC = b"GGUF"
VERSION = 3
READS = (2, 3)
MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_NAME_BYTES = 63
MAX_DIMENSIONS = 4
MAX_WEIGHTS = (1 << 63) - 1
ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
ALIGNMENT_KEY = "general.alignment"


@dataclass(frozen=True)
class GgmlType:
    """One of ggml's types of tensors."""

    number: int
    name: str
    weights: int
    """Of one block."""
    bytes: int
    """Of one block."""

    @property
    def dtype(self) -> str | None:
        """numpy's type of the elements; None for blocks. bfloat16, which numpy lacks, is uint16."""
        return ELEMENTS.get(self.name)


ELEMENTS = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F64": "<f8",
    "I8": "|i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
}
_TYPES = (
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
    (42, "Q2_0", 64, 18),
)
TYPES = {number: GgmlType(number, name, weights, size) for number, name, weights, size in _TYPES}
"""By number. Sizes of all that are in use, so that a file can be shown whose tensors are not decoded here."""
BY_NAME = {found.name: found for found in TYPES.values()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type, its shape (innermost last, as numpy has it), where it begins, and its bytes."""

    type: GgmlType
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class Tensor:
    """A tensor to write."""

    name: str
    type: str
    """Name of a ggml type: `Q4_K`."""
    shape: tuple[int, ...]
    """Innermost last."""
    data: Callable[[], NDArray[Any]]
    """Its bytes, called when they are written: an array of any type and shape, of just so many bytes."""


class GgufFile:
    """A GGUF file, open for reading. Its head is checked at once, data is mapped when first read.

    Raises InputError when the file cannot be opened and FileFormatError when it is not what the format promises.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open_file(self.path) as (file, status):
            self._identity = _identity(status)
            self._read_head(file, status.st_size)
        self._map: mmap.mmap | None = None

    def _read_head(self, file: BinaryIO, size: int) -> None:
        head = Head(self.path, file, size)
        magic = head.take(4, "the word GGUF that it begins with")
        if magic != MAGIC:
            raise head.broken(f"it begins with {shown(magic)}, not with GGUF")
        self.version = head.u32("its version")
        if self.version not in READS and self.version & 0xFFFF == 0 and self.version:
            raise head.broken("its numbers are big-endian; nybble reads little-endian files")
        if self.version not in READS:
            raise head.broken(f"its version is {self.version}; nybble reads {' and '.join(map(str, READS))}")
        tensors, keys = head.u64("the number of tensors"), head.u64("the number of keys")
        for count, most, what in ((tensors, MAX_TENSORS, "tensors"), (keys, MAX_KEYS, "keys")):
            if count > most:
                raise head.broken(f"it has {count} {what}, the limit is {most}")
        self.metadata: dict[str, Value] = {}
        """Key -> value, in the file's order."""
        for _ in range(keys):
            key = head.name("a key", MAX_KEY_BYTES)
            if key in self.metadata:
                raise head.broken(f"key {shown(key)} stands twice")
            self.metadata[key] = head.value(key)
        self.alignment = self._alignment()
        entries: dict[str, Entry] = {}
        for _ in range(tensors):
            name, entry = _read_entry(head)
            if name in entries:
                raise head.broken(f"tensor {shown(name)} stands twice")
            entries[name] = entry
        self.data_start = head.position + -head.position % self.alignment
        self.tensors = self._laid_out(entries, size)
        """Name -> where it is, in the file's order."""

    def _alignment(self) -> int:
        value = self.metadata.get(ALIGNMENT_KEY)
        if value is None:
            return ALIGNMENT
        found = value.data
        if value.kind != "uint32" or not isinstance(found, int) or found < 1 or found & (found - 1) or found > MAX_ALIGNMENT:
            raise broken(
                self.path, f"{ALIGNMENT_KEY} is {value} ({value.kind}), not a power of two up to {MAX_ALIGNMENT} (uint32)"
            )
        return found

    def _laid_out(self, entries: dict[str, Entry], size: int) -> dict[str, Entry]:
        """Entries with places in the file. Every tensor begins where the padding of the one before it ends."""
        expected = end = 0
        for name, entry in entries.items():
            if entry.start != expected:
                raise broken(
                    self.path,
                    f"tensor {shown(name)} begins at byte {entry.start} of the data, expected {expected} (hole or overlap)",
                )
            end = entry.start + entry.bytes
            expected = end + -end % self.alignment
        if entries and self.data_start + end > size:
            raise broken(self.path, f"its tensors end at byte {self.data_start + end}, the file has {size} (truncated)")
        most = max(self.data_start + expected, self.data_start)
        if size > most:
            raise broken(self.path, f"{size - most} bytes follow its last tensor")
        return {
            name: Entry(entry.type, entry.shape, self.data_start + entry.start, entry.bytes) for name, entry in entries.items()
        }

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor as a read-only view of the mapped file, [rows, bytes of a row].

        Raises InputError for a name that is not in the file, FileFormatError when the file changed since it was opened.
        """
        if name not in self.tensors:
            raise InputError(f"{self.path} has no tensor {shown(name)}; it has {len(self.tensors)} others")
        entry = self.tensors[name]
        if self._map is None:
            with open_file(self.path) as (file, status):
                if _identity(status) != self._identity:
                    raise broken(self.path, "it changed while it was being read")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        rows = math.prod(entry.shape[:-1])
        return np.frombuffer(self._map, np.uint8, entry.bytes, entry.start).reshape(rows, -1)

    def elements(self, name: str) -> NDArray[Any]:
        """A tensor of floats or whole numbers in its shape, a read-only view; bfloat16 as uint16. Raises as `raw`, and
        InputError for one made of blocks."""
        raw = self.raw(name)
        entry = self.tensors[name]
        if entry.type.dtype is None:
            raise InputError(f"{self.path}: tensor {shown(name)} is {entry.type.name}, which is made of blocks")
        return raw.reshape(-1).view(entry.type.dtype).reshape(entry.shape)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What tells that a path still leads to the same file, unchanged."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_entry(head: Head) -> tuple[str, Entry]:
    """A tensor's entry; its start is still counted from where the data begins."""
    name = head.name("the name of a tensor", MAX_NAME_BYTES)
    what = f"tensor {shown(name)}"
    dimensions = head.u32(f"the dimensions of {what}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise head.broken(f"{what} has {dimensions} dimensions, not 1 to {MAX_DIMENSIONS}")
    shape = struct.unpack(f"<{dimensions}Q", head.take(8 * dimensions, f"the shape of {what}"))[::-1]
    number, start = head.u32(f"the type of {what}"), head.u64(f"the offset of {what}")
    if 0 in shape:
        raise head.broken(f"{what} has shape {list(shape)}, with a dimension of 0")
    if math.prod(shape) > MAX_WEIGHTS:
        raise head.broken(f"{what} has shape {list(shape)}, over {MAX_WEIGHTS} elements")
    if number not in TYPES:
        raise head.broken(f"{what} has type {number}, which is none of ggml's that are in use")
    kind = TYPES[number]
    if shape[-1] % kind.weights:
        raise head.broken(f"{what} has rows of {shape[-1]} columns, no multiple of {kind.weights}, a block of {kind.name}")
    size = math.prod(shape) // kind.weights * kind.bytes
    if size > head.size:
        raise head.broken(f"{what} {kind.name} {list(shape)} takes {size} bytes, the file has {head.size}")
    return name, Entry(kind, shape, start, size)


def write_gguf(path: str | Path, metadata: Mapping[str, Value], tensors: Sequence[Tensor], alignment: int = ALIGNMENT) -> int:
    """Write keys and tensors in the order given and return the file's size in bytes.

    The file appears under its name only when it is complete, flushed and its head read again. Raises OutputError, with nothing
    left behind, when that fails; ValueError for a tensor whose bytes are not as many as its type and shape say.
    """
    path = Path(path)
    head, places, _ = layout(metadata, tensors, alignment)
    temporary, position = None, len(head)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False) as file:
            temporary = Path(file.name)
            file.write(head)
            for tensor in tensors:
                data = np.ascontiguousarray(tensor.data())
                if data.nbytes != places[tensor.name][1]:
                    raise ValueError(
                        f"tensor {tensor.name} has {data.nbytes} bytes, {tensor.type} {tensor.shape} takes {_bytes(tensor)}"
                    )
                file.write(data.reshape(-1).view(np.uint8).data)
                position += data.nbytes
                file.write(bytes(-position % alignment))
                position += -position % alignment
            file.flush()
            os.fsync(file.fileno())
        written = _read_again(temporary, path)
        if list(written.tensors) != [tensor.name for tensor in tensors]:
            raise OutputError(f"{path} could not be read back as written")
        os.chmod(temporary, file_mode())
        os.replace(temporary, path)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {path} ({position} bytes so far): {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return position


def _read_again(temporary: Path, path: Path) -> GgufFile:
    try:
        return GgufFile(temporary)
    except FileFormatError as error:  # what was asked for cannot stand in a GGUF file
        raise OutputError(f"cannot write {path}: {str(error).replace(str(temporary), 'the result')}") from error


def layout(
    metadata: Mapping[str, Value], tensors: Sequence[Tensor], alignment: int = ALIGNMENT
) -> tuple[bytes, dict[str, tuple[int, int]], int]:
    """What a file of these tensors begins with, where each lies (name -> byte, bytes), and the file's size."""
    keys = {key: value for key, value in metadata.items() if key != ALIGNMENT_KEY}
    if alignment != ALIGNMENT:
        keys[ALIGNMENT_KEY] = Value("uint32", alignment)
    head = _head(keys, tensors, alignment)
    position, places = len(head), {}
    for tensor in tensors:
        places[tensor.name] = position, _bytes(tensor)
        position += _bytes(tensor)
        position += -position % alignment
    return head, places, position


def _bytes(tensor: Tensor) -> int:
    kind = BY_NAME[tensor.type]
    return math.prod(tensor.shape) // kind.weights * kind.bytes


def _head(keys: Mapping[str, Value], tensors: Sequence[Tensor], alignment: int) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(keys))]
    for key, value in keys.items():
        parts += (struct.pack("<Q", len(key.encode())), key.encode(), value.encode())
    start = 0
    for tensor in tensors:
        name, dimensions = tensor.name.encode(), tensor.shape[::-1]
        parts += (struct.pack("<Q", len(name)), name)
        parts.append(struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, BY_NAME[tensor.type].number, start))
        start += _bytes(tensor)
        start += -start % alignment
    head = b"".join(parts)
    return head + bytes(-len(head) % alignment)
