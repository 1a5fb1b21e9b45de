"""Checks of what is handed to the kernels: shapes, types, ranges, memory layout; one wording for every instruction set.

A wrong value is a ValueError that names the value and the limit, a row number out of range an IndexError. Nothing is
converted or copied here: a silent copy of a large packed weight would be the hidden memory that nybble promises not to
have, so arrays of another type, strided or unaligned views are refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]
Parameter: TypeAlias = NDArray[np.float16] | NDArray[np.float32]

UINT8 = (np.dtype(np.uint8),)
INT64 = (np.dtype(np.int64),)
FLOAT32 = (np.dtype(np.float32),)
FLOATS = (np.dtype(np.float16), np.dtype(np.float32))

FLOAT_KINDS = {"f32": "float32", "f16": "float16", "bf16": "uint16"}

MAX_BITS = 8
BLOCK = 64
"""Columns that quantized activations share a scale over."""
MAX_THREADS = 1024
MAX_COLUMNS = 1 << 31


class Packed(NamedTuple):
    """A packed weight [N, K] whose parts fit together."""

    packed: Bytes  # [N, row_bytes]
    columns: int  # K
    bits: int
    levels: Floats  # [2**bits]
    block: int  # at most max(1, K)
    scale: Parameter  # [N, blocks] or [1, 1]
    offset: Parameter | None  # the same
    shifted: bool = False  # value = scale * level + offset, not scale * (level - offset)


def integer(name: str, value: object, low: int, high: int) -> int:
    """The value as int; ValueError unless it is an integer from low to high."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return int(value)


def array(name: str, value: object, dtypes: tuple[np.dtype[Any], ...], dimensions: int) -> NDArray[Any]:
    """The value as an array; ValueError unless it has the type, dimensions and memory layout that kernels read."""
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{name} must be a numpy array of {_words(dtypes)}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise ValueError(f"{name} must be {_words(dtypes)}, got {value.dtype}")
    if value.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimensions, got shape {value.shape}")
    flags = value.flags
    if not (flags.c_contiguous and flags.aligned):
        raise ValueError(f"{name} must be C-contiguous and aligned; pass numpy.require({name}, requirements='CA')")
    return value


def _words(dtypes: tuple[np.dtype[Any], ...]) -> str:
    return " or ".join(dtype.name for dtype in dtypes)


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row: ceil(columns * bits / 8)."""
    return (integer("columns", columns, 0, MAX_COLUMNS) * integer("bits", bits, 1, MAX_BITS) + 7) // 8


def codes(value: object, bits: int) -> Bytes:
    """Codes uint8 [N, K], each below 2**bits."""
    found: Bytes = array("codes", value, UINT8, 2)
    limit = (1 << integer("bits", bits, 1, MAX_BITS)) - 1
    if found.size and int(found.max()) > limit:
        row, column = (int(i) for i in np.argwhere(found > limit)[0])
        raise ValueError(f"code {int(found[row, column])} at row {row}, column {column} is above {limit} ({bits} bits)")
    return found


def packed_rows(value: object, columns: int, bits: int) -> Bytes:
    """Packed rows uint8 [N, row_bytes]."""
    found: Bytes = array("packed", value, UINT8, 2)
    wanted = row_bytes(columns, bits)
    if found.shape[1] != wanted:
        raise ValueError(f"packed rows of {columns} columns at {bits} bits have {wanted} bytes, got {found.shape[1]}")
    return found


def _parameter(name: str, value: object, rows: int, blocks: int) -> Parameter:
    found: Parameter = array(name, value, FLOATS, 2)
    if found.shape != (rows, blocks) and not (found.shape == (1, 1) and blocks <= 1):
        raise ValueError(f"{name} must have shape {(rows, blocks)} (or (1, 1) with one block a row), got {found.shape}")
    return found


def weight(
    packed: object,
    columns: int,
    bits: int,
    levels: object,
    block: int,
    scale: object,
    offset: object | None,
    shifted: bool = False,
) -> Packed:
    """All parts of a packed weight, checked against each other."""
    streams = packed_rows(packed, columns, bits)
    table: Floats = array("levels", levels, FLOAT32, 1)
    if table.shape[0] != 1 << bits:
        raise ValueError(f"levels must have {1 << bits} values for {bits} bits, got {table.shape[0]}")
    if not np.isfinite(table).all():
        raise ValueError(f"levels must be finite, got {table[~np.isfinite(table)][0]}")
    run = min(integer("block", block, 1, MAX_COLUMNS), max(1, columns))
    blocks = -(-columns // run)
    rows = streams.shape[0]
    return Packed(
        streams,
        int(columns),
        int(bits),
        table,
        run,
        _parameter("scale", scale, rows, blocks),
        None if offset is None else _parameter("offset", offset, rows, blocks),
        bool(shifted),
    )


def row_numbers(value: object, rows: int) -> NDArray[np.int64]:
    """Row numbers int64 [T], each from 0 to rows - 1; IndexError otherwise."""
    found: NDArray[np.int64] = array("rows", value, INT64, 1)
    wrong = (found < 0) | (found >= rows)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise IndexError(f"row {int(found[at])} at position {at} is out of range for {rows} rows")
    return found
