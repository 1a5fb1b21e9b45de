"""What the kernels compute, in plain numpy: the specification, the test oracle, and the path without an extension.

A row of codes is a little-endian bit stream: code k lies in bits [k*bits, (k+1)*bits), least significant bit first, and
the row is padded with zero bits to a whole byte. A weight is value = scale * (level[code] - offset), every step in
float32; scale and offset are shared by blocks of `block` columns, the last block of a row may be short.

Arguments are taken as checked (arguments.py does it). Leaves out speed and threads: both are the extension's.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from nybble.kernels.arguments import Bytes, Floats, Packed

_SLAB = 1 << 20  # weights decoded at a time by matmul, so that the whole float matrix never exists


def pack(codes: Bytes, out: Bytes, bits: int) -> None:
    """Write the bit streams of codes uint8 [N, K] to out uint8 [N, row_bytes]."""
    if codes.size:
        streams = np.unpackbits(codes[:, :, None], axis=2, count=bits, bitorder="little")
        out[:] = np.packbits(streams.reshape(codes.shape[0], -1), axis=1, bitorder="little")


def unpack(packed: Bytes, out: Bytes, bits: int) -> None:
    """Write the codes uint8 [N, K] of packed uint8 [N, row_bytes] to out."""
    rows, columns = out.shape
    if out.size:
        streams = np.unpackbits(packed, axis=1, count=columns * bits, bitorder="little")
        out[:] = np.packbits(streams.reshape(rows, columns, bits), axis=2, bitorder="little")[:, :, 0]


def _spread(parameter: NDArray[np.float16] | Floats, weight: Packed, rows: slice | NDArray[np.int64]) -> Floats:
    """One float32 value a weight, [rows, K] (or [1, 1] for one value in all)."""
    chosen = parameter if parameter.shape[0] != weight.packed.shape[0] else parameter[rows]
    # Halves are widened before anything else, so that every later step rounds to float32.
    return np.repeat(chosen.astype(np.float32), weight.block, axis=1)[:, : weight.columns]


def _decoded(weight: Packed, rows: slice | NDArray[np.int64]) -> Floats:
    packed = weight.packed[rows]
    codes = np.empty((packed.shape[0], weight.columns), dtype=np.uint8)
    unpack(packed, codes, weight.bits)
    values = weight.levels[codes]
    with np.errstate(over="ignore", invalid="ignore"):  # infinite scales are the caller's; the extension is silent too
        if weight.offset is not None:
            values = values - _spread(weight.offset, weight, rows)
        return values * _spread(weight.scale, weight, rows)


def decode(weight: Packed, out: Floats) -> None:
    """Write the float32 weight [N, K] to out."""
    out[:] = _decoded(weight, slice(None))


def gather(rows: NDArray[np.int64], weight: Packed, out: Floats) -> None:
    """Write the float32 rows [T, K] to out."""
    out[:] = _decoded(weight, rows)


def matmul(x: Floats, weight: Packed, out: Floats) -> None:
    """Write x @ W.T, [M, N], to out; summed in float64 and rounded once, which no order of float32 sums can beat."""
    step = max(1, _SLAB // max(1, weight.columns))
    wide = x.astype(np.float64)
    for first in range(0, weight.packed.shape[0], step):
        slab = slice(first, first + step)
        out[:, slab] = wide @ _decoded(weight, slab).astype(np.float64).T


def read_bandwidth(size: int, repeats: int) -> float:
    """Bytes per second that numpy's sum reads from a buffer of `size` bytes, the best of `repeats`; one thread."""
    buffer = np.ones(size // 8, dtype=np.uint64)
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        buffer.sum()
        best = max(best, buffer.nbytes / max(time.perf_counter() - start, 1e-9))
    return best
