"""A quantized tensor in another format: the same values where the other format holds them, the nearest ones where it does not.

Two formats of whole numbers often hold the same values under other numbers: int4:g64 (levels -8 to 7) is q4_0 with every
scale written twice, and int3 is int4 with levels to spare. So codes are carried over, never found again from rounded
floats; only where that gives other values is the decoded weight rounded anew, and the better of the two is taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nybble import kernels
from nybble.errors import NumericError
from nybble.formats.base import Codes, Float32, Float64, Format, PackedFormat, slabs, spread
from nybble.formats.qtensor import QTensor

THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Recast:
    """A tensor in another format, and what that cost."""

    tensor: QTensor
    exact: bool
    """It decodes to the same floats, to the bit."""
    error: float
    """Squared error of the new values, as a share of the squares of the old ones."""
    energy: float
    """Those squares; 0 where nothing changed."""


def compare(old: Float32, tensor: QTensor) -> Recast:
    """A tensor that stands for a float32 weight [N, K], and by how much it does not; rows are summed in float32, then float64."""
    error = energy = 0.0
    exact = True
    for rows, decoded in _decoded(tensor):
        decoded -= old[rows]
        exact = exact and not decoded.any()
        error += float(np.einsum("rk,rk->r", decoded, decoded).sum(dtype=np.float64))
        energy += float(np.einsum("rk,rk->r", old[rows], old[rows]).sum(dtype=np.float64))
    return Recast(tensor, True, 0.0, 0.0) if exact else Recast(tensor, False, error / (energy or 1.0), energy)


def _decoded(tensor: QTensor) -> Iterator[tuple[slice, Float32]]:
    """(rows, their float32 values in a new array) in slabs; by the kernels where they know the format."""
    fmt, columns = tensor.format, tensor.shape[1]
    if not isinstance(fmt, PackedFormat):
        for rows in slabs(tensor.shape):
            yield rows, np.array(fmt.decode(tensor.codes[rows], tensor.params))
        return
    scale, offset = fmt.kernel_grid(tensor.params)
    for rows in slabs(tensor.shape):
        packed = kernels.pack(np.ascontiguousarray(tensor.codes[rows], dtype=np.uint8), fmt.bits)
        grid = [each if each is None or len(each) == 1 else each[rows] for each in (scale, offset)]
        assert grid[0] is not None
        yield (
            rows,
            kernels.decode(
                packed, columns, fmt.bits, fmt.levels, fmt.block(columns), grid[0], grid[1], shifted=fmt.shifted, threads=THREADS
            ),
        )


def recast(tensor: QTensor, fmt: Format) -> Recast:
    """A tensor [N, K] in the format `fmt`. Raises NumericError where values do not fit its storage type, UsageError for a
    shape that it cannot hold."""
    fmt.check_columns(tensor.shape[1])
    if fmt == tensor.format:
        return Recast(tensor, True, 0.0, 0.0)
    old = tensor.decode()
    carried = _carried(tensor, fmt)
    first = None if carried is None else compare(old, carried)
    if first is not None and first.exact:
        return first
    try:
        second = compare(old, QTensor(fmt, *fmt.round(old), tensor.activations))
    except NumericError:
        if first is None:
            raise
        return first
    return second if first is None or second.error < first.error else first


def _carried(tensor: QTensor, fmt: Format) -> QTensor | None:
    """The same levels on the same grid in another format; None where the formats have too little in common."""
    source, columns = tensor.format, tensor.shape[1]
    if source.is_cast or fmt.is_cast:
        return None
    block, block_there = source.block(columns), fmt.block(columns)
    scale, offset = source.grid(tensor.params)
    rows, blocks = fmt.blocks(tensor.shape)
    moved = _moved_levels(source.levels, fmt.levels)
    if moved is None or (block % block_there and block < columns) or (rows == 1 and scale.shape[0] > 1):
        return None
    step, codes_there = moved

    def there(values: Float32) -> Float64:
        """Values of the source's blocks [rows, blocks] for those of the other format."""
        wide = np.repeat(values, -(-block // block_there), axis=1)[:, :blocks]
        return np.ascontiguousarray(np.broadcast_to(wide, (rows, blocks)), dtype=np.float64)

    scales = there(scale)
    given = np.zeros_like(scales) if offset is None else there(offset)
    if fmt.shifted:
        offsets = (given if source.shifted else -scales * given) - scales * step
    else:
        if source.shifted and (scales == 0).any():
            return None
        offsets = (-given / scales if source.shifted else given) + step
    if not _has_offset(fmt):
        codes = codes_there[tensor.codes] if not offsets.any() else _without_zeros(tensor, fmt)
        return None if codes is None else QTensor(fmt, codes, fmt.from_grid(scales, None), tensor.activations)
    return QTensor(fmt, codes_there[tensor.codes], fmt.from_grid(scales, offsets), tensor.activations)


def _without_zeros(tensor: QTensor, fmt: Format) -> Codes | None:
    """Codes of a format without offsets whose levels are this one's less its zero points; None where it has not all of them."""
    source, columns = tensor.format, tensor.shape[1]
    offset = source.grid(tensor.params)[1]
    if offset is None or source.shifted:
        return None
    levels = source.levels[tensor.codes] - spread(offset, columns, source.block(columns))
    order = np.argsort(fmt.levels, kind="stable")
    ascending = fmt.levels[order]
    at = np.searchsorted(ascending, levels).clip(max=len(ascending) - 1)
    return order[at].astype(np.uint8) if np.array_equal(ascending[at], levels) else None


def _moved_levels(levels: Float32, other: Float32) -> tuple[int, NDArray[np.uint8]] | None:
    """(d, code there of each code here) such that the other format has every level here plus d; None where none does."""
    for step in dict.fromkeys((0, int(other.min() - levels.min()))):
        order = np.argsort(other, kind="stable")
        at = np.searchsorted(other[order], levels + step).clip(max=len(other) - 1)
        if np.array_equal(other[order][at], levels + step):
            return step, order[at].astype(np.uint8)
    return None


def _has_offset(fmt: Format) -> bool:
    columns = fmt.whole if fmt.whole > 1 else max(1, fmt.block(1))
    return fmt.grid(fmt.fit(np.zeros((1, columns), np.float32)))[1] is not None
