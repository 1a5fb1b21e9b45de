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
ROUNDING_RULES = ("range", "ends", "away")
MAX_TABLE = 16
"""Levels of a table that a search can hold in registers."""
MAX_RUN = 256
MAX_BLOCKS = 16
"""Blocks of a run."""


class Nested(NamedTuple):
    """Scales, or shifts, of runs of blocks that share an outer scale: outer * (codes - bias), the product in float32."""

    codes: Bytes  # [N, blocks]
    bias: int
    outer: NDArray[np.float16]  # [N, blocks / a power of two]

    def floats(self) -> Floats:
        """float32 [N, blocks]: what they stand for."""
        per = self.codes.shape[1] // max(1, self.outer.shape[1])
        outer = np.repeat(self.outer.astype(np.float32), per, axis=1)
        return outer * (self.codes.astype(np.float32) - np.float32(self.bias))


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


class Search(NamedTuple):
    """How scales and codes of a format are searched (reference_search.py says what is done with it)."""

    levels: Floats  # [2 to 256], ascending: whole numbers one apart, or at most 16 of any kind
    block: int  # columns that share a scale
    run: int  # columns that share d: a multiple of block, a divisor of K
    low: int  # smallest multiplier
    high: int  # largest; low and high of 1: every block has its d for itself
    shifted: bool  # value = scale * level + offset
    plains: int  # so many of the tries are plain ranges, the first of them
    tries: Floats  # [T, 2]: steps in the range of a block, and by how many steps its lower end is raised
    dividers: Floats  # [S]: d is the largest scale of the run over one of these


class Found(NamedTuple):
    """What a search found: scale = d * m, offset = -(dmin * n)."""

    codes: Bytes  # [N, K]
    d: NDArray[np.float16]  # [N, K / run]
    scale: NDArray[np.int8]  # m [N, K / block]
    dmin: NDArray[np.float16] | None
    offset: NDArray[np.int8] | None  # n


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


def level_table(value: object) -> Floats:
    """Levels float32 [2 to 256], ascending: whole numbers one apart, or at most 16 of any kind."""
    table: Floats = array("levels", value, FLOAT32, 1)
    if not 2 <= table.shape[0] <= 256 or not np.isfinite(table).all() or (np.diff(table) <= 0).any():
        raise ValueError(f"levels must be 2 to 256 ascending numbers, got {table.shape[0]}: {table[:20]}")
    whole = (np.diff(table) == 1).all() and float(table[0]).is_integer() and abs(float(table[0])) <= 1 << 22
    if not whole and table.shape[0] > MAX_TABLE:
        raise ValueError(f"levels that are not whole numbers one apart must be at most {MAX_TABLE}, got {table.shape[0]}")
    return table


def search(weight: object, how: Search, importance: object | None) -> tuple[Floats, Floats | None]:
    """(weight [N, K], importance [1, K] or [N, K] or None), checked against how they are searched."""
    found: Floats = array("weight", weight, FLOAT32, 2)
    table = level_table(how.levels)
    block, run = integer("block", how.block, 1, MAX_RUN), integer("run", how.run, 1, MAX_RUN)
    if run % block or run // block > MAX_BLOCKS:
        raise ValueError(f"run must be 1 to {MAX_BLOCKS} whole blocks of {block}, got {run}")
    if found.shape[1] % run:
        raise ValueError(f"weight must have rows of whole runs of {run} columns, got {found.shape[1]}")
    low = integer("low", how.low, -128, 127)
    integer("high", how.high, low, 127)
    if how.shifted and not np.array_equal(table, table[0] + np.arange(table.shape[0])):
        raise ValueError(f"shifted levels must be whole numbers one apart, got {table}")
    tries: Floats = array("tries", how.tries, FLOAT32, 2)
    if tries.shape[0] < 1 or tries.shape[1] != 2 or not np.isfinite(tries).all() or (tries[:, 0] == 0).any():
        raise ValueError(f"tries must be finite pairs whose first is not 0, at least one, got shape {tries.shape}")
    integer("plains", how.plains, 1, tries.shape[0])
    dividers: Floats = array("dividers", how.dividers, FLOAT32, 1)
    if dividers.shape[0] < 1 or not np.isfinite(dividers).all() or (dividers == 0).any():
        raise ValueError(f"dividers must be finite and not 0, at least one, got {dividers}")
    if importance is None:
        return found, None
    weights: Floats = array("importance", importance, FLOAT32, 2)
    if weights.shape not in (found.shape, (1, found.shape[1])):
        raise ValueError(f"importance must have shape {(1, found.shape[1])} or {found.shape}, got {weights.shape}")
    return found, weights


def blocks_of(name: str, value: object, weight: Floats, block: int) -> Floats:
    """One float32 for each block of columns, [N, ceil(K / block)]."""
    found: Floats = array(name, value, FLOAT32, 2)
    wanted = (weight.shape[0], -(-weight.shape[1] // block))
    if found.shape != wanted:
        raise ValueError(f"{name} must have shape {wanted}, got {found.shape}")
    return found


def nested(name: str, value: Nested, rows: int, blocks: int) -> Nested:
    """Nested parameters that fit a weight."""
    codes_found: Bytes = array(f"codes of {name}", value.codes, UINT8, 2)
    outer: NDArray[np.float16] = array(f"outer {name}", value.outer, FLOATS[:1], 2)
    per = blocks // max(1, outer.shape[1])
    if codes_found.shape != (rows, blocks) or outer.shape[0] != rows or per * outer.shape[1] != blocks or per & (per - 1):
        raise ValueError(
            f"nested {name} has codes {codes_found.shape} and outer {outer.shape}; "
            f"they must be {(rows, blocks)} and a power of two fewer"
        )
    return Nested(codes_found, integer(f"bias of {name}", value.bias, 0, 255), outer)


def row_numbers(value: object, rows: int) -> NDArray[np.int64]:
    """Row numbers int64 [T], each from 0 to rows - 1; IndexError otherwise."""
    found: NDArray[np.int64] = array("rows", value, INT64, 1)
    wrong = (found < 0) | (found >= rows)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise IndexError(f"row {int(found[at])} at position {at} is out of range for {rows} rows")
    return found
