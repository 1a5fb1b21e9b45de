"""What the kernels compute, in plain numpy: the specification, the test oracle, and the path without an extension.

A row of codes is a little-endian bit stream: code k lies in bits [k*bits, (k+1)*bits), least significant bit first, and
the row is padded with zero bits to a whole byte. A weight is value = scale * (level[code] - offset), or where it is
`shifted` scale * level[code] + offset, every step in float32; scale and offset are shared by blocks of `block` columns,
the last block of a row may be short.

Arguments are taken as checked (arguments.py does it). Leaves out speed and threads: both are the extension's.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.kernels.arguments import BLOCK, Bytes, Floats, Packed, Parameter


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
        if weight.offset is not None and weight.shifted:
            return values * _spread(weight.scale, weight, rows) + _spread(weight.offset, weight, rows)
        if weight.offset is not None:
            values = values - _spread(weight.offset, weight, rows)
        return values * _spread(weight.scale, weight, rows)


def decode(weight: Packed, out: Floats) -> None:
    """Write the float32 weight [N, K] to out."""
    out[:] = _decoded(weight, slice(None))


def gather(rows: NDArray[np.int64], weight: Packed, out: Floats) -> None:
    """Write the float32 rows [T, K] to out."""
    out[:] = _decoded(weight, rows)


def quantize_activations(x: Floats, codes: NDArray[np.int8], scale: Floats) -> None:
    """Write the int8 codes [M, blocks * 64] of x [M, K] and their scales [M, blocks]."""
    rows, count = scale.shape
    blocks = np.zeros((rows, count * BLOCK), dtype=np.float32)
    blocks[:, : x.shape[1]] = x
    blocks = blocks.reshape(rows, count, BLOCK)
    finite = np.asarray(np.isfinite(blocks).all(-1))
    top = np.where(finite, np.abs(np.where(np.isfinite(blocks), blocks, 0)).max(-1), 0).astype(np.float32)
    some = top > np.float32(1e-30)
    inverse = np.where(some, np.float32(127) / np.where(some, top, np.float32(1)), np.float32(0)).astype(np.float32)
    scale[:] = np.where(finite, np.where(some, top / np.float32(127), np.float32(0)), np.float32(np.nan))
    whole = np.rint(np.where(finite[..., None], blocks, 0) * inverse[..., None])
    codes[:] = whole.reshape(rows, -1).astype(np.int8)


def byte_levels(levels: Floats) -> tuple[NDArray[np.int64], np.float32]:
    """A table of 16 levels as whole numbers from -127 to 127 and their step: level is about number * step.

    Of the counts of steps from 63.5 to 127 in the largest level, by 0.05, the one with the least squared error.
    """
    top = float(np.abs(levels).max()) or 1.0
    best: tuple[float, float] | None = None
    for i in range(1271):
        steps = 127.0 - i * 0.05
        at = levels.astype(np.float64) / top * steps
        error = float((((at - np.rint(at)) / steps) ** 2).sum())
        if best is None or error < best[0] - 1e-18:
            best = (error, steps)
    assert best is not None
    return np.rint(levels.astype(np.float64) / top * best[1]).astype(np.int64), np.float32(top / best[1])


def whole_scales(weight: Packed) -> NDArray[np.float16] | Floats:
    """Scales as fast products take them: of symmetric levels of up to four bits in small blocks, whole numbers of 15 bits.

    Times a power of two, the step of their row. What is at least a sixteenth of the largest of its row, and a half, is kept
    to the bit; others are off by at most half a step, 2**-15 of the largest. All are kept as they are where a block of
    activations has one scale, and where the largest of a row is not finite or far from 1.
    """
    scale = weight.scale.astype(np.float32)
    small = weight.block == BLOCK // 4 or (weight.block % 32 == 0 and weight.block % BLOCK != 0)
    symmetric = weight.offset is None and float(np.abs(weight.levels).max()) <= 8
    whole = np.array_equal(weight.levels, weight.levels[0] + np.arange(weight.levels.size))
    if scale.shape[1] <= 1 or not (small and symmetric and whole) or not np.isfinite(scale).all():
        return weight.scale
    top = np.abs(scale).max(1, keepdims=True)
    if ((top > 0) & ((top < 2.0**-90) | (top > 2.0**90))).any():
        return weight.scale
    step = np.where(top > 0, np.ldexp(np.float32(1), np.frexp(top)[1] - 15), np.float32(1)).astype(np.float32)
    step = np.where(np.rint(top / step) > 32767, 2 * step, step).astype(np.float32)
    rounded: Floats = np.rint(scale / step) * step
    return rounded


class Laid:
    """A weight ready for products: here nothing but the weight itself."""

    def __init__(self, weight: Packed | None, values: Floats | None = None, nested: bool = False) -> None:
        self.weight, self.values, self.nested = weight, values, nested

    @classmethod
    def of_floats(cls, values: NDArray[Any], kind: str, transposed: bool) -> Laid:
        """From float32, float16, or bit patterns of bfloat16."""
        wide = (values.astype(np.uint32) << np.uint32(16)).view(np.float32) if kind == "bf16" else values.astype(np.float32)
        return cls(None, np.ascontiguousarray(wide.T if transposed else wide))

    @property
    def rows(self) -> int:
        return int(self._decoded().shape[0]) if self.weight is None else self.weight.packed.shape[0]

    @property
    def columns(self) -> int:
        return int(self._decoded().shape[1]) if self.weight is None else self.weight.columns

    @property
    def nbytes(self) -> int:
        if self.weight is None:
            return self._decoded().nbytes
        offset = 0 if self.weight.offset is None else self.weight.offset.nbytes
        return self.weight.packed.nbytes + self.weight.scale.nbytes + offset

    @property
    def holds_codes(self) -> bool:
        return self.weight is not None

    def _decoded(self) -> Floats:
        if self.values is not None:
            return self.values
        assert self.weight is not None
        return _decoded(self.weight, slice(None))

    def gather(self, rows: NDArray[np.int64], out: Floats) -> None:
        """Write the float32 rows [T, K]."""
        out[:] = self._decoded()[rows]

    def product(self, x: Floats, y: Floats, exact: bool, threads: int) -> None:
        """Write x @ W.T. Exact sums are float64, rounded once, which no order of float32 sums can beat."""
        if exact or self.weight is None:
            y[:] = x.astype(np.float64) @ self._decoded().astype(np.float64).T
        else:
            y[:] = _fast(x, self.weight)

    def restore(self, packed: Bytes, scale: Parameter | None, offset: Parameter | None, threads: int) -> None:
        """Write the stored arrays again; scale and offset only where they are not nested."""
        assert self.weight is not None
        assert (scale is None) == self.nested
        packed[:] = self.weight.packed
        if scale is not None:
            scale[:] = self.weight.scale
        if offset is not None:
            assert self.weight.offset is not None
            offset[:] = self.weight.offset


def _fast(x: Floats, weight: Packed) -> NDArray[np.float64]:
    """Products of int8 activations with codes: whole numbers within a block, float64 from block to block."""
    rows, count = x.shape[0], -(-weight.columns // BLOCK)
    codes, scale = np.zeros((rows, count * BLOCK), dtype=np.int8), np.zeros((rows, count), dtype=np.float32)
    quantize_activations(x, codes, scale)
    stored = np.empty((weight.packed.shape[0], weight.columns), dtype=np.uint8)
    unpack(weight.packed, stored, weight.bits)
    if np.array_equal(weight.levels, weight.levels[0] + np.arange(weight.levels.size)):
        numbers, step = weight.levels[stored].astype(np.int64), np.float32(1)
    else:
        table, step = byte_levels(weight.levels)
        numbers = table[stored]
    offset = np.zeros((1, 1)) if weight.offset is None else _spread(weight.offset, weight, slice(None)).astype(np.float64)
    weight = weight._replace(scale=whole_scales(weight))
    wide_scale = _spread(weight.scale, weight, slice(None)).astype(np.float64)
    levels = numbers * float(step)
    values = levels * wide_scale + offset if weight.shifted else (levels - offset) * wide_scale
    wide = codes.astype(np.float64) * np.repeat(scale.astype(np.float64), BLOCK, axis=1)
    product: NDArray[np.float64] = wide[:, : weight.columns] @ values.T
    return product


def read_bandwidth(size: int, repeats: int) -> float:
    """Bytes per second that numpy's sum reads from a buffer of `size` bytes, the best of `repeats`; one thread."""
    buffer = np.ones(size // 8, dtype=np.uint64)
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        buffer.sum()
        best = max(best, buffer.nbytes / max(time.perf_counter() - start, 1e-9))
    return best
