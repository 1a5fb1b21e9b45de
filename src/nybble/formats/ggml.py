"""ggml's formats whose blocks of 32 stand alone: q4_0 q4_1 q5_0 q5_1 q8_0 iq4_nl mxfp4, as llama.cpp reads and writes them.

    q4_0 q5_0 q8_0    value = scale * (code - 2^(bits-1))       scale float16
    q4_1 q5_1         value = scale * code + shift              scale and shift float16 (ggml's d and m)
    iq4_nl            value = scale * table[code]               scale float16, a table of 16 whole numbers
    mxfp4             value = 2^(exponent-128) * table[code]    exponent uint8 (ggml's E8M0, halved), FP4's table doubled

Layouts: ggml's src/ggml-common.h and ggml-quants.c; how nibbles lie in a block is the business of the file.

`round` without importance is ggml's own rounding to the bit, codes and params, of q4_0 q4_1 q5_0 q5_1 q8_0 mxfp4: codes are
chosen by the scale before it is rounded to float16, halves go up (away from zero in q8_0), and every step is rounded to
float32 by itself. A compiler may fuse the product with the addition and so give another code to a weight in a million; in
builds for x86 it does not, since only ggml's CPU backend is compiled for the machine and its quantizers are not in there.
The scale of q4_0 and q5_0 is the weight of largest magnitude over -8 or -16: one of the two ends is a step short. Exponents
of mxfp4 below zero wrap around, as there: weights below 2^-124 become zeros. Only where ggml's values would be infinite, for
the largest floats in mxfp4, do ours differ.

iq4_nl, and all of them with importance, are searched (ggml_search.py), and never worse than that. `encode` on given params
rounds to nearest: whole levels halfway to the even quotient, table levels to the lower one, in mxfp4 to that nearer to zero.

Bounds, in units of the scale: q4_0 1 + 8/2048, q5_0 1 + 16/2048, q8_0 0.562, q4_1 and q5_1 1/2 + L/2048 and |shift|/2048
with L = 15, 31; mxfp4 4, the step that its largest values lack; iq4_nl half its widest gap, and what the search may clip. To
each comes what a float16 has no digits for, below 2^-14.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nybble import kernels
from nybble.errors import UsageError
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
)
from nybble.formats.ggml_search import SHAPES, half, nearest, search
from nybble.formats.search import blocked_importance
from nybble.formats.spec import check_options

BLOCK = 32
MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)
"""Levels of mxfp4 by the low three bits of the code, twice those of FP4 (E2M1); the fourth bit is the sign."""
BITS = {"q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5, "q8_0": 8, "iq4_nl": 4, "mxfp4": 4}
EXPONENT_OF_ONE = 128
"""The exponent that stands for 1."""
LARGEST_EXPONENT = 252
"""Beyond it the largest level would not be a float32."""
EXPONENTS_TRIED = (0, -1, 1, -2)
"""With importance, beside ggml's own."""
RULES = {"q4_0": "ends", "q5_0": "ends", "q4_1": "range", "q5_1": "range", "q8_0": "away"}
"""How ggml rounds; kernels/reference_round.py says what they mean."""


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
        if self.name == "mxfp4":
            magnitudes = np.array(MAGNITUDES, np.float32)
            return np.concatenate([magnitudes, 0 - magnitudes])
        return SHAPES[self.name].levels

    def fallback(self, columns: int) -> str | None:
        return "fp16" if columns % BLOCK else None

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        """Without importance ggml's own params (iq4_nl: searched ones); with it searched ones, never worse."""
        if self.name != "mxfp4":
            return self.round(weight, importance)[1]
        self.check_columns(weight.shape[1])
        check_finite(weight)
        if importance is not None:
            return self._best_exponents(weight, importance)
        return {"exponent": _exponent(np.abs(blocked(weight, BLOCK)).max(-1))}

    def round(self, weight: Float32, importance: Float32 | None = None) -> tuple[Codes, Params]:
        self.check_columns(weight.shape[1])
        if self.name == "mxfp4":
            params = self.fit(weight, importance)
            return self.encode(weight, params), params
        if importance is not None or self.name == "iq4_nl":
            found = search(self.name, weight, importance)
            return found.codes, {"scale": found.d} | ({} if found.dmin is None else {"shift": np.float16(0) - found.dmin})
        check_finite(weight)
        codes, scale, shift = kernels.round_blocks(_ready(weight), self.bits, BLOCK, RULES[self.name], kernels.cores())
        params = {"scale": half(scale, "scale")}
        return codes, params | {"shift": half(shift, "shift")} if self.shifted else params

    def _best_exponents(self, weight: Float32, importance: Float32) -> Params:
        """Of ggml's exponents and those near them the ones with the least weighed error."""
        plain = self.fit(weight)["exponent"].astype(np.int16)
        weights = blocked_importance(importance, weight.shape, BLOCK)
        best, least = plain.astype(np.uint8), np.full(plain.shape, np.inf)
        for step in EXPONENTS_TRIED:
            inside = (plain + step >= 0) & (plain + step <= LARGEST_EXPONENT)
            tried = np.where(inside, plain + step, plain).astype(np.uint8)
            params: Params = {"exponent": tried}
            error = blocked(self.decode(self.encode(weight, params), params) - weight, BLOCK).astype(np.float64)
            loss = np.einsum("rbk,rbk,rbk->rb", weights, error, error)
            better = loss < least
            best[better], least[better] = tried[better], loss[better]
        return {"exponent": best}

    def grid(self, params: Params) -> tuple[Float32, Float32 | None]:
        if self.name == "mxfp4":
            return np.ldexp(np.float32(1), params["exponent"].astype(np.int32) - EXPONENT_OF_ONE), None
        return params["scale"].astype(np.float32), params["shift"].astype(np.float32) if self.shifted else None

    def kernel_grid(self, params: Params) -> tuple[NDArray[np.floating], NDArray[np.floating] | None]:
        if self.name == "mxfp4":
            return self.grid(params)
        shift = np.require(params["shift"], requirements=["C", "A"]) if self.shifted else None
        return np.require(params["scale"], requirements=["C", "A"]), shift

    def from_grid(self, scale: Float64, offset: Float64 | None) -> Params:
        if self.name == "mxfp4":
            fraction, exponent = np.frexp(np.maximum(scale, 2.0**-EXPONENT_OF_ONE))
            nearest_power = exponent - (fraction < 0.75) + EXPONENT_OF_ONE
            return {"exponent": np.clip(nearest_power, 0, LARGEST_EXPONENT).astype(np.uint8)}
        params: Params = {"scale": nearest_stored(scale, "float16")}
        if self.shifted:
            params["shift"] = nearest_stored(np.zeros_like(scale) if offset is None else offset, "float16")
        return params

    def encode(self, weight: Float32, params: Params) -> Codes:
        scale, offset = self.grid(params)
        if self.name != "mxfp4":
            return nearest(self.name, weight, scale, offset)
        check_finite(weight)
        magnitudes = np.array(MAGNITUDES, np.float32)
        codes = kernels.nearest(_ready(np.abs(weight)), magnitudes, BLOCK, scale, None, kernels.cores())
        codes += ((weight < 0) & (codes > 0)).view(np.uint8) * np.uint8(8)
        return codes

    def param_storage(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        self.check_columns(shape[1])
        blocks = self.blocks(shape)
        if self.name == "mxfp4":
            return {"exponent": ("uint8", blocks)}
        names = ("scale", "shift") if self.shifted else ("scale",)
        return dict.fromkeys(names, ("float16", blocks))

    def max_error(self, params: Params) -> Float64:
        scale, offset = (None if values is None else np.abs(values.astype(np.float64)) for values in self.grid(params))
        assert scale is not None
        tiny = 2.0**-25  # half of the smallest float16
        if self.name == "mxfp4":
            return scale * 4 + 2.0**-124
        if offset is not None:
            steps = 2**self.bits - 1
            return scale * (0.5 + steps * 2.0**-11) + offset * 2.0**-11 + (steps + 1) * tiny
        if self.name == "q8_0":
            return scale * 0.562 + 127 * tiny
        if self.name == "iq4_nl":
            return scale * 127 / 4 + 127 * tiny
        steps = 2 ** (self.bits - 1)
        return scale * (1 + steps * 2.0**-11) + steps * tiny

    def __str__(self) -> str:
        return self.name


def _ready(weight: Float32) -> Float32:
    return np.require(weight, np.float32, ["C", "A"])


def _exponent(largest: Float32) -> NDArray[np.uint8]:
    """ggml's exponents of blocks by their largest magnitude."""
    wide = np.log2(np.where(largest == 0, 1, largest).astype(np.float64)).astype(np.float32)
    return np.where(largest == 0, 0, np.minimum(np.floor(wide).astype(np.int64) + 125, LARGEST_EXPONENT)).astype(np.uint8)


def check_spec(name: str, granularity: Granularity | None, options: frozenset[str]) -> None:
    """Raise UsageError for blocks or options: ggml's formats have neither."""
    check_options(name, options, set())
    if granularity is not None:
        raise UsageError(f"format {name} has blocks of its own; write {name!r} alone")


def _build(name: str, granularity: Granularity | None, options: frozenset[str]) -> GgmlBlocks:
    check_spec(name, granularity, options)
    return GgmlBlocks(name)


NAMES = dict.fromkeys(BITS, _build)
