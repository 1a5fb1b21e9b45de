"""What stands in the head of a GGUF file: numbers, texts and arrays of them, read within limits and written back to the byte.

    scalar      type u32, then the value; a text is its length u64 and UTF-8 bytes, a bool one byte 0 or 1
    array       9 u32, type of its elements u32, how many u64, then the elements; arrays of arrays are refused

Every length is compared with what is left of the file before anything is allocated for it. Texts are kept as bytes, since one
character beyond the 16-bit plane makes a Python text four times its bytes; arrays of numbers become numpy arrays at once.
Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nybble.errors import FileFormatError, shown

SCALARS = {
    0: ("uint8", "<B"),
    1: ("int8", "<b"),
    2: ("uint16", "<H"),
    3: ("int16", "<h"),
    4: ("uint32", "<I"),
    5: ("int32", "<i"),
    6: ("float32", "<f"),
    7: ("bool", "<B"),
    10: ("uint64", "<Q"),
    11: ("int64", "<q"),
    12: ("float64", "<d"),
}
"""Number of a type -> (its name, how struct calls it)."""
STRING, ARRAY = 8, 9
CODES = {**{name: code for code, (name, _) in SCALARS.items()}, "string": STRING}
FORMS = dict(SCALARS.values())

MAX_STRING_BYTES = 64 << 20
"""Of all texts of a file together, keys and names of tensors included."""
MAX_STRINGS = 1 << 20
"""How many: each costs some 50 bytes of memory beside its own."""
MAX_KEY_BYTES = 65_535
WINDOW = 1 << 20
"""Bytes of the head that are in memory at once, unless one value takes more."""


def broken(path: Path, why: str) -> FileFormatError:
    """The error for a file that breaks a promise of its format."""
    return FileFormatError(f"{path} is not a valid GGUF file: {why}; copy or download it again")


@dataclass(frozen=True, eq=False)
class Value:
    """One value of the metadata, as its file has it. Two are equal when their bytes are."""

    kind: str
    """`uint8`, `float32`, `bool`, `string`, ...; of an array, the kind of its elements."""
    data: int | float | bytes | NDArray[Any] | tuple[bytes, ...]
    """A number (0 or 1 for bool), UTF-8 bytes; of an array, numpy's of numbers [n] (bool: uint8) or a tuple of UTF-8 bytes."""

    @classmethod
    def text(cls, text: str) -> Value:
        """A text."""
        return cls("string", text.encode())

    @classmethod
    def texts(cls, texts: Sequence[str]) -> Value:
        """An array of texts."""
        return cls("string", tuple(text.encode() for text in texts))

    @classmethod
    def array(cls, kind: str, values: Sequence[Any] | NDArray[Any]) -> Value:
        """An array of numbers of one kind. Raises OverflowError for one that does not fit it."""
        dtype = np.dtype("uint8" if kind == "bool" else kind).newbyteorder("<")
        return cls(kind, np.array(values, dtype=dtype))

    @property
    def is_array(self) -> bool:
        return isinstance(self.data, np.ndarray | tuple)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and self.encode() == other.encode()

    def __str__(self) -> str:
        """Short, for a person."""
        if isinstance(self.data, bytes):
            return shown(self.data[:320].decode(errors="ignore"))
        if isinstance(self.data, np.ndarray | tuple):
            return f"{len(self.data)} x {self.kind}"
        return (
            str(bool(self.data)).lower() if self.kind == "bool" else f"{self.data:g}" if self.kind[0] == "f" else str(self.data)
        )

    def encode(self) -> bytes:
        """Type and value as they stand in a file."""
        code = CODES[self.kind]
        if isinstance(self.data, bytes):
            return struct.pack("<IQ", code, len(self.data)) + self.data
        if isinstance(self.data, tuple):
            parts = [struct.pack("<IIQ", ARRAY, code, len(self.data))]
            for text in self.data:
                parts += (len(text).to_bytes(8, "little"), text)
            return b"".join(parts)
        if isinstance(self.data, np.ndarray):
            return struct.pack("<IIQ", ARRAY, code, len(self.data)) + self.data.tobytes()
        return struct.pack("<I", code) + struct.pack(FORMS[self.kind], self.data)


class Head:
    """The head of an open file, read from its beginning on, a window of it in memory. Raises FileFormatError for whatever does
    not fit in what is left of the file, or breaks a limit."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.size = size
        self._file = file
        self._data = b""
        self._at = 0
        self._read = 0
        self._strings = 0
        self._string_bytes = 0

    @property
    def position(self) -> int:
        """Bytes taken so far."""
        return self._read - len(self._data) + self._at

    def broken(self, why: str) -> FileFormatError:
        """The error for this file."""
        return broken(self.path, why)

    def _fill(self, count: int, what: str) -> None:
        """Have the next `count` bytes in the window."""
        have = len(self._data) - self._at
        if count > self.size - self.position:
            raise self.broken(f"{what} takes {count} bytes, {self.size - self.position} are left")
        pieces, wanted = [self._data[self._at :]], min(max(count, WINDOW) - have, self.size - self._read)
        while have < count:
            piece = self._file.read(wanted)
            if not piece:
                raise self.broken(f"it ends after {self._read} of {self.size} bytes")
            pieces.append(piece)
            have, wanted, self._read = have + len(piece), wanted - len(piece), self._read + len(piece)
        self._data, self._at = b"".join(pieces), 0

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        if self._at + count > len(self._data):
            self._fill(count, what)
        self._at += count
        return self._data[self._at - count : self._at]

    def u32(self, what: str) -> int:
        """An unsigned number of 4 bytes."""
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        """An unsigned number of 8 bytes."""
        return int.from_bytes(self.take(8, what), "little")

    def _count(self, strings: int, size: int) -> None:
        self._strings += strings
        self._string_bytes += size
        if self._strings > MAX_STRINGS:
            raise self.broken(f"it has over {MAX_STRINGS} texts, the limit")
        if self._string_bytes > MAX_STRING_BYTES:
            raise self.broken(f"its texts take over {MAX_STRING_BYTES} bytes, the limit")

    def text(self, what: str, most: int = MAX_STRING_BYTES) -> bytes:
        """A text, as UTF-8."""
        length = self.u64(f"the length of {what}")
        if length > most:
            raise self.broken(f"{what} has {length} bytes, the limit is {most}")
        self._count(1, length)
        found = self.take(length, what)
        self._check_utf8((found,), what)
        return found

    def name(self, what: str, most: int) -> str:
        """A key or a tensor's name: a text that is not empty and holds no NUL."""
        found = self.text(what, most)
        if not found or b"\0" in found:
            raise self.broken(f"{what} is {shown(found.decode())}: a name is not empty and holds no NUL")
        return found.decode()

    def value(self, key: str) -> Value:
        """The value that stands next."""
        what = f"the value of {shown(key)}"
        code = self.u32(f"the type of {shown(key)}")
        if code == STRING:
            return Value("string", self.text(what))
        if code == ARRAY:
            return self._array(key, what)
        if code not in SCALARS:
            raise self.broken(f"{what} has type {code}, types go from 0 to 12")
        kind, form = SCALARS[code]
        number = struct.unpack(form, self.take(struct.calcsize(form), what))[0]
        if kind == "bool" and number > 1:
            raise self.broken(f"{what} is a bool of {number}, which is 0 or 1")
        return Value(kind, number)

    def _array(self, key: str, what: str) -> Value:
        code, count = self.u32(f"the type of {shown(key)}"), self.u64(f"the length of {shown(key)}")
        if code == STRING:
            return Value("string", self._texts(count, what))
        if code == ARRAY:
            raise self.broken(f"{what} is an array of arrays, which is not read here")
        if code not in SCALARS:
            raise self.broken(f"the elements of {shown(key)} have type {code}, types go from 0 to 12")
        kind = SCALARS[code][0]
        dtype = np.dtype("uint8" if kind == "bool" else kind).newbyteorder("<")
        values = np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        if kind == "bool" and (values > 1).any():
            raise self.broken(f"{what} has bools other than 0 and 1")
        return Value(kind, values)

    def _texts(self, count: int, what: str) -> tuple[bytes, ...]:
        """Texts one after another, in one pass."""
        if count * 8 > self.size - self.position:
            raise self.broken(f"{what} has {count} texts, {self.size - self.position} bytes are left")
        self._count(count, 0)
        found = []
        data, at, end, total, length_at = self._data, self._at, len(self._data), 0, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > end:
                self._at = at
                self._fill(8, what)
                data, at, end = self._data, 0, len(self._data)
            (length,) = length_at(data, at)
            at += 8
            if at + length > end:
                self._at = at
                if total + length > MAX_STRING_BYTES:
                    self._count(0, total + length)
                self._fill(length, what)
                data, at, end = self._data, 0, len(self._data)
            found.append(data[at : at + length])
            at += length
            total += length
        self._at = at
        self._count(0, total)
        self._check_utf8(found, what)
        return tuple(found)

    def _check_utf8(self, texts: Sequence[bytes], what: str) -> None:
        """Each by itself: a NUL between two keeps a character from being spread over them."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            for first in range(0, len(texts), 4096):
                joined = b"\0".join((*texts[first : first + 4096], b""))
                for start in range(0, len(joined), WINDOW):
                    decoder.decode(joined[start : start + WINDOW])
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise self.broken(f"{what} is not UTF-8 ({error.reason})") from error
