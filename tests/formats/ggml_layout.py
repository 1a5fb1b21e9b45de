"""How ggml lays out its blocks, both ways, written for the tests from the layouts alone: a second opinion beside files/.

`unpack` takes bytes uint8 [N, blocks, bytes of a block] apart into (codes, params) as nybble's formats have them, `pack` puts
them together again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble import kernels

Bytes = NDArray[np.uint8]
SIZES = {
    "q4_0": (2, 32, 18), "q4_1": (3, 32, 20), "q5_0": (6, 32, 22), "q5_1": (7, 32, 24), "q8_0": (8, 32, 34),
    "q2_k": (10, 256, 84), "q3_k": (11, 256, 110), "q4_k": (12, 256, 144), "q5_k": (13, 256, 176), "q6_k": (14, 256, 210),
    "iq4_nl": (20, 32, 18), "iq4_xs": (23, 256, 136), "mxfp4": (39, 32, 17),
}  # fmt: skip
"""Name -> (number of the type, columns of a block, bytes of a block)."""


def bits_of(data: Bytes) -> Bytes:
    """[..., B] -> [..., B, 8], least significant first."""
    return np.unpackbits(data[..., None], axis=-1, bitorder="little")


def whole(bits: Bytes) -> NDArray[np.int64]:
    """[..., bits] -> [...], least significant first."""
    return (bits.astype(np.int64) << np.arange(bits.shape[-1])).sum(-1)


def nibbles(data: Bytes, run: int) -> Bytes:
    """Low nibbles of `run` bytes, then their high ones."""
    parts = data.reshape(*data.shape[:-1], -1, 1, run)
    return np.concatenate([parts & 15, parts >> 4], axis=-2).reshape(*data.shape[:-1], -1)


def from_nibbles(codes: Bytes, run: int) -> Bytes:
    parts = codes.reshape(*codes.shape[:-1], -1, 2, run)
    return (parts[..., 0, :] | parts[..., 1, :] << 4).reshape(*codes.shape[:-1], -1)


def half(data: Bytes) -> NDArray[np.float16]:
    return np.ascontiguousarray(data).view("<f2")[..., 0].astype(np.float16)


def two_bits(data: Bytes, start: int) -> Bytes:
    """64 bytes of 2-bit codes: [.., 2 halves, 32] -> columns [.., half, shift, 32]."""
    parts = data[..., start : start + 64].reshape(*data.shape[:-1], 2, 1, 32)
    return (parts >> (2 * np.arange(4, dtype=np.uint8))[:, None] & 3).reshape(*data.shape[:-1], 256)


def six_bit_pairs(data: Bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(scales, mins) of the 12 bytes of q4_k and q5_k, [.., 8] each."""
    b = bits_of(data)
    first, second, third = b[..., 0:4, :], b[..., 4:8, :], b[..., 8:12, :]
    scales = [whole(first[..., :6]), whole(np.concatenate([third[..., :4], first[..., 6:]], -1))]
    mins = [whole(second[..., :6]), whole(np.concatenate([third[..., 4:], second[..., 6:]], -1))]
    return np.concatenate(scales, -1), np.concatenate(mins, -1)


def stored(values: NDArray[Any], bits: int) -> Bytes:
    return kernels.pack(np.ascontiguousarray(values.reshape(values.shape[0], -1), np.uint8), bits)


def unpack(name: str, data: Bytes) -> tuple[Bytes, dict[str, NDArray[Any]]]:
    rows = data.shape[0]
    p: dict[str, NDArray[Any]] = {}
    if name in ("q4_0", "iq4_nl"):
        p["scale"], codes = half(data[..., :2]), nibbles(data[..., 2:], 16)
    elif name == "mxfp4":
        p["exponent"], codes = data[..., 0], nibbles(data[..., 1:], 16)
    elif name == "q8_0":
        p["scale"], codes = half(data[..., :2]), data[..., 2:] ^ 128
    elif name in ("q4_1", "q5_1", "q5_0"):
        p["scale"], at = half(data[..., :2]), 2
        if name != "q5_0":
            p["shift"], at = half(data[..., 2:4]), 4
        codes = nibbles(data[..., -16:], 16)
        if name != "q4_1":
            codes = codes | bits_of(data[..., at : at + 4]).reshape(*data.shape[:-1], 32) << 4
    elif name == "q2_k":
        p["d"], p["dmin"] = half(data[..., 80:82]), half(data[..., 82:84])
        p["scale"], p["min"] = stored(data[..., :16] & 15, 4), stored(data[..., :16] >> 4, 4)
        codes = two_bits(data, 16)
    elif name == "q3_k":
        p["d"], scales = half(data[..., 108:]), data[..., 96:108]
        low = nibbles(scales[..., :8], 8)
        high = (scales[..., None, 8:] >> (2 * np.arange(4, dtype=np.uint8))[:, None] & 3).reshape(*data.shape[:-1], 16)
        p["scale"] = stored(low | high << 4, 6)
        top = np.swapaxes(bits_of(data[..., :32]), -1, -2).reshape(*data.shape[:-1], 256)
        codes = two_bits(data, 32) | top << 2
    elif name in ("q4_k", "q5_k"):
        p["d"], p["dmin"] = half(data[..., :2]), half(data[..., 2:4])
        p["scale"], p["min"] = (stored(values, 6) for values in six_bit_pairs(data[..., 4:16]))
        codes = nibbles(data[..., -128:], 32)
        if name == "q5_k":
            codes = codes | np.swapaxes(bits_of(data[..., 16:48]), -1, -2).reshape(*data.shape[:-1], 256) << 4
    elif name == "q6_k":
        p["d"], p["scale"] = half(data[..., 208:]), data[..., 192:208].view(np.int8).reshape(rows, -1)
        codes = nibbles(data[..., :128], 64) | two_bits(data, 128) << 4
    else:
        p["d"] = half(data[..., :2])
        low = nibbles(data[..., 4:8, None], 1).reshape(*data.shape[:-1], 8)
        high = bits_of(data[..., 2:4]).reshape(*data.shape[:-1], 8, 2)
        p["scale"] = stored(low | whole(high).astype(np.uint8) << 4, 6)
        codes = nibbles(data[..., 8:], 16)
    return codes.reshape(rows, -1), p


def from_two_bits(codes: Bytes) -> Bytes:
    parts = codes.reshape(*codes.shape[:-1], 2, 4, 32)
    return np.bitwise_or.reduce(parts << (2 * np.arange(4, dtype=np.uint8))[:, None], axis=-2).reshape(*codes.shape[:-1], 64)


def from_bits(bits: Bytes) -> Bytes:
    return np.packbits(bits, axis=-1, bitorder="little")


def pack(name: str, codes: Bytes, params: dict[str, NDArray[Any]]) -> Bytes:
    _, columns, size = SIZES[name]
    blocks = codes.shape[1] // columns
    c = codes.reshape(codes.shape[0], blocks, columns)

    def halves(key: str) -> Bytes:
        return np.ascontiguousarray(params[key].astype("<f2")).view(np.uint8).reshape(*c.shape[:2], 2)

    def numbers(key: str, bits: int) -> Bytes:
        per = {"q2_k": 16, "q3_k": 16}.get(name, 8)
        return kernels.unpack(np.ascontiguousarray(params[key]), blocks * per, bits).reshape(*c.shape[:2], per)

    if name in ("q4_0", "iq4_nl"):
        parts = [halves("scale"), from_nibbles(c, 16)]
    elif name == "mxfp4":
        parts = [params["exponent"][..., None], from_nibbles(c, 16)]
    elif name == "q8_0":
        parts = [halves("scale"), c ^ 128]
    elif name in ("q4_1", "q5_1", "q5_0"):
        parts = [halves("scale")] + ([] if name == "q5_0" else [halves("shift")])
        parts += [] if name == "q4_1" else [from_bits(c >> 4)]
        parts += [from_nibbles(c & 15, 16)]
    elif name == "q2_k":
        parts = [numbers("scale", 4) | numbers("min", 4) << 4, from_two_bits(c), halves("d"), halves("dmin")]
    elif name == "q3_k":
        scale = numbers("scale", 6)
        high = np.bitwise_or.reduce(
            (scale >> 4).reshape(*c.shape[:2], 4, 4) << (2 * np.arange(4, dtype=np.uint8))[:, None], axis=-2
        )
        top = from_bits(np.swapaxes((c >> 2).reshape(*c.shape[:2], 8, 32), -1, -2)).reshape(*c.shape[:2], 32)
        parts = [top, from_two_bits(c & 3), from_nibbles(scale & 15, 8), high, halves("d")]
    elif name in ("q4_k", "q5_k"):
        scale, low = numbers("scale", 6), numbers("min", 6)
        parts = [halves("d"), halves("dmin"), scale[..., :4] | scale[..., 4:] >> 4 << 6, low[..., :4] | low[..., 4:] >> 4 << 6]
        parts += [scale[..., 4:] & 15 | low[..., 4:] << 4]
        if name == "q5_k":
            parts += [from_bits(np.swapaxes((c >> 4).reshape(*c.shape[:2], 8, 32), -1, -2)).reshape(*c.shape[:2], 32)]
        parts += [from_nibbles(c & 15, 32)]
    elif name == "q6_k":
        scale = params["scale"].view(np.uint8).reshape(*c.shape[:2], 16)
        parts = [from_nibbles(c & 15, 64), from_two_bits(c >> 4), scale, halves("d")]
    else:
        scale = numbers("scale", 6)
        high = from_bits(((scale >> 4)[..., None] >> np.arange(2, dtype=np.uint8) & 1).reshape(*c.shape[:2], 16))
        low = scale[..., 0::2] & 15 | scale[..., 1::2] << 4
        parts = [halves("d"), high, low, from_nibbles(c, 16)]
    out = np.concatenate([part.astype(np.uint8) for part in parts], axis=-1)
    assert out.shape[-1] == size
    return out
