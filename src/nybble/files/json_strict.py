"""JSON of a file that nobody vouches for: one reader for config.json, index files and the header of a safetensors file.

Stricter than RFC 8259 asks and Python's `json` is: a key stands once in its object, numbers are finite and fit 64 bits, nothing
nests deeper than MAX_DEPTH, texts are UTF-8 without half surrogate pairs, and what parsing would take of memory is estimated
before it begins: objects in memory are up to 25 times their text (`[{},{},...]`).

Two readers that take a file's bytes for different things are a hole (the last of two equal keys against the first of them), so
nothing here is repaired or guessed.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from nybble.errors import FileFormatError, shown
from nybble.files.opening import read_bytes

MAX_BYTES = 64 << 20
"""Of a JSON file, unless its reader says less."""
MAX_DEPTH = 32
MAX_WIDE = 8 << 20
"""Bytes of a text with anything but ASCII in it: in memory one character beyond the 16-bit plane makes all of them 4 bytes."""
MAX_DIGITS = 400
"""Characters of one number; the longest that float64 needs to be exact has 767, the longest that anyone writes 24."""
VALUE_BYTES = 85
"""Of memory for each `,`, `:`, `[` or `{`, the most we measured: `{"00001":{},"00002":{},...}`."""
ROOM = 40 << 20
"""What parsing may take beyond the length of the text."""

NO_LIMIT = str(int(1e30))
"""What transformers writes for a tokenizer without a longest text: the one number beyond 64 bits that files are full of."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_object(path: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds. Raises InputError when it cannot be read, FileFormatError when it is none."""
    return parse_object(read_bytes(path, limit), path, limit)


def parse_object(data: bytes, where: str | Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """A JSON object from its bytes. Raises FileFormatError, beginning with `where`, when they are none or break a limit."""
    value = parse(data, where, limit)
    if not isinstance(value, dict):
        raise FileFormatError(f"{where} holds a {type(value).__name__}, not an object")
    return value


def parse(data: bytes, where: str | Path, limit: int = MAX_BYTES) -> Any:
    """Any JSON value from its bytes. Raises FileFormatError as `parse_object`."""
    if len(data) > limit:
        raise FileFormatError(f"{where} has {len(data)} bytes of JSON, the limit is {limit}")
    try:
        value = json.loads(
            decode(data, where), object_pairs_hook=no_duplicates, parse_int=whole, parse_float=finite, parse_constant=_no_constant
        )
        check_depth(value)
        if _SURROGATE.search(data):
            check_unicode(value)
    except RecursionError as error:
        raise FileFormatError(f"{where} is not JSON to read: it nests deeper than {MAX_DEPTH}") from error
    except (json.JSONDecodeError, UnicodeError) as error:
        raise FileFormatError(f"{where} is not JSON: {shown_reason(error)}") from error
    except FileFormatError:
        raise
    except ValueError as error:
        raise FileFormatError(f"{where} is JSON that is not safe to read: {shown_reason(error)}") from error
    return value


def decode(data: bytes, where: str | Path) -> str:
    """The text of JSON bytes, once it is known that parsing it takes no more memory than it may.

    Raises FileFormatError, also (as ValueError from the codec) for bytes that are not UTF-8.
    """
    if len(data) > MAX_WIDE and not data.isascii():
        raise FileFormatError(f"{where} has {len(data)} bytes of JSON that is not ASCII, the limit is {MAX_WIDE}")
    values = sum(data.count(sign) for sign in (b",", b":", b"[", b"{"))
    if values * VALUE_BYTES > len(data) + ROOM:
        raise FileFormatError(f"{where} has {values} values in {len(data)} bytes of JSON, too many to read safely")
    return data.decode("utf-8")


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary of an object's pairs. Raises ValueError for a key that stands twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(twice)} stands twice in one object")
    return result


def whole(digits: str) -> int:
    """An integer of 64 bits, signed or not, or NO_LIMIT. "-0" is no integer to other readers, so it is none here."""
    if digits == "-0":
        raise ValueError("-0 is not an integer")
    if digits == NO_LIMIT:
        return int(digits)
    if len(digits) > 20 or not -(1 << 63) <= (value := int(digits)) < 1 << 64:
        raise ValueError(f"number {digits[:24]}{'...' * (len(digits) > 24)} does not fit 64 bits")
    return value


def finite(digits: str) -> float:
    """A float64 that is finite."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} characters, the limit is {MAX_DIGITS}")
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"number {digits[:24]} is too large for a float")
    return value


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def check_depth(value: Any, most: int = MAX_DEPTH) -> None:
    """Raise ValueError for a value that nests deeper than `most`; walks level by level, so that it cannot recurse itself."""
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it nests deeper than {most}")


def check_unicode(value: Any) -> None:
    """Raise ValueError for a string, at any depth, with half a surrogate pair: Python lets it pass, UTF-8 has no such thing."""
    json.dumps(value, ensure_ascii=False).encode("utf-8")


def shown_reason(error: BaseException) -> str:
    """An exception's message in one printable line of limited length."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else " " for c in text)[:200] or type(error).__name__
