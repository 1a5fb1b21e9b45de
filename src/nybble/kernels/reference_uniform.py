"""Whole-number codes in plain numpy: what body_uniform.hpp computes, to the bit.

extremes   lowest and highest weight of every block
uniform    code = rint(weight / scale) + zero, cut off at 0 and 2^bits - 1; the quotient in float64, halves to even; where the
           scale is 0 the weight itself takes its place; without zeros the middle, 2^(bits-1)
"""

from __future__ import annotations

import numpy as np

from nybble.kernels.arguments import Bytes, Floats

SLAB = 1 << 21
"""Weights worked on at once."""


def extremes(weight: Floats, block: int, low: Floats, high: Floats) -> None:
    """Write lowest and highest [N, ceil(K / block)]."""
    starts = np.arange(0, weight.shape[1], block)
    np.minimum.reduceat(weight, starts, axis=1, out=low)
    np.maximum.reduceat(weight, starts, axis=1, out=high)


def uniform(weight: Floats, bits: int, block: int, scale: Floats, zero: Floats | None, codes: Bytes) -> None:
    """Write codes [N, K]."""
    columns, top = weight.shape[1], 2**bits - 1
    step = max(1, SLAB // max(1, columns))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        divisor = scale[rows].astype(np.float64)
        divisor[divisor == 0] = 1
        steps = np.rint(weight[rows] / np.repeat(divisor, block, axis=1)[:, :columns])
        steps += 2 ** (bits - 1) if zero is None else np.repeat(zero[rows], block, axis=1)[:, :columns]
        codes[rows] = np.clip(steps, 0, top)
