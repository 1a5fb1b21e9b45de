"""Weights on the CPU: packing codes, decoding them, and products with weights laid out for the kernels.

The work is done by a C++ extension for the best instruction set of this machine, or by numpy (reference.py, the
specification) where the extension was not built. NYBBLE_KERNELS=reference|scalar|avx2|avx2vnni|avx512|avx512vnni|neon|neondot
overrides the choice. No torch here: arrays are C-contiguous numpy arrays. The layout of stored codes is written down in
reference.py, that of weights made ready for products (`lay`) in layout.hpp.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from nybble.errors import UsageError, unknown_name
from nybble.kernels import arguments, reference, reference_round, reference_search, reference_uniform
from nybble.kernels.arguments import Bytes, Floats, Found, Nested, Packed, Parameter, Search, row_bytes

__all__ = [
    "Found",
    "Laid",
    "Nested",
    "Packed",
    "Search",
    "check_weight",
    "cores",
    "decode",
    "extremes",
    "gather",
    "instruction_set",
    "lay",
    "lay_floats",
    "native",
    "native_available",
    "nearest",
    "pack",
    "product",
    "quantize_activations",
    "read_bandwidth",
    "round_blocks",
    "row_bytes",
    "rows_of",
    "search",
    "uniform",
    "unpack",
]

ENVIRONMENT = "NYBBLE_KERNELS"
_NAMES = ("reference", "scalar", "avx2", "avx2vnni", "avx512", "avx512vnni", "neon", "neondot")


def _load() -> ModuleType | None:
    """The extension, set to the wanted instruction set; None for the reference."""
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted and wanted not in _NAMES:
        raise unknown_name(f"value of {ENVIRONMENT}", wanted, _NAMES)
    if wanted == "reference":
        return None
    try:
        module = importlib.import_module("nybble.kernels._native")
    except ImportError as error:
        if wanted:
            raise UsageError(f"{ENVIRONMENT}={wanted} needs the C++ extension, which is not built here") from error
        return None
    if wanted:
        able = module.instruction_sets()
        if wanted not in able:
            raise UsageError(f"{ENVIRONMENT}={wanted}: this machine has only {', '.join(able)}; unset it or choose one")
        module.select(wanted)
    return module


_native = _load()


def native_available() -> bool:
    """True when the C++ extension does the work."""
    return _native is not None


def native() -> ModuleType | None:
    """The extension itself, for the engine; None where the reference does the work."""
    return _native


def instruction_set() -> str:
    """What does the work: "reference", "scalar", "avx2", "avx2vnni", "avx512", "avx512vnni", "neon" or "neondot"."""
    return "reference" if _native is None else str(_native.instruction_set())


def pack(codes: Bytes, bits: int) -> Bytes:
    """Pack codes uint8 [N, K] into bit streams uint8 [N, row_bytes(K, bits)].

    Raises ValueError for a code of 2**bits or more (named with its place), bits outside 1 to 8, or another array type.
    """
    found = arguments.codes(codes, bits)
    out = np.empty((found.shape[0], row_bytes(found.shape[1], bits)), dtype=np.uint8)
    (reference if _native is None else _native).pack(found, out, bits)
    return out


def unpack(packed: Bytes, columns: int, bits: int) -> Bytes:
    """The codes uint8 [N, columns] of packed uint8 [N, row_bytes(columns, bits)]; undoes pack."""
    found = arguments.packed_rows(packed, columns, bits)
    out = np.empty((found.shape[0], columns), dtype=np.uint8)
    (reference if _native is None else _native).unpack(found, out, bits)
    return out


def decode(
    packed: Bytes,
    columns: int,
    bits: int,
    levels: Floats,
    block: int,
    scale: Parameter,
    offset: Parameter | None = None,
    shifted: bool = False,
    threads: int = 1,
) -> Floats:
    """The weight float32 [N, columns]: scale * (levels[code] - offset), or where `shifted` scale * levels[code] + offset, each
    step rounded to float32.

    packed uint8 [N, row_bytes]; levels float32 [2**bits], finite; scale and offset float16 or float32, one value for
    each run of `block` columns, [N, ceil(columns / block)], or [1, 1] when one block spans the row; no offset means 0.
    The result does not depend on threads. Raises ValueError for shapes, types or ranges that do not fit.
    """
    weight = arguments.weight(packed, columns, bits, levels, block, scale, offset, shifted)
    threads = arguments.integer("threads", threads, 1, arguments.MAX_THREADS)
    out = np.empty((weight.packed.shape[0], weight.columns), dtype=np.float32)
    if _native is None:
        reference.decode(weight, out)
    else:
        _native.decode(*weight, out, threads)
    return out


def gather(
    rows: NDArray[np.int64],
    packed: Bytes,
    columns: int,
    bits: int,
    levels: Floats,
    block: int,
    scale: Parameter,
    offset: Parameter | None = None,
    shifted: bool = False,
) -> Floats:
    """The chosen rows of the weight, float32 [T, columns], for rows int64 [T]: an embedding look-up.

    The other arguments are those of decode. Raises IndexError for a row outside 0 to N - 1.
    """
    weight = arguments.weight(packed, columns, bits, levels, block, scale, offset, shifted)
    chosen = arguments.row_numbers(rows, weight.packed.shape[0])
    out = np.empty((chosen.shape[0], weight.columns), dtype=np.float32)
    if _native is None:
        reference.gather(chosen, weight, out)
    else:
        _native.gather(chosen, *weight, out)
    return out


def check_weight(
    packed: Bytes,
    columns: int,
    bits: int,
    levels: Floats,
    block: int,
    scale: Parameter,
    offset: Parameter | None = None,
    shifted: bool = False,
) -> Packed:
    """The parts of a packed weight, checked against each other once, for many calls of `matmul_checked`. No copies."""
    return arguments.weight(packed, columns, bits, levels, block, scale, offset, shifted)


class Laid(Protocol):
    """A weight [rows, columns] in the kernel layout (layout.hpp): private to memory, no file holds it."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def holds_codes(self) -> bool: ...
    def product(self, x: Floats, y: Floats, exact: bool, threads: int) -> None: ...
    def gather(self, rows: NDArray[np.int64], out: Floats) -> None: ...
    def restore(self, packed: Bytes, scale: Parameter | None, offset: Parameter | None, threads: int) -> None: ...


def lay(
    packed: Bytes,
    columns: int,
    bits: int,
    levels: Floats,
    block: int,
    scale: Parameter | Nested,
    offset: Parameter | Nested | None = None,
    shifted: bool = False,
    drop: bool = False,
    threads: int = 1,
) -> Laid:
    """The kernel layout of a packed weight; the arguments are those of `decode`, or scale and shift both nested.

    `drop` says that the arrays are not read again after this: the pages of a mapped file are given back to the system.
    """
    threads = arguments.integer("threads", threads, 1, arguments.MAX_THREADS)
    if isinstance(scale, Nested):
        return _lay_nested(packed, columns, bits, levels, block, scale, offset, drop, threads)
    assert not isinstance(offset, Nested), "scale and offset are nested both, or neither"
    weight = arguments.weight(packed, columns, bits, levels, block, scale, offset, shifted)
    if _native is None:
        return reference.Laid(weight)
    return cast(Laid, _native.Weight.from_codes(*weight, drop, threads))


def _lay_nested(
    packed: Bytes,
    columns: int,
    bits: int,
    levels: Floats,
    block: int,
    scale: Nested,
    offset: Parameter | Nested | None,
    drop: bool,
    threads: int,
) -> Laid:
    assert offset is None or isinstance(offset, Nested), "scale and offset are nested both, or neither"
    rows, blocks = len(arguments.packed_rows(packed, columns, bits)), -(-columns // block)
    scale = arguments.nested("scale", scale, rows, blocks)
    offset = None if offset is None else arguments.nested("offset", offset, rows, blocks)
    if _native is None:
        floats = None if offset is None else offset.floats()
        weight = arguments.weight(packed, columns, bits, levels, block, scale.floats(), floats, offset is not None)
        return reference.Laid(weight, nested=True)
    shift = (None, None) if offset is None else (offset.codes, offset.outer)
    laid = _native.Weight.from_nested(
        packed, columns, bits, levels, block, scale.codes, scale.outer, scale.bias, *shift, drop, threads
    )
    return cast(Laid, laid)


def lay_floats(values: NDArray[Any], kind: str, transposed: bool = False, drop: bool = False, threads: int = 1) -> Laid:
    """The kernel layout of a float weight: values [N, K], or [K, N] when transposed, float32 (`kind` f32), float16 (f16) or
    uint16 bit patterns of bfloat16 (bf16)."""
    if kind not in arguments.FLOAT_KINDS:
        raise ValueError(f"kind must be {', '.join(arguments.FLOAT_KINDS)}, got {kind!r}")
    found = arguments.array("values", values, (np.dtype(arguments.FLOAT_KINDS[kind]),), 2)
    threads = arguments.integer("threads", threads, 1, arguments.MAX_THREADS)
    if _native is None:
        return reference.Laid.of_floats(found, kind, transposed)
    return cast(Laid, _native.Weight.from_floats(found, kind, transposed, drop, threads))


def product(x: Floats, weight: Laid, exact: bool = True, threads: int = 1) -> Floats:
    """y = x @ W.T, float32 [M, N], for x float32 [M, K] and a weight in the kernel layout.

    Exact: x stays float32. Otherwise x is rounded to int8 in blocks of 64 columns (`quantize_activations`) and products with
    integer codes are summed as integers; 16-level tables are rounded to 8 bits (at most half of their largest level over
    64). Float weights are always exact. A row's result does not depend on the other rows or on threads.
    """
    found: Floats = arguments.array("x", x, arguments.FLOAT32, 2)
    threads = arguments.integer("threads", threads, 1, arguments.MAX_THREADS)
    if found.shape[1] != weight.columns:
        raise ValueError(f"x must have {weight.columns} columns like the weight, got {found.shape[1]}")
    out = np.empty((found.shape[0], weight.rows), dtype=np.float32)
    weight.product(found, out, exact, threads)
    return out


def rows_of(weight: Laid, rows: NDArray[np.int64]) -> Floats:
    """Rows of a weight in the kernel layout, float32 [T, K]: an embedding look-up. IndexError for a row out of range."""
    chosen = arguments.row_numbers(rows, weight.rows)
    out = np.empty((chosen.shape[0], weight.columns), dtype=np.float32)
    weight.gather(chosen, out)
    return out


def search(weight: Floats, how: Search, importance: Floats | None = None, threads: int = 1) -> Found:
    """Codes, scales and offsets of a weight float32 [N, K] that make the squared error small, weighed by importance float32
    [1, K] or [N, K] where it is given: positive in at least one column of every block, at most 1 or so.

    reference_search.py says what is searched, and that no error is above that of the plain range. Weights must be finite, and
    small enough that the plain range's scales fit a float16. The result does not depend on threads or on the instruction set.
    Raises ValueError for shapes, types or ranges that do not fit.
    """
    found, weights = arguments.search(weight, how, importance)
    threads = arguments.integer("threads", threads, 1, arguments.MAX_THREADS)
    rows, columns = found.shape
    shared, each = (rows, columns // how.run), (rows, columns // how.block)
    out = Found(
        np.empty((rows, columns), np.uint8),
        np.empty(shared, np.float16),
        np.empty(each, np.int8),
        np.empty(shared, np.float16) if how.shifted else None,
        np.empty(each, np.int8) if how.shifted else None,
    )
    if found.size and _native is None:
        reference_search.search(found, weights, how, out)
    elif found.size:
        assert _native is not None
        d, dmin = out.d.view(np.uint16), None if out.dmin is None else out.dmin.view(np.uint16)
        _native.search(found, weights, *how, out.codes, d, out.scale, dmin, out.offset, threads)
    return out


def nearest(weight: Floats, levels: Floats, block: int, scale: Floats, offset: Floats | None = None, threads: int = 1) -> Bytes:
    """Codes uint8 [N, K]: the places in ascending levels of those nearest to (weight - offset) / scale, each step rounded to
    float32. weight float32 [N, K]; scale and offset float32 [N, ceil(K / block)]. Halfway between two levels: the even
    quotient where levels are whole numbers one apart, else the lower level. Where the scale is 0 the quotient is 0.
    Raises ValueError for shapes or types that do not fit.
    """
    found: Floats = arguments.array("weight", weight, arguments.FLOAT32, 2)
    table = arguments.level_table(levels)
    block = arguments.integer("block", block, 1, arguments.MAX_COLUMNS)
    scales = arguments.blocks_of("scale", scale, found, block)
    offsets = None if offset is None else arguments.blocks_of("offset", offset, found, block)
    threads = arguments.integer("threads", threads, 1, arguments.MAX_THREADS)
    out = np.empty(found.shape, np.uint8)
    if _native is None:
        reference_search.nearest(found, table, block, scales, offsets, out)
    else:
        _native.nearest(found, table, block, scales, offsets, out, threads)
    return out


def extremes(weight: Floats, block: int, threads: int = 1) -> tuple[Floats, Floats]:
    """Lowest and highest weight of every block, float32 [N, ceil(K / block)], of a finite weight float32 [N, K]. Raises
    ValueError for shapes or types that do not fit."""
    found: Floats = arguments.array("weight", weight, arguments.FLOAT32, 2)
    block = arguments.integer("block", block, 1, arguments.MAX_COLUMNS)
    threads = arguments.integer("threads", threads, 1, arguments.MAX_THREADS)
    each = (found.shape[0], -(-found.shape[1] // block))
    low, high = np.empty(each, np.float32), np.empty(each, np.float32)
    if not found.size:
        return low, high
    if _native is None:
        reference_uniform.extremes(found, block, low, high)
    else:
        _native.extremes(found, block, low, high, threads)
    return low, high


def uniform(weight: Floats, bits: int, block: int, scale: Floats, zero: Floats | None = None, threads: int = 1) -> Bytes:
    """Codes uint8 [N, K]: rint(weight / scale) + zero, the quotient in float64, cut off at 0 and 2^bits - 1; without zeros the
    middle, 2^(bits-1). weight float32 [N, K], finite; scale and zero float32 [N, ceil(K / block)]. Where the scale is 0 it counts
    as 1. Raises ValueError for shapes, types or ranges that do not fit.
    """
    found: Floats = arguments.array("weight", weight, arguments.FLOAT32, 2)
    bits = arguments.integer("bits", bits, 2, arguments.MAX_BITS)
    block = arguments.integer("block", block, 1, arguments.MAX_COLUMNS)
    scales = arguments.blocks_of("scale", scale, found, block)
    zeros = None if zero is None else arguments.blocks_of("zero", zero, found, block)
    threads = arguments.integer("threads", threads, 1, arguments.MAX_THREADS)
    codes = np.empty(found.shape, np.uint8)
    if _native is None:
        reference_uniform.uniform(found, bits, block, scales, zeros, codes)
    else:
        _native.uniform(found, bits, block, scales, zeros, codes, threads)
    return codes


def round_uniform(
    values: NDArray[Any], kind: str, bits: int, block: int, wide: bool, asymmetric: bool, threads: int = 1
) -> tuple[Bytes, NDArray[np.floating[Any]], Bytes | None] | None:
    """(codes uint8 [N, K], scale [N, ceil(K / block)], float16 or `wide` float32, zero uint8 like scale or None) of a weight
    [N, K] as a file has it, rounded from the plain range of each block: `extremes`, the scale rounded up, `uniform`, in one pass.

    `kind` is f32 (float32), f16 (float16) or bf16 (uint16 bit patterns). None where there are no native kernels, and where a
    weight is not finite or a scale has no room: the plain way says why. Raises ValueError for types that do not fit.
    """
    dtypes = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}
    if kind not in dtypes:
        raise ValueError(f"kind must be {', '.join(dtypes)}, got {kind!r}")
    found = arguments.array("values", values, (np.dtype(dtypes[kind]),), 2)
    bits = arguments.integer("bits", bits, 2, arguments.MAX_BITS)
    block = arguments.integer("block", block, 1, arguments.MAX_COLUMNS)
    threads = arguments.integer("threads", threads, 1, arguments.MAX_THREADS)
    if _native is None:
        return None
    each = (found.shape[0], -(-found.shape[1] // block))
    codes, scale = np.empty(found.shape, np.uint8), np.empty(each, np.float32 if wide else np.float16)
    zero = np.empty(each, np.uint8) if asymmetric else None
    halves = None if wide else scale.view(np.uint16)
    raw = found.view(np.uint16) if kind == "f16" else found
    fine = _native.round_uniform(raw, kind, bits, block, codes, halves, scale if wide else None, zero, threads)
    return (codes, scale, zero) if fine else None


def round_blocks(weight: Floats, bits: int, block: int, rule: str, threads: int = 1) -> tuple[Bytes, Floats, Floats]:
    """(codes uint8 [N, K], scale and shift float32 [N, K / block]) of a finite weight float32 [N, K], rounded as ggml does it by
    the rule `range`, `ends` or `away` (reference_round.py says what they are), before scale and shift are stored in fewer bits.
    Raises ValueError for shapes, types or ranges that do not fit.
    """
    found: Floats = arguments.array("weight", weight, arguments.FLOAT32, 2)
    bits = arguments.integer("bits", bits, 2, arguments.MAX_BITS)
    block = arguments.integer("block", block, 1, arguments.MAX_RUN)
    if found.shape[1] % block:
        raise ValueError(f"weight must have rows of whole blocks of {block} columns, got {found.shape[1]}")
    if rule not in arguments.ROUNDING_RULES:
        raise ValueError(f"rule must be {', '.join(arguments.ROUNDING_RULES)}, got {rule!r}")
    threads = arguments.integer("threads", threads, 1, arguments.MAX_THREADS)
    each = (found.shape[0], found.shape[1] // block)
    codes, scale, shift = np.empty(found.shape, np.uint8), np.empty(each, np.float32), np.empty(each, np.float32)
    if _native is None:
        reference_round.round_blocks(found, bits, block, rule, codes, scale, shift)
    else:
        _native.round_blocks(found, bits, block, rule, codes, scale, shift, threads)
    return codes, scale, shift


def cores() -> int:
    """Processors that this process may run on: what formats give as `threads`."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, arguments.MAX_THREADS)


def quantize_activations(x: Floats) -> tuple[NDArray[np.int8], Floats]:
    """(codes int8 [M, blocks * 64], scale float32 [M, blocks]) of x float32 [M, K], blocks = ceil(K / 64).

    scale = absmax / 127, code = nearest(x * (127 / absmax)), ties to even; a block below 1e-30 is zeros with scale 0, one
    with a value that is not finite has scale NaN.
    """
    found: Floats = arguments.array("x", x, arguments.FLOAT32, 2)
    blocks = -(-found.shape[1] // arguments.BLOCK)
    codes = np.zeros((found.shape[0], blocks * arguments.BLOCK), dtype=np.int8)
    scale = np.zeros((found.shape[0], blocks), dtype=np.float32)
    (reference if _native is None else _native).quantize_activations(found, codes, scale)
    return codes, scale


def read_bandwidth(bytes: int, threads: int = 1, repeats: int = 5) -> float:
    """Bytes per second at which `threads` threads read a buffer of `bytes` bytes (from 1 MiB), the best of `repeats`.

    Choose a buffer several times larger than the caches to measure memory. The reference path uses one thread only.
    """
    size = arguments.integer("bytes", bytes, 1 << 20, 1 << 40)
    threads = arguments.integer("threads", threads, 1, arguments.MAX_THREADS)
    repeats = arguments.integer("repeats", repeats, 1, 10_000)
    return reference.read_bandwidth(size, repeats) if _native is None else float(_native.read_bandwidth(size, threads, repeats))
