"""The header of a safetensors file: JSON of one shape only, read member by member so that memory stays in proportion.

Format: https://github.com/huggingface/safetensors (README, "Format"). A whole header in Python objects would be 25 times its
text where someone means harm; here one tensor's entry is JSON at a time, and only its dtype, shape and place are kept.

Refused beyond what the format says: more than MAX_TENSORS tensors, fields that the format does not know, names that are not
printable, very long, or shaped like a path that leaves a folder. Nothing here makes file names of tensor names, but somebody
else's program might.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # not in typeshed
from pathlib import Path
from typing import Any

import numpy as np

from nybble.errors import FileFormatError, shown
from nybble.files.json_strict import MAX_WIDE, finite, no_duplicates, shown_reason, whole

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
ITEM_BYTES = {tag: np.dtype(name).itemsize for tag, name in DTYPES.items()}
MAX_TENSORS = 100_000
MAX_METADATA = 65_536
"""Keys of the metadata."""
MAX_NAME = 1024
"""Characters of a tensor's name."""
MAX_DIMENSIONS = 32
"""numpy's own limit was 32 until its second version."""
MAX_SIZE = 1 << 47
"""Bytes, and numbers along one dimension: what a processor's addresses reach."""
MAX_ENTRY = 4096
"""Characters of one tensor's entry."""

_SPACE = re.compile(r"[ \t\n\r]*")
_WHOLE = r"(?:0|[1-9][0-9]{0,14})"
_PLAIN = re.compile(
    r'"([^"\\\x00-\x1f]*)":\{"dtype":"([A-Z0-9_]+)",'
    rf'"shape":\[((?:{_WHOLE}(?:,{_WHOLE})*)?)\],"data_offsets":\[({_WHOLE}),({_WHOLE})\]\}}'
)
"""A tensor as writers leave it, without white space or escapes: read three times as fast as the JSON that it also is."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its dtype tag (`F16`), shape, and bytes [start, end) of the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


def broken(path: Path, why: str) -> FileFormatError:
    """The error for a file that is no valid safetensors file."""
    return FileFormatError(f"{path} is not a valid safetensors file: {why}; copy or download it again")


def read_header(encoded: bytes, path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and entries of a header's bytes; that offsets fit together is not looked at.

    Raises FileFormatError, naming `path`, for anything that is no header.
    """
    if encoded[:1] != b"{":
        raise broken(path, "its header does not begin with {")
    if len(encoded) > MAX_WIDE and not encoded.isascii():
        raise broken(path, f"its header of {len(encoded)} bytes is not ASCII (limit of those that are not: {MAX_WIDE})")
    try:
        return _Header(encoded.decode("utf-8"), path).read()
    except FileFormatError:
        raise
    except (ValueError, RecursionError) as error:  # of the JSON and UTF-8 readers
        raise broken(path, f"its header is not JSON ({shown_reason(error)})") from error


class _Header:
    """A position in the text of a header."""

    def __init__(self, text: str, path: Path) -> None:
        self.text, self.path, self.at = text, path, 0
        self.surrogates = "\\ud" in text or "\\uD" in text
        self.decoder = json.JSONDecoder(
            object_pairs_hook=no_duplicates, parse_int=whole, parse_float=finite, parse_constant=_no_constant
        )

    def read(self) -> tuple[dict[str, str], dict[str, Entry]]:
        """The whole header."""
        metadata: dict[str, str] | None = None
        entries: dict[str, Entry] = {}
        more = self.begins_object()
        while more:
            plain = _PLAIN.match(self.text, self.at)
            if plain is not None:
                key, dtype, shape, start, end = plain.groups()
                self.at = plain.end()
                sizes = tuple(map(int, shape.split(","))) if shape else ()
                self.add(entries, key, make_entry(self.path, key, dtype, sizes, int(start), int(end)))
            elif (key := self.key()) != "__metadata__":
                self.add(entries, key, self.entry(key))
            elif metadata is None:
                metadata = self.strings()
            else:
                raise broken(self.path, "key '__metadata__' stands twice in its header")
            more = self.goes_on()
        if self.text[self.at :].strip(" \t\n\r"):
            raise ValueError(f"more text after its end, at character {self.at}")
        return metadata or {}, entries

    def add(self, entries: dict[str, Entry], name: str, entry: Entry) -> None:
        """Take a tensor in."""
        check_name(self.path, name)
        if name in entries:
            raise broken(self.path, f"key {shown(name)} stands twice in its header")
        if len(entries) == MAX_TENSORS:
            raise broken(self.path, f"it has more than {MAX_TENSORS} tensors")
        entries[name] = entry

    def skip(self) -> str:
        """Go to the next character that is no white space; it, or nothing at the end."""
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches the empty text too
        return self.text[self.at : self.at + 1]

    def expect(self, sign: str) -> None:
        """Take a sign."""
        found = self.skip()
        if found != sign:
            raise ValueError(f"{found!r} instead of {sign!r} at character {self.at}" if found else "it ends early")
        self.at += 1

    def string(self) -> str:
        """Take a text in quotes."""
        self.expect('"')
        value: str
        value, self.at = scanstring(self.text, self.at, True)
        if self.surrogates:
            value.encode("utf-8")  # half a surrogate pair: Python lets it pass, UTF-8 has no such thing
        return value

    def key(self) -> str:
        """Take a key and its colon."""
        key = self.string()
        self.expect(":")
        return key

    def begins_object(self) -> bool:
        """Take the brace before an object's first key; False when it has none, and the other brace is taken too."""
        self.expect("{")
        if self.skip() != "}":
            return True
        self.at += 1
        return False

    def goes_on(self) -> bool:
        """Take the comma before an object's next key; False when it ends, and its brace is taken."""
        if self.skip() == "}":
            self.at += 1
            return False
        self.expect(",")
        self.skip()
        return True

    def strings(self) -> dict[str, str]:
        """Take an object of strings."""
        if self.skip() != "{":
            raise broken(self.path, "its metadata is not a map of strings")
        found: dict[str, str] = {}
        more = self.begins_object()
        while more:
            key = self.key()
            if self.skip() != '"':
                raise broken(self.path, "its metadata is not a map of strings")
            if key in found:
                raise broken(self.path, f"key {shown(key)} stands twice in its metadata")
            if len(found) == MAX_METADATA:
                raise broken(self.path, f"its metadata has more than {MAX_METADATA} keys")
            found[key] = self.string()
            more = self.goes_on()
        return found

    def entry(self, name: str) -> Entry:
        """Take a tensor's entry."""
        if self.skip() != "{":
            raise broken(self.path, f"tensor {shown(name)} is not described by an object")
        end = self.text.find("}", self.at, self.at + MAX_ENTRY) + 1  # no valid entry has a brace inside
        if not end:
            raise broken(self.path, f"the entry of tensor {shown(name)} does not end within {MAX_ENTRY} characters")
        value = self.decoder.decode(self.text[self.at : end])
        self.at = end
        if value.keys() != {"dtype", "shape", "data_offsets"}:
            raise broken(self.path, f"tensor {shown(name)} has not dtype, shape and data_offsets, or more than these")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
            raise broken(self.path, f"tensor {shown(name)} has a shape that is no list, or data_offsets that are not two numbers")
        if not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
            raise broken(self.path, f"tensor {shown(name)} has a shape or offset that is not a non-negative integer")
        return make_entry(self.path, name, dtype, tuple(shape), *offsets)


def check_name(path: Path, name: str) -> None:
    """Raise FileFormatError for a tensor name that is no name."""
    if not name.isprintable():
        raise broken(path, f"tensor name {shown(name)} has characters that cannot be printed")
    if len(name) > MAX_NAME:
        raise broken(path, f"tensor name {shown(name)} has {len(name)} characters (limit {MAX_NAME})")
    if name.startswith("/") or (".." in name and ".." in re.split(r"[/\\]", name)):
        raise broken(path, f"tensor name {shown(name)} is a path that leaves its folder")


def make_entry(path: Path, name: str, dtype: Any, shape: tuple[int, ...], start: int, end: int) -> Entry:
    """The entry of a tensor from what its JSON says; numbers are from 0 on. Raises FileFormatError for one that cannot be."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise broken(path, f"tensor {shown(name)} has unknown dtype {shown(dtype)}")
    if len(shape) > MAX_DIMENSIONS:
        raise broken(path, f"tensor {shown(name)} has {len(shape)} dimensions (limit {MAX_DIMENSIONS})")
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if max(size, math.prod(n or 1 for n in shape)) > MAX_SIZE:  # also where a dimension of 0 hides the others
        raise broken(path, f"tensor {shown(name)} {dtype} {shown(list(shape))} is larger than {MAX_SIZE} bytes")
    if end - start != size:
        raise broken(path, f"tensor {shown(name)} {dtype} {shown(list(shape))} does not fill its {end - start} bytes")
    return Entry(sys.intern(dtype), shape, start, end)


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")
