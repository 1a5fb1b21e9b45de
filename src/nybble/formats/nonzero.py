"""Codes without those of zero: a mask of one bit a weight, and the codes that are left, packed. For weights that were pruned."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble import kernels
from nybble.formats.base import Format, slabs
from nybble.formats.qtensor import QTensor

KEPT, MASK = "kept", "mask"
ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)
"""Bits set in each byte."""


def keep_nonzero(tensor: QTensor) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """(`kept`, `mask`) of a packed weight, as the file has them."""
    fmt = tensor.format
    keep = tensor.codes != zero_code(fmt)
    mask = np.packbits(keep, axis=1, bitorder="little")
    chosen = tensor.codes[keep]
    if fmt.is_cast:
        return chosen.view(fmt.storage((1, 1))["values"][0]), mask
    return kernels.pack(np.ascontiguousarray(chosen[None], np.uint8), fmt.bits)[0], mask


def spread_kept(fmt: Format, shape: tuple[int, int], kept: NDArray[Any], mask: NDArray[Any]) -> NDArray[Any]:
    """The array of `Format.storage` that holds the codes, from `kept` and `mask`. Raises ValueError where they do not fit."""
    rows, columns = shape
    if mask.dtype != np.uint8 or mask.shape != (rows, -(-columns // 8)):
        raise ValueError(f"{MASK} is {mask.dtype} {mask.shape}, {fmt} of shape {shape} needs uint8 {(rows, -(-columns // 8))}")
    if columns % 8 and (mask[:, -1] >> (columns % 8)).any():
        raise ValueError(f"{MASK} keeps columns from {columns} on, which there are not")
    count = int(ONES[mask].sum(dtype=np.int64))
    kind = np.dtype(fmt.storage((1, 1))["values"][0] if fmt.is_cast else np.uint8)
    size = count if fmt.is_cast else kernels.row_bytes(count, fmt.bits)
    if kept.dtype != kind or kept.shape != (size,):
        raise ValueError(f"{KEPT} is {kept.dtype} {kept.shape}, {MASK} keeps {count} weights: it must be {kind} {(size,)}")
    chosen = kept if fmt.is_cast or not count else kernels.unpack(np.ascontiguousarray(kept[None]), count, fmt.bits)[0]
    width = columns if fmt.is_cast else kernels.row_bytes(columns, fmt.bits)
    out = np.empty((rows, width), kind)
    start = 0
    for part in slabs(shape):  # all codes unpacked at once would be the most memory that reading takes
        keep = np.unpackbits(mask[part], axis=1, count=columns, bitorder="little").view(bool)
        codes = np.full(keep.shape, zero_code(fmt), kind)
        stop = start + int(np.count_nonzero(keep))
        codes[keep] = chosen[start:stop]
        out[part] = codes if fmt.is_cast else kernels.pack(codes, fmt.bits)
        start = stop
    return out


def zero_code(fmt: Format) -> int:
    """The code whose level is nearest to zero; of a floating format the pattern of zero."""
    return 0 if fmt.is_cast else int(np.argmin(np.abs(fmt.levels)))
