"""The blocks of a GGUF file: how codes and params of ggml's formats lie in bytes. No format knows this, no format is known here.

A row of K weights is K / weights blocks one after another. `split` takes blocks apart into codes (uint8, one a weight, in column
order) and params by name; `join` is its inverse, and every byte pattern survives both. Numbers stay as they are stored: float16
where ggml has a half, and multipliers of less than 8 bits as a little-endian bit stream.

                bytes, in order (d, m, dmin: float16)
    q4_0        d, 16 of nibbles: low ones are columns 0..15, high ones 16..31
    q4_1        d, m, nibbles
    q5_0        d, 4 of fifth bits (bit j: column j), nibbles
    q5_1        d, m, fifth bits, nibbles
    q8_0        d, 32 signed codes
    iq4_nl      as q4_0; codes are places in a table
    mxfp4       exponent, nibbles
    q2_k        16 of (low: multiplier, high: that of the minimum), 64 of codes, d, dmin
    q3_k        32 of third bits, 64 of codes, 12 of multipliers, d
    q4_k        d, dmin, 12 of multipliers, 128 of nibbles
    q5_k        d, dmin, 12 of multipliers, 32 of fifth bits, nibbles
    q6_k        128 of low nibbles, 64 of high pairs of bits, 16 signed multipliers, d
    iq4_xs      d, 2 of the multipliers' high bits, 4 of their low nibbles, 128 of nibbles

Source: ggml's src/ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
Params: TypeAlias = dict[str, NDArray[Any]]
RUN = 256
SLAB_BLOCKS = 1 << 17
"""Blocks of 32 weights that are worked on at once: temporaries stay in the cache's reach, whatever the size of the matrix."""


@dataclass(frozen=True)
class Layout:
    """How one format lies in blocks."""

    weights: int
    """Columns of one block."""
    bytes: int
    params: tuple[tuple[str, str, int], ...]
    """(name, dtype, how many of one block): multipliers packed in bits count bytes."""
    take: Callable[[Bytes, Bytes, Params], None]
    """(blocks [n, bytes], codes [n, weights] and params [n, count] to fill)."""
    put: Callable[[Bytes, Params, Bytes], None]
    """(codes, params, blocks to fill)."""


def split(name: str, blocks: Bytes, columns: int) -> tuple[Bytes, Params]:
    """(codes uint8 [N, columns], params [N, ...]) of rows of blocks, uint8 [N, bytes of a row]."""
    layout = LAYOUTS[name]
    rows, per_row = blocks.shape[0], columns // layout.weights
    flat = blocks.reshape(rows * per_row, layout.bytes)
    codes = np.empty((len(flat), layout.weights), np.uint8)
    params: Params = {suffix: np.empty((len(flat), count), dtype) for suffix, dtype, count in layout.params}
    for part in _slabs(len(flat), layout.weights):
        layout.take(flat[part], codes[part], {suffix: array[part] for suffix, array in params.items()})
    return codes.reshape(rows, columns), {suffix: array.reshape(rows, -1) for suffix, array in params.items()}


def join(name: str, codes: Bytes, params: Params) -> Bytes:
    """uint8 [N, bytes of a row]: the blocks of codes and params as `split` gives them.

    Raises ValueError for params of another name, shape or type."""
    layout = LAYOUTS[name]
    rows, columns = codes.shape
    per_row = columns // layout.weights
    for suffix, dtype, count in layout.params:
        array = params[suffix]
        if array.dtype != np.dtype(dtype) or array.shape != (rows, per_row * count):
            raise ValueError(f"{suffix} of {name} is {array.dtype} {array.shape}, not {dtype} {(rows, per_row * count)}")
    flat = np.ascontiguousarray(codes, np.uint8).reshape(rows * per_row, layout.weights)
    parts = {suffix: np.ascontiguousarray(params[suffix]).reshape(-1, count) for suffix, _, count in layout.params}
    blocks = np.empty((rows * per_row, layout.bytes), np.uint8)
    for part in _slabs(len(flat), layout.weights):
        layout.put(flat[part], {suffix: array[part] for suffix, array in parts.items()}, blocks[part])
    return blocks.reshape(rows, per_row * layout.bytes)


def _slabs(blocks: int, weights: int) -> list[slice]:
    step = max(1, SLAB_BLOCKS * 32 // weights)
    return [slice(start, min(blocks, start + step)) for start in range(0, blocks, step)]


def _halves(blocks: Bytes, at: int) -> NDArray[np.float16]:
    """The float16 [n, 1] that stands at a byte of every block, as a copy."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _put_half(blocks: Bytes, at: int, values: NDArray[Any]) -> None:
    blocks[:, at : at + 2] = np.ascontiguousarray(values).view(np.uint8)


def _take_nibbles(stored: Bytes, codes: Bytes, run: int) -> None:
    """Nibbles [n, w/2] to codes [n, w]: of every `run` columns the low ones come first."""
    pairs = np.ascontiguousarray(stored).reshape(len(stored), -1, run // 2)
    out = codes.reshape(len(codes), -1, 2, run // 2)
    out[:, :, 0] = pairs & 15
    out[:, :, 1] = pairs >> 4


def _put_nibbles(codes: Bytes, stored: Bytes, run: int) -> None:
    pairs = codes.reshape(len(codes), -1, 2, run // 2)
    stored[:] = ((pairs[:, :, 0] & 15) | (pairs[:, :, 1] << 4)).reshape(len(codes), -1)


def _bits(stored: Bytes) -> Bytes:
    """Bits [n, 8b] of bytes [n, b], the lowest first."""
    return np.unpackbits(stored, axis=1, bitorder="little")


def _pack_bits(bits: NDArray[Any]) -> Bytes:
    return np.packbits(bits, axis=1, bitorder="little")


# --- blocks of 32


def _take_small(mins: bool, fifth: bool) -> Callable[[Bytes, Bytes, Params], None]:
    def take(blocks: Bytes, codes: Bytes, params: Params) -> None:
        params["scale"][:] = _halves(blocks, 0)
        at = 2
        if mins:
            params["shift"][:] = _halves(blocks, 2)
            at = 4
        if fifth:
            _take_nibbles(blocks[:, at + 4 :], codes, 32)
            codes |= _bits(np.ascontiguousarray(blocks[:, at : at + 4])) << 4
        else:
            _take_nibbles(blocks[:, at:], codes, 32)

    return take


def _put_small(mins: bool, fifth: bool) -> Callable[[Bytes, Params, Bytes], None]:
    def put(codes: Bytes, params: Params, blocks: Bytes) -> None:
        _put_half(blocks, 0, params["scale"])
        at = 2
        if mins:
            _put_half(blocks, 2, params["shift"])
            at = 4
        if fifth:
            blocks[:, at : at + 4] = _pack_bits(codes >> 4)
            at += 4
        _put_nibbles(codes, blocks[:, at:], 32)

    return put


def _take_q8_0(blocks: Bytes, codes: Bytes, params: Params) -> None:
    params["scale"][:] = _halves(blocks, 0)
    np.bitwise_xor(blocks[:, 2:], np.uint8(128), out=codes)  # code = signed value + 128


def _put_q8_0(codes: Bytes, params: Params, blocks: Bytes) -> None:
    _put_half(blocks, 0, params["scale"])
    np.bitwise_xor(codes, np.uint8(128), out=blocks[:, 2:])


def _take_mxfp4(blocks: Bytes, codes: Bytes, params: Params) -> None:
    params["exponent"][:] = blocks[:, :1]
    _take_nibbles(blocks[:, 1:], codes, 32)


def _put_mxfp4(codes: Bytes, params: Params, blocks: Bytes) -> None:
    blocks[:, :1] = params["exponent"]
    _put_nibbles(codes, blocks[:, 1:], 32)


# --- runs of 256: multipliers


def _pack_six(values: Bytes) -> Bytes:
    """Values below 64, [n, 4c], as a bit stream [n, 3c]."""
    four = values.reshape(len(values), -1, 4)
    out = np.empty((*four.shape[:2], 3), np.uint8)
    out[..., 0] = four[..., 0] | four[..., 1] << 6
    out[..., 1] = four[..., 1] >> 2 | four[..., 2] << 4
    out[..., 2] = four[..., 2] >> 4 | four[..., 3] << 2
    return out.reshape(len(values), -1)


def _unpack_six(packed: Bytes) -> Bytes:
    three = packed.reshape(len(packed), -1, 3)
    out = np.empty((*three.shape[:2], 4), np.uint8)
    out[..., 0] = three[..., 0] & 63
    out[..., 1] = three[..., 0] >> 6 | (three[..., 1] & 15) << 2
    out[..., 2] = three[..., 1] >> 4 | (three[..., 2] & 3) << 4
    out[..., 3] = three[..., 2] >> 2
    return out.reshape(len(packed), -1)


def _take_pairs(stored: Bytes, params: Params) -> None:
    """q4_k's and q5_k's 12 bytes: 8 multipliers and 8 of minima. Bytes 0..3 and 4..7 hold the first four of each in 6 bits
    and, above, the top bits of the last four; bytes 8..11 their low nibbles."""
    first, second, third = stored[:, 0:4], stored[:, 4:8], stored[:, 8:12]
    params["scale"][:] = _pack_six(np.concatenate((first & 63, (third & 15) | (first >> 6) << 4), axis=1))
    params["min"][:] = _pack_six(np.concatenate((second & 63, third >> 4 | (second >> 6) << 4), axis=1))


def _put_pairs(params: Params, stored: Bytes) -> None:
    scale, low = _unpack_six(params["scale"]), _unpack_six(params["min"])
    stored[:, 0:4] = scale[:, :4] | scale[:, 4:] >> 4 << 6
    stored[:, 4:8] = low[:, :4] | low[:, 4:] >> 4 << 6
    stored[:, 8:12] = (scale[:, 4:] & 15) | low[:, 4:] << 4


# --- runs of 256: codes


def _take_crumbs(stored: Bytes, out: Bytes) -> None:
    """Pairs of bits [n, 64] to [n, 256]: of every 128 columns 32 a shift, the lowest first."""
    quarters = np.ascontiguousarray(stored).reshape(-1, 2, 32)
    columns = out.reshape(-1, 2, 4, 32)
    for shift in range(4):
        columns[:, :, shift] = (quarters >> (2 * shift)) & 3


def _crumbs(values: NDArray[Any]) -> NDArray[Any]:
    """[n, 64]: inverse of `_take_crumbs`, for values below 4."""
    columns = values.reshape(-1, 2, 4, 32)
    packed = columns[:, :, 0] | columns[:, :, 1] << 2 | columns[:, :, 2] << 4 | columns[:, :, 3] << 6
    return packed.reshape(len(values), 64)


def _planes(stored: Bytes, out: Bytes, place: int) -> None:
    """Add bit b of byte l to column 32 b + l of `out`, as its bit `place`."""
    columns = out.reshape(-1, 8, 32)
    for bit in range(8):
        columns[:, bit] |= (stored >> bit & 1) << place


def _pack_planes(codes: Bytes, place: int) -> Bytes:
    """[n, 32]: inverse of `_planes`."""
    columns = codes.reshape(-1, 8, 32)
    out = np.zeros((len(codes), 32), np.uint8)
    for bit in range(8):
        out |= (columns[:, bit] >> place & 1) << bit
    return out


def _take_q2_k(blocks: Bytes, codes: Bytes, params: Params) -> None:
    both = np.ascontiguousarray(blocks[:, :16])
    params["scale"][:] = (both[:, 0::2] & 15) | both[:, 1::2] << 4
    params["min"][:] = both[:, 0::2] >> 4 | (both[:, 1::2] & 240)
    _take_crumbs(blocks[:, 16:80], codes)
    params["d"][:], params["dmin"][:] = _halves(blocks, 80), _halves(blocks, 82)


def _put_q2_k(codes: Bytes, params: Params, blocks: Bytes) -> None:
    scale, low = params["scale"], params["min"]
    blocks[:, 0:16:2] = (scale & 15) | low << 4
    blocks[:, 1:16:2] = scale >> 4 | (low & 240)
    blocks[:, 16:80] = _crumbs(codes)
    _put_half(blocks, 80, params["d"])
    _put_half(blocks, 82, params["dmin"])


def _take_q3_k(blocks: Bytes, codes: Bytes, params: Params) -> None:
    _take_crumbs(blocks[:, 32:96], codes)
    _planes(np.ascontiguousarray(blocks[:, :32]), codes, 2)
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    values = np.concatenate((low & 15, low >> 4), axis=1).reshape(-1, 4, 4)
    for quarter in range(4):
        values[:, quarter] |= (high >> (2 * quarter) & 3) << 4
    params["scale"][:] = _pack_six(values.reshape(-1, 16))
    params["d"][:] = _halves(blocks, 108)


def _put_q3_k(codes: Bytes, params: Params, blocks: Bytes) -> None:
    blocks[:, :32] = _pack_planes(codes, 2)
    blocks[:, 32:96] = _crumbs(codes & 3)
    values = _unpack_six(params["scale"])
    blocks[:, 96:104] = (values[:, :8] & 15) | values[:, 8:] << 4
    high = (values >> 4).reshape(-1, 4, 4)
    blocks[:, 104:108] = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    _put_half(blocks, 108, params["d"])


def _take_q4_k(blocks: Bytes, codes: Bytes, params: Params) -> None:
    params["d"][:], params["dmin"][:] = _halves(blocks, 0), _halves(blocks, 2)
    _take_pairs(blocks[:, 4:16], params)
    _take_nibbles(blocks[:, 16:144], codes, 64)


def _put_q4_k(codes: Bytes, params: Params, blocks: Bytes) -> None:
    _put_half(blocks, 0, params["d"])
    _put_half(blocks, 2, params["dmin"])
    _put_pairs(params, blocks[:, 4:16])
    _put_nibbles(codes, blocks[:, 16:144], 64)


def _take_q5_k(blocks: Bytes, codes: Bytes, params: Params) -> None:
    params["d"][:], params["dmin"][:] = _halves(blocks, 0), _halves(blocks, 2)
    _take_pairs(blocks[:, 4:16], params)
    _take_nibbles(blocks[:, 48:176], codes, 64)
    _planes(np.ascontiguousarray(blocks[:, 16:48]), codes, 4)


def _put_q5_k(codes: Bytes, params: Params, blocks: Bytes) -> None:
    _put_half(blocks, 0, params["d"])
    _put_half(blocks, 2, params["dmin"])
    _put_pairs(params, blocks[:, 4:16])
    blocks[:, 16:48] = _pack_planes(codes, 4)
    _put_nibbles(codes, blocks[:, 48:176], 64)


def _take_q6_k(blocks: Bytes, codes: Bytes, params: Params) -> None:
    _take_crumbs(blocks[:, 128:192], codes)
    codes <<= 4
    low = np.ascontiguousarray(blocks[:, :128]).reshape(-1, 2, 64)  # of every 128 columns: 64 low nibbles, 64 high ones
    columns = codes.reshape(-1, 2, 2, 64)
    columns[:, :, 0] |= low & 15
    columns[:, :, 1] |= low >> 4
    params["scale"][:] = blocks[:, 192:208].view(np.int8)
    params["d"][:] = _halves(blocks, 208)


def _put_q6_k(codes: Bytes, params: Params, blocks: Bytes) -> None:
    columns = codes.reshape(-1, 2, 2, 64)
    blocks[:, :128] = ((columns[:, :, 0] & 15) | columns[:, :, 1] << 4).reshape(-1, 128)
    blocks[:, 128:192] = _crumbs(np.right_shift(codes, 4))
    blocks[:, 192:208] = params["scale"].view(np.uint8)
    _put_half(blocks, 208, params["d"])


def _take_iq4_xs(blocks: Bytes, codes: Bytes, params: Params) -> None:
    params["d"][:] = _halves(blocks, 0)
    low, high = blocks[:, 4:8], blocks[:, 2:4]
    values = np.empty((len(blocks), 8), np.uint8)
    values[:, 0::2], values[:, 1::2] = low & 15, low >> 4
    for place in range(4):
        values[:, place::4] |= (high >> (2 * place) & 3) << 4
    params["scale"][:] = _pack_six(values)
    _take_nibbles(blocks[:, 8:136], codes, 32)


def _put_iq4_xs(codes: Bytes, params: Params, blocks: Bytes) -> None:
    _put_half(blocks, 0, params["d"])
    values = _unpack_six(params["scale"])
    high = values >> 4
    blocks[:, 2:4] = high[:, 0::4] | high[:, 1::4] << 2 | high[:, 2::4] << 4 | high[:, 3::4] << 6
    blocks[:, 4:8] = (values[:, 0::2] & 15) | values[:, 1::2] << 4
    _put_nibbles(codes, blocks[:, 8:136], 32)


def _small(bytes_: int, mins: bool, fifth: bool) -> Layout:
    names = ("scale", "shift") if mins else ("scale",)
    params = tuple((name, "float16", 1) for name in names)
    return Layout(32, bytes_, params, _take_small(mins, fifth), _put_small(mins, fifth))


D = ("d", "float16", 1)
PAIR = (D, ("dmin", "float16", 1))
LAYOUTS: dict[str, Layout] = {
    "q4_0": _small(18, False, False),
    "q4_1": _small(20, True, False),
    "q5_0": _small(22, False, True),
    "q5_1": _small(24, True, True),
    "q8_0": Layout(32, 34, (("scale", "float16", 1),), _take_q8_0, _put_q8_0),
    "iq4_nl": _small(18, False, False),
    "mxfp4": Layout(32, 17, (("exponent", "uint8", 1),), _take_mxfp4, _put_mxfp4),
    "q2_k": Layout(RUN, 84, (*PAIR, ("scale", "uint8", 8), ("min", "uint8", 8)), _take_q2_k, _put_q2_k),
    "q3_k": Layout(RUN, 110, (D, ("scale", "uint8", 12)), _take_q3_k, _put_q3_k),
    "q4_k": Layout(RUN, 144, (*PAIR, ("scale", "uint8", 6), ("min", "uint8", 6)), _take_q4_k, _put_q4_k),
    "q5_k": Layout(RUN, 176, (*PAIR, ("scale", "uint8", 6), ("min", "uint8", 6)), _take_q5_k, _put_q5_k),
    "q6_k": Layout(RUN, 210, (D, ("scale", "int8", 16)), _take_q6_k, _put_q6_k),
    "iq4_xs": Layout(RUN, 136, (D, ("scale", "uint8", 6)), _take_iq4_xs, _put_iq4_xs),
}
"""By the name of the format."""
