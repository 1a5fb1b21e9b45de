"""ggml's formats with blocks of 32 of their own: q4_0 q4_1 q5_0 q5_1 q8_0 iq4_nl mxfp4, as llama.cpp reads and writes them.

    q4_0 q5_0 q8_0    value = scale * (code - 2^(bits-1))       scale float16
    q4_1 q5_1         value = scale * code + shift              scale and shift float16 (ggml's d and m)
    iq4_nl            value = scale * table[code]               scale float16, a table of 16 whole numbers
    mxfp4             value = 2^(exponent-128) * table[code]    exponent uint8 (ggml's E8M0, halved), FP4's table doubled

Layouts: ggml's headers, src/ggml-common.h and ggml-quants.c; how nibbles lie in a block is the business of the file.

`round` without importance is ggml's own rounding to the bit, codes and params, of q4_0 q4_1 q5_0 q5_1 q8_0 mxfp4: codes are
chosen by the scale before it is rounded to float16, halves go up (away from zero in q8_0), and every step is rounded to
float32 by itself. A build of ggml whose compiler fuses the product with the addition may give another code in one weight of
a million; ggml's own library has the plain steps on x86, whatever machine it is built for, since only its CPU backend is
compiled for that. The scale of q4_0 and q5_0 is the weight of largest magnitude over -8 or -16, so that one of the two ends
is short by a step. `encode` on given params rounds to nearest: halves to even, in tables to the level nearer to zero or lower.

Bounds, in units of the scale d: q4_0 1 + 8/2048, q5_0 1 + 16/2048, q8_0 0.562, q4_1 and q5_1 1/2 + L/2048 + |shift|/2048 d
with L = 15, 31.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from nybble.errors import NumericError, UsageError
from nybble.formats.base import (
    Codes,
    Float32,
    Float64,
    Granularity,
    PackedFormat,
    Params,
    blocked,
    check_finite,
    nearest_stored,
    slabs,
    spread,
)
from nybble.formats.search import blocked_importance, search_scale
from nybble.formats.spec import check_options

BLOCK = 32
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Levels of iq4_nl and iq4_xs."""
MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Levels of mxfp4: twice those of FP4 (E2M1)."""
BITS = {"q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5, "q8_0": 8, "iq4_nl": 4, "mxfp4": 4}
EXPONENT_OF_ONE = 128
"""The exponent that stands for 1."""
LARGEST_EXPONENT = 252
"""Beyond it the largest level would not be a float32."""
HALF = np.float32(0.5)


def half(values: NDArray[np.floating], what: str) -> NDArray[np.float16]:
    """Values [N, blocks] rounded to nearest float16. Raises NumericError where one overflows."""
    with np.errstate(over="ignore"):
        stored = values.astype(np.float16)
    bad = ~np.isfinite(stored)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise NumericError(
            f"{what} {float(values[at]):.3g} of block {at} exceeds 65504, the largest float16; keep this tensor in float"
        )
    return stored


@dataclass(frozen=True)
class GgmlBlocks(PackedFormat):
    """One of the formats above. Storage: codes and `scale`, `shift` or `exponent`, all [N, K/32]."""

    name: str
    granularity: Granularity = BLOCK
    whole: int = BLOCK

    @property
    def bits(self) -> int:  # type: ignore[override]  # follows from the name
        return BITS[self.name]

    @property
    def is_integer(self) -> bool:  # type: ignore[override]
        return self.name.startswith("q")

    @property
    def shifted(self) -> bool:  # type: ignore[override]
        return self.name in ("q4_1", "q5_1")

    @property
    def levels(self) -> Float32:
        if self.name in ("iq4_nl", "mxfp4"):
            return np.array(IQ4 if self.name == "iq4_nl" else MXFP4, dtype=np.float32)
        return np.arange(2**self.bits, dtype=np.float32) - np.float32(0 if self.shifted else 2 ** (self.bits - 1))

    def fallback(self, columns: int) -> str | None:
        return "fp16" if columns % BLOCK else None

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        self.check_columns(weight.shape[1])
        check_finite(weight)
        plain = self._plain(weight)
        if importance is None:
            return plain
        view, weights = blocked(weight, BLOCK), blocked_importance(importance, weight.shape, BLOCK)
        if self.name == "mxfp4" or self.shifted:
            return plain
        return {"scale": search_scale(view, weights, self._snap, 8.0, plain["scale"], both_signs=True)}

    def _snap(self, ratio: Float32) -> Float32:
        return self.levels[self._nearest(ratio)]

    @np.errstate(over="ignore", invalid="ignore")  # what overflows is found when it is stored
    def _plain(self, weight: Float32) -> Params:
        """ggml's own params."""
        view = blocked(weight, BLOCK)
        if self.name == "mxfp4":
            return {"exponent": _exponent(np.abs(view).max(-1))}
        if self.shifted:
            low = view.min(-1)
            steps = np.float32(2**self.bits - 1)
            return {"scale": half((view.max(-1) - low) / steps, "scale"), "shift": half(low, "shift")}
        return {"scale": half(self._wide_scale(view), "scale")}

    def _wide_scale(self, view: Float32) -> Float32:
        """Scales without shift before they are stored, float32 [N, blocks]."""
        if self.name == "q8_0":
            return np.abs(view).max(-1) / np.float32(127)
        largest = np.take_along_axis(view, np.abs(view).argmax(-1)[..., None], -1)[..., 0]
        return largest / np.float32(-127 if self.name == "iq4_nl" else -(2 ** (self.bits - 1)))

    def round(self, weight: Float32, importance: Float32 | None = None) -> tuple[Codes, Params]:
        params = self.fit(weight, importance)
        if importance is not None or self.name in ("iq4_nl", "mxfp4"):
            return self.encode(weight, params), params
        codes = np.empty(weight.shape, np.uint8)
        for rows in slabs(weight.shape):
            codes[rows] = self._round_blocks(blocked(weight[rows], BLOCK)).reshape(-1, weight.shape[1])
        return codes, params

    @np.errstate(over="ignore", invalid="ignore", divide="ignore")
    def _round_blocks(self, view: Float32) -> NDArray[np.uint8]:
        """ggml's codes of blocks [N, blocks, 32]: by the scale before it is stored."""
        top = 2**self.bits - 1
        if self.shifted:
            low = view.min(-1)
            steps = (view - low[..., None]) * _inverse((view.max(-1) - low) / np.float32(top))[..., None] + HALF
        else:
            steps = view * _inverse(self._wide_scale(view))[..., None]
            if self.name == "q8_0":  # halves away from zero
                whole = np.trunc(steps)
                whole += np.where(np.abs(steps - whole) >= HALF, np.copysign(np.float32(1), steps), np.float32(0))
                return (np.where(np.isfinite(whole), whole, 0).astype(np.int16) + 128).astype(np.uint8)
            steps += np.float32(2 ** (self.bits - 1) + 0.5)
        # The inverse of a scale below 2^-128 is infinite, and so are the steps: what a float beyond all integers becomes.
        return np.minimum(np.where(np.isfinite(steps), steps, 0).astype(np.uint8), top)

    def grid(self, params: Params) -> tuple[Float32, Float32 | None]:
        if self.name == "mxfp4":
            return np.ldexp(np.float32(1), params["exponent"].astype(np.int32) - EXPONENT_OF_ONE), None
        return params["scale"].astype(np.float32), params["shift"].astype(np.float32) if self.shifted else None

    def kernel_grid(self, params: Params) -> tuple[NDArray[np.floating], NDArray[np.floating] | None]:
        if self.name == "mxfp4":
            return self.grid(params)
        return (
            np.require(params["scale"], requirements=["C", "A"]),
            np.require(params["shift"], requirements=["C", "A"]) if self.shifted else None,
        )

    def from_grid(self, scale: Float64, offset: Float64 | None) -> Params:
        if self.name == "mxfp4":
            fraction, exponent = np.frexp(np.maximum(scale, 2.0**-EXPONENT_OF_ONE))
            nearest = exponent - (fraction < 0.75) + EXPONENT_OF_ONE
            return {"exponent": np.clip(nearest, 0, LARGEST_EXPONENT).astype(np.uint8)}
        params: Params = {"scale": nearest_stored(scale, "float16")}
        if self.shifted:
            params["shift"] = nearest_stored(np.zeros_like(scale) if offset is None else offset, "float16")
        return params

    def encode(self, weight: Float32, params: Params) -> Codes:
        check_finite(weight)
        scale, offset = self.grid(params)
        columns = weight.shape[1]
        codes = np.empty(weight.shape, np.uint8)
        for rows in slabs(weight.shape):
            codes[rows] = self._nearest(
                ratios(
                    weight[rows],
                    spread(scale[rows], columns, BLOCK),
                    offset if offset is None else spread(offset[rows], columns, BLOCK),
                )
            )
        return codes

    def _nearest(self, ratio: Float32) -> NDArray[np.uint8]:
        return nearest_code(self.name if not self.is_integer else f"whole {self.levels[0]:g} {self.bits}", ratio)

    def param_storage(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        self.check_columns(shape[1])
        blocks = self.blocks(shape)
        if self.name == "mxfp4":
            return {"exponent": ("uint8", blocks)}
        names = ("scale", "shift") if self.shifted else ("scale",)
        return {name: ("float16", blocks) for name in names}

    def max_error(self, params: Params) -> Float64:
        scale, offset = (None if values is None else np.abs(values.astype(np.float64)) for values in self.grid(params))
        assert scale is not None
        tiny = 2.0**-24  # half the smallest float16 and more: scales that vanish
        if self.name == "mxfp4":
            return scale * 4
        if offset is not None:
            steps = 2**self.bits - 1
            return scale * (0.5 + steps * 2.0**-11) + offset * 2.0**-11 + steps * tiny
        if self.name == "q8_0":
            return scale * 0.562 + 127 * tiny
        steps = 127 if self.name == "iq4_nl" else 2 ** (self.bits - 1)
        return scale * ((14 if self.name == "iq4_nl" else 1) + steps * 2.0**-11) + steps * tiny

    def __str__(self) -> str:
        return self.name


def _inverse(scale: Float32) -> Float32:
    return np.where(scale == 0, np.float32(0), np.float32(1) / np.where(scale == 0, np.float32(1), scale))


def _exponent(largest: Float32) -> NDArray[np.uint8]:
    """ggml's exponents of blocks by their largest magnitude. Below 2^-124 they wrap around and the block becomes zeros."""
    wide = np.log2(np.where(largest == 0, 1, largest).astype(np.float64)).astype(np.float32)
    return np.where(largest == 0, 0, np.floor(wide).astype(np.int64) + 125).astype(np.uint8)


def ratios(weight: Float32, scale: Float32, offset: Float32 | None) -> Float32:
    """(weight - offset) / scale in float32, every step rounded; where the scale is 0 the quotient is 0."""
    shifted = weight if offset is None else weight - offset
    with np.errstate(over="ignore"):
        ratio: Float32 = np.where(scale == 0, np.float32(0), shifted / np.where(scale == 0, np.float32(1), scale))
    return ratio


def nearest_code(levels: str, ratio: Float32) -> NDArray[np.uint8]:
    """Codes of the levels nearest to weight / scale: `iq4_nl`, `mxfp4`, or `whole LOWEST BITS`."""
    if levels.startswith("whole"):
        _, low, bits = levels.split()
        return (np.clip(np.rint(ratio), float(low), float(low) + 2 ** int(bits) - 1) - np.float32(low)).astype(np.uint8)
    if levels == "iq4_nl":
        return np.searchsorted(_midpoints(IQ4), ratio).astype(np.uint8)
    magnitude = np.searchsorted(_midpoints(MXFP4[:8]), np.abs(ratio)).astype(np.uint8)
    return magnitude + np.where((ratio < 0) & (magnitude > 0), np.uint8(8), np.uint8(0))


@cache
def _midpoints(levels: tuple[int, ...]) -> Float32:
    table = np.array(levels, np.float32)
    return (table[1:] + table[:-1]) * HALF


def check_spec(name: str, granularity: Granularity | None, options: frozenset[str]) -> None:
    """Raise UsageError for blocks or options: ggml's formats have neither."""
    check_options(name, options, set())
    if granularity is not None:
        raise UsageError(f"format {name} has blocks of its own; write {name!r} alone")


def _build(name: str, granularity: Granularity | None, options: frozenset[str]) -> GgmlBlocks:
    check_spec(name, granularity, options)
    return GgmlBlocks(name)


NAMES = dict.fromkeys(BITS, _build)
