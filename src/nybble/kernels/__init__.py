"""Packed codes on the CPU: packing, decoding, rows of an embedding, products with a packed weight.

The work is done by a C++ extension for the best instruction set of this machine, or by numpy (reference.py, the
specification) where the extension was not built. NYBBLE_KERNELS=reference|scalar|avx2|avx512 overrides the choice.
No torch here: arrays are C-contiguous numpy arrays. The layouts are written down in reference.py.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from nybble.errors import UsageError, unknown_name
from nybble.kernels import arguments, reference
from nybble.kernels.arguments import Bytes, Floats, Packed, Parameter, row_bytes

__all__ = [
    "Packed",
    "check_weight",
    "decode",
    "gather",
    "instruction_set",
    "matmul",
    "matmul_checked",
    "native_available",
    "pack",
    "read_bandwidth",
    "row_bytes",
    "unpack",
]

ENVIRONMENT = "NYBBLE_KERNELS"
_NAMES = ("reference", "scalar", "avx2", "avx512")


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


def instruction_set() -> str:
    """What does the work: "reference", "scalar", "avx2" or "avx512"."""
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
    threads: int = 1,
) -> Floats:
    """The weight float32 [N, columns]: scale * (levels[code] - offset), each step rounded to float32.

    packed uint8 [N, row_bytes]; levels float32 [2**bits], finite; scale and offset float16 or float32, one value for
    each run of `block` columns, [N, ceil(columns / block)], or [1, 1] when one block spans the row; no offset means 0.
    The result does not depend on threads. Raises ValueError for shapes, types or ranges that do not fit.
    """
    weight = arguments.weight(packed, columns, bits, levels, block, scale, offset)
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
) -> Floats:
    """The chosen rows of the weight, float32 [T, columns], for rows int64 [T]: an embedding look-up.

    The other arguments are those of decode. Raises IndexError for a row outside 0 to N - 1.
    """
    weight = arguments.weight(packed, columns, bits, levels, block, scale, offset)
    chosen = arguments.row_numbers(rows, weight.packed.shape[0])
    out = np.empty((chosen.shape[0], weight.columns), dtype=np.float32)
    if _native is None:
        reference.gather(chosen, weight, out)
    else:
        _native.gather(chosen, *weight, out)
    return out


def matmul(
    x: Floats,
    packed: Bytes,
    columns: int,
    bits: int,
    levels: Floats,
    block: int,
    scale: Parameter,
    offset: Parameter | None = None,
    threads: int = 1,
) -> Floats:
    """y = x @ W.T, float32 [M, N], for x float32 [M, columns] and the packed weight W [N, columns] of decode.

    The weight is decoded in registers on the way, never stored; meant for a few rows of x (M up to about 16), larger M
    is correct but a float product is faster. Sums are float32, per block before the scale; the result depends on the
    instruction set only in rounding, and not at all on threads or on the other rows of x.
    """
    return matmul_checked(x, check_weight(packed, columns, bits, levels, block, scale, offset), threads)


def check_weight(
    packed: Bytes,
    columns: int,
    bits: int,
    levels: Floats,
    block: int,
    scale: Parameter,
    offset: Parameter | None = None,
) -> Packed:
    """The parts of a packed weight, checked against each other once, for many calls of `matmul_checked`. No copies."""
    return arguments.weight(packed, columns, bits, levels, block, scale, offset)


def matmul_checked(x: Floats, weight: Packed, threads: int = 1) -> Floats:
    """`matmul` with a weight that `check_weight` gave: its checks cost more than the product of a small matrix."""
    found: Floats = arguments.array("x", x, arguments.FLOAT32, 2)
    threads = arguments.integer("threads", threads, 1, arguments.MAX_THREADS)
    if found.shape[1] != weight.columns:
        raise ValueError(f"x must have {weight.columns} columns like the weight, got {found.shape[1]}")
    out = np.empty((found.shape[0], weight.packed.shape[0]), dtype=np.float32)
    if _native is None:
        reference.matmul(found, weight, out)
    else:
        _native.matmul(found, *weight, out, threads)
    return out


def read_bandwidth(bytes: int, threads: int = 1, repeats: int = 5) -> float:
    """Bytes per second at which `threads` threads read a buffer of `bytes` bytes (from 1 MiB), the best of `repeats`.

    Choose a buffer several times larger than the caches to measure memory. The reference path uses one thread only.
    """
    size = arguments.integer("bytes", bytes, 1 << 20, 1 << 40)
    threads = arguments.integer("threads", threads, 1, arguments.MAX_THREADS)
    repeats = arguments.integer("repeats", repeats, 1, 10_000)
    return reference.read_bandwidth(size, repeats) if _native is None else float(_native.read_bandwidth(size, threads, repeats))
