"""ggml's formats with scales of scales: q2_k q3_k q4_k q5_k q6_k iq4_xs, in runs of 256 columns that share a float16.

    q3_k q6_k iq4_xs    value = (d * m) * level[code]               m: a small whole number of each block, of either sign
    q2_k q4_k q5_k      value = (d * m) * code - dmin * n           m, n: small whole numbers from 0

A block is 16 or 32 columns. Layouts: ggml's headers, src/ggml-common.h and ggml-quants.c; how bits lie in a block is the
business of the file. Blocks of a run are not independent: they share d and dmin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nybble import kernels
from nybble.formats.base import Codes, Float32, Float64, Granularity, PackedFormat, Params, blocked, check_finite, slabs, spread
from nybble.formats.ggml import IQ4, check_spec, half, nearest_code, ratios

RUN = 256
"""Columns that share d and dmin."""


@dataclass(frozen=True)
class Shape:
    """The numbers of one format."""

    bits: int
    block: int
    lowest: int
    """Level of code 0."""
    multiplier_bits: int
    signed: bool
    """Multipliers are stored less their lowest, -2^(multiplier_bits - 1), or as int8 where they have 8 bits."""
    fallback: str

    @property
    def low(self) -> int:
        """Smallest multiplier."""
        return -(2 ** (self.multiplier_bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """Largest multiplier."""
        return self.low + 2**self.multiplier_bits - 1


SHAPES = {
    "q2_k": Shape(2, 16, 0, 4, False, "iq4_nl"),
    "q3_k": Shape(3, 16, -4, 6, True, "iq4_nl"),
    "q4_k": Shape(4, 32, 0, 6, False, "q5_0"),
    "q5_k": Shape(5, 32, 0, 6, False, "q5_1"),
    "q6_k": Shape(6, 16, -32, 8, True, "q8_0"),
    "iq4_xs": Shape(4, 32, 0, 6, True, "iq4_nl"),
}


@dataclass(frozen=True)
class GgmlRuns(PackedFormat):
    """One of the formats above. Storage: codes, `d` and `dmin` float16 [N, K/256], `scale` and `min` packed multipliers
    [N, row_bytes(blocks)]; q6_k's `scale` is int8 [N, blocks]."""

    name: str
    whole: int = RUN

    @property
    def _shape(self) -> Shape:
        return SHAPES[self.name]

    @property
    def bits(self) -> int:  # type: ignore[override]  # follows from the name
        return self._shape.bits

    @property
    def granularity(self) -> Granularity:  # type: ignore[override]
        return self._shape.block

    @property
    def is_integer(self) -> bool:  # type: ignore[override]
        return self.name != "iq4_xs"

    @property
    def shifted(self) -> bool:  # type: ignore[override]
        return not self._shape.signed

    @property
    def independent(self) -> bool:
        return False

    @property
    def levels(self) -> Float32:
        if self.name == "iq4_xs":
            return np.array(IQ4, np.float32)
        return np.arange(2**self.bits, dtype=np.float32) + np.float32(self._shape.lowest)

    def fallback(self, columns: int) -> str | None:
        if columns % BLOCK_OF_FALLBACK:
            return "fp16"
        return self._shape.fallback if columns % RUN else None

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        self.check_columns(weight.shape[1])
        check_finite(weight)
        view = blocked(weight, self._shape.block).astype(np.float64)
        if self.shifted:
            low = np.minimum(view.min(-1), 0)
            return self.from_grid((np.maximum(view.max(-1), 0) - low) / (2**self.bits - 1), low)
        largest = np.take_along_axis(view, np.abs(view).argmax(-1)[..., None], -1)[..., 0]
        return self.from_grid(largest / self.levels[0], None)

    def grid(self, params: Params) -> tuple[Float32, Float32 | None]:
        scale = self._times(params["d"], params["scale"])
        return scale, -self._times(params["dmin"], params["min"]) if self.shifted else None

    def _times(self, shared: NDArray[np.float16], stored: NDArray[np.generic]) -> Float32:
        """float32 [N, blocks]: the products of shared scales and multipliers, which are exact."""
        blocks = shared.shape[1] * (RUN // self._shape.block)
        multipliers = self.multipliers(stored, blocks).astype(np.float32)
        return multipliers * np.repeat(shared.astype(np.float32), RUN // self._shape.block, axis=1)

    def multipliers(self, stored: NDArray[np.generic], blocks: int) -> NDArray[np.int64]:
        """int64 [N, blocks]: the whole numbers of a `scale` or `min` as stored."""
        if self._shape.multiplier_bits == 8:
            return stored.astype(np.int64)
        return (
            kernels.unpack(np.ascontiguousarray(stored, np.uint8), blocks, self._shape.multiplier_bits).astype(np.int64)
            + self._shape.low
        )

    def stored_multipliers(self, multipliers: NDArray[np.integer]) -> NDArray[np.generic]:
        """Inverse of `multipliers`."""
        if self._shape.multiplier_bits == 8:
            return multipliers.astype(np.int8)
        return kernels.pack(np.ascontiguousarray(multipliers - self._shape.low, np.uint8), self._shape.multiplier_bits)

    def kernel_grid(self, params: Params) -> tuple[NDArray[np.floating], NDArray[np.floating] | None]:
        return self.grid(params)

    def from_grid(self, scale: Float64, offset: Float64 | None) -> Params:
        shape = self._shape
        d, multipliers = shared_scale(scale, RUN // shape.block, shape.low, shape.high)
        if not self.shifted:
            return {"d": d, "scale": self.stored_multipliers(multipliers)}
        dmin, mins = shared_scale(np.zeros_like(scale) if offset is None else -offset, RUN // shape.block, shape.low, shape.high)
        return {"d": d, "dmin": dmin, "scale": self.stored_multipliers(multipliers), "min": self.stored_multipliers(mins)}

    def encode(self, weight: Float32, params: Params) -> Codes:
        check_finite(weight)
        scale, offset = self.grid(params)
        columns, block = weight.shape[1], self._shape.block
        levels = "iq4_nl" if self.name == "iq4_xs" else f"whole {self._shape.lowest} {self.bits}"
        codes = np.empty(weight.shape, np.uint8)
        for rows in slabs(weight.shape):
            wide = None if offset is None else spread(offset[rows], columns, block)
            codes[rows] = nearest_code(levels, ratios(weight[rows], spread(scale[rows], columns, block), wide))
        return codes

    def param_storage(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        self.check_columns(shape[1])
        rows, columns = shape
        shared = ("float16", (rows, columns // RUN))
        blocks, bits = columns // self._shape.block, self._shape.multiplier_bits
        own = ("int8", (rows, blocks)) if bits == 8 else ("uint8", (rows, kernels.row_bytes(blocks, bits)))
        return {"d": shared, "dmin": shared, "scale": own, "min": own} if self.shifted else {"d": shared, "scale": own}

    def max_error(self, params: Params) -> Float64:
        scale, _ = self.grid(params)
        d = np.repeat(np.abs(params["d"].astype(np.float64)), RUN // self._shape.block, axis=1)
        return (np.abs(scale.astype(np.float64)) + d) * float(np.abs(self.levels).max())

    def __str__(self) -> str:
        return self.name


BLOCK_OF_FALLBACK = 32


def shared_scale(values: Float64, blocks: int, low: int, high: int) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """(d float16 [N, runs], multipliers int64 [N, runs * blocks] from low to high) whose products are nearest to the values
    [N, runs * blocks] in least squares, of the d that make the largest value an exact multiple."""
    view = values.reshape(values.shape[0], -1, blocks)
    largest = np.take_along_axis(view, np.abs(view).argmax(-1)[..., None], -1)[..., 0]
    end = high if low == 0 else low
    best = np.zeros(largest.shape, np.float16)
    chosen = np.zeros(view.shape)
    lowest = np.full(largest.shape, np.inf)
    for multiple in range(end, end // 2, -1 if end > 0 else 1):
        d = half(largest / multiple, "shared scale")
        wide = d.astype(np.float64)[..., None]
        whole = np.clip(np.rint(view / np.where(wide == 0, 1, wide)), low, high) * (wide != 0)
        error = ((view - wide * whole) ** 2).sum(-1)
        better = error < lowest
        best[better], chosen[better], lowest[better] = d[better], whole[better], error[better]
    return best, chosen.reshape(values.shape).astype(np.int64)


def _build(name: str, granularity: Granularity | None, options: frozenset[str]) -> GgmlRuns:
    check_spec(name, granularity, options)
    return GgmlRuns(name)


NAMES = dict.fromkeys(SHAPES, _build)
