"""Plain rounding of blocks as ggml does it, in plain numpy: what body_round.hpp computes, to the bit.

    range   scale = (highest - lowest) / (2^bits - 1), shift = lowest    code = floor((x - shift) * (1 / scale) + 1/2)
    ends    scale = the weight of largest magnitude / -2^(bits-1)        code = floor(x * (1 / scale) + 2^(bits-1) + 1/2)
    away    scale = largest magnitude / (2^(bits-1) - 1)                 code = round(x * (1 / scale)) + 2^(bits-1)

q4_1 and q5_1 go by `range`, q4_0 and q5_0 by `ends`, q8_0 by `away`. Codes are cut off at 2^bits - 1; `round` takes halves away
from zero. Of equal weights the first counts (the largest may have both signs, and zeros too), but zeros alone are 0. Every
step is rounded to float32 by itself, nothing is fused. Codes are chosen by the scale before it is stored in fewer bits. Where
1 / scale is beyond all floats the sum is no finite number, and becomes 0; it is 0 itself where the scale is 0.
Source: ggml's ggml-quants.c, the reference functions quantize_row_*_ref.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nybble.kernels.arguments import Bytes, Floats

HALF = np.float32(0.5)
SLAB = 1 << 21
"""Weights worked on at once."""


def round_blocks(weight: Floats, bits: int, block: int, rule: str, codes: Bytes, scale: Floats, shift: Floats) -> None:
    """Write codes [N, K], and scale and shift [N, K / block] as they are before they are stored."""
    rows, columns = weight.shape
    step = max(1, SLAB // max(1, columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        view = weight[part].reshape(-1, columns // block, block)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            found, scale[part], shift[part] = _slab(view, bits, rule)
        codes[part] = found.reshape(-1, columns)


def _slab(view: Floats, bits: int, rule: str) -> tuple[Floats, Floats, Floats]:
    top, half = np.float32(2**bits - 1), np.float32(2 ** (bits - 1))
    shift = np.zeros(view.shape[:2], np.float32)
    if rule == "range":
        shift = _at(view, view.argmin(-1))
        scale = (_at(view, view.argmax(-1)) - shift) / top
        steps = (view - shift[..., None]) * _inverse(scale)[..., None] + HALF
    elif rule == "ends":
        scale = (_at(view, np.abs(view).argmax(-1)) + np.float32(0)) / -half
        steps = view * _inverse(scale)[..., None] + (half + HALF)
    else:
        scale = np.abs(view).max(-1) / (half - np.float32(1))
        steps = view * _inverse(scale)[..., None]
        steps = np.where(np.isfinite(steps), steps, np.float32(0))
        whole = np.trunc(steps)
        whole += np.where(np.abs(steps - whole) >= HALF, np.copysign(np.float32(1), steps), np.float32(0))
        return whole + half, scale, shift
    steps = np.where(np.isfinite(steps), steps, np.float32(0))
    return np.minimum(np.trunc(steps), top), scale, shift


def _at(view: Floats, place: NDArray[np.intp]) -> Floats:
    return np.take_along_axis(view, place[..., None], -1)[..., 0]


def _inverse(scale: Floats) -> Floats:
    return np.where(scale == 0, np.float32(0), np.float32(1) / np.where(scale == 0, np.float32(1), scale))
