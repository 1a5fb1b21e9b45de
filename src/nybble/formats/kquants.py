"""ggml's formats with scales of scales: q2_k q3_k q4_k q5_k q6_k iq4_xs, in runs of 256 columns that share a float16.

    q3_k q6_k iq4_xs    value = (d * m) * level[code]               m: a small whole number of each block, of either sign
    q2_k q4_k q5_k      value = (d * m) * code - dmin * n           m, n: small whole numbers from 0

A block is 16 or 32 columns. Layouts: ggml's src/ggml-common.h and ggml-quants.c; how bits lie in a block is the business of
the file. Blocks of a run are not independent: they share d and dmin.

Params are searched, with importance or without (ggml_search.py): the error is never above that of the plain range, which is
the one from the smallest weight of a block, or zero if that is smaller, to the largest (shifted), or from zero to the one of
largest magnitude.
`encode` rounds to nearest, halves to the even quotient (iq4_xs: to the lower level). Values are exact in float32 but for the
last sum or product, and equal to those of ggml. A search may clip a weight to spare the others; `max_error` says how far.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nybble import kernels
from nybble.formats.base import Codes, Float32, Float64, Granularity, PackedFormat, Params
from nybble.formats.ggml import BLOCK, check_spec
from nybble.formats.ggml_search import RUN, SHAPES, Shape, nearest, search

NAMED = tuple(name for name, shape in SHAPES.items() if shape.run == RUN)
REFITS = 4
WHOLE_BYTE = 8
"""Multipliers of so many bits are stored as int8, others less their lowest and packed."""


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
        return self._shape.shifted

    @property
    def independent(self) -> bool:
        return False

    @property
    def levels(self) -> Float32:
        return self._shape.levels

    @property
    def _in_run(self) -> int:
        """Blocks of a run."""
        return RUN // self._shape.block

    @property
    def _bits_of_multiplier(self) -> int:
        return (self._shape.high - self._shape.low).bit_length()

    def fallback(self, columns: int) -> str | None:
        if columns % BLOCK:
            return "fp16"
        return self._shape.fallback if columns % RUN else None

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        """Searched params; without importance all columns count alike."""
        return self.round(weight, importance)[1]

    def round(self, weight: Float32, importance: Float32 | None = None) -> tuple[Codes, Params]:
        self.check_columns(weight.shape[1])
        found = search(self.name, weight, importance)
        params: Params = {"d": found.d, "scale": self._stored(found.scale)}
        if found.dmin is not None and found.offset is not None:
            params = {"d": found.d, "dmin": found.dmin, "scale": params["scale"], "min": self._stored(found.offset)}
        return found.codes, params

    def grid(self, params: Params) -> tuple[Float32, Float32 | None]:
        scale = self._times(params["d"], params["scale"])
        return scale, -self._times(params["dmin"], params["min"]) if self.shifted else None

    def _times(self, shared: NDArray[np.float16], stored: NDArray[np.generic]) -> Float32:
        """float32 [N, blocks]: the products of shared scales and multipliers, which are exact."""
        multipliers = self._multipliers(stored, shared.shape[1] * self._in_run).astype(np.float32)
        with np.errstate(invalid="ignore"):  # a file may hold an infinite d
            return multipliers * np.repeat(shared.astype(np.float32), self._in_run, axis=1)

    def _multipliers(self, stored: NDArray[np.generic], blocks: int) -> NDArray[np.int16]:
        """int16 [N, blocks]: the whole numbers of a `scale` or `min` as stored."""
        if self._bits_of_multiplier == WHOLE_BYTE:
            return stored.astype(np.int16)
        codes = kernels.unpack(np.ascontiguousarray(stored, np.uint8), blocks, self._bits_of_multiplier)
        return codes.astype(np.int16) + np.int16(self._shape.low)

    def _stored(self, multipliers: NDArray[np.integer]) -> NDArray[np.generic]:
        """Inverse of `_multipliers`."""
        if self._bits_of_multiplier == WHOLE_BYTE:
            return multipliers.astype(np.int8)
        codes = (multipliers - multipliers.dtype.type(self._shape.low)).astype(np.uint8)
        return kernels.pack(np.ascontiguousarray(codes), self._bits_of_multiplier)

    def kernel_grid(self, params: Params) -> tuple[NDArray[np.floating], NDArray[np.floating] | None]:
        return self.grid(params)

    def kernel_parameters(self, params: Params) -> tuple[kernels.Nested, kernels.Nested | None]:
        """Multipliers as bytes and the shared halves; a shift is subtracted, so its half changes sign."""
        scale = self._nested(params["scale"], params["d"])
        return scale, self._nested(params["min"], -params["dmin"]) if self.shifted else None

    def _nested(self, stored: NDArray[np.generic], shared: NDArray[np.float16]) -> kernels.Nested:
        if self._bits_of_multiplier == WHOLE_BYTE:
            codes, bias = stored.view(np.uint8) ^ np.uint8(128), 128
        else:
            blocks = shared.shape[1] * self._in_run
            codes = kernels.unpack(np.ascontiguousarray(stored, np.uint8), blocks, self._bits_of_multiplier)
            bias = -self._shape.low
        return kernels.Nested(np.require(codes, requirements="C"), bias, np.require(shared, requirements=["C", "A"]))

    def from_grid(self, scale: Float64, offset: Float64 | None) -> Params:
        low, high = self._shape.low, self._shape.high
        d, multipliers = multiples_of_shared(scale, self._in_run, low, high)
        if not self.shifted:
            return {"d": d, "scale": self._stored(multipliers)}
        dmin, mins = multiples_of_shared(np.zeros_like(scale) if offset is None else -offset, self._in_run, low, high)
        return {"d": d, "dmin": dmin, "scale": self._stored(multipliers), "min": self._stored(mins)}

    def encode(self, weight: Float32, params: Params) -> Codes:
        return nearest(self.name, weight, *self.grid(params))

    def param_storage(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        self.check_columns(shape[1])
        rows, columns = shape
        blocks, bits = columns // self._shape.block, self._bits_of_multiplier
        d = ("float16", (rows, columns // RUN))
        own = ("int8", (rows, blocks)) if bits == WHOLE_BYTE else ("uint8", (rows, kernels.row_bytes(blocks, bits)))
        return {"d": d, "dmin": d, "scale": own, "min": own} if self.shifted else {"d": d, "scale": own}

    def max_error(self, params: Params) -> Float64:
        """Two steps of the block, two of the next multiple of d on all levels, and one of dmin. Not proven: found on weights of
        many kinds (normal, heavy tails, sparse, magnitudes of a run 2^12 apart), the worst of which took 1.5 of the second."""
        scale = np.abs(self.grid(params)[0].astype(np.float64))
        reach = float(np.abs(self.levels).max())
        step = float(np.ptp(self.levels)) / (len(self.levels) - 1)
        tiny = max(self._shape.high, -self._shape.low) * 2.0**-25  # what the smallest float16 cannot tell apart
        shared = 2 * reach * (np.abs(params["d"].astype(np.float64)) + tiny)
        if self.shifted:
            shared = shared + np.abs(params["dmin"].astype(np.float64)) + tiny
        return 2 * step * scale + np.repeat(shared, self._in_run, axis=1)

    def __str__(self) -> str:
        return self.name


def multiples_of_shared(values: Float64, blocks: int, low: int, high: int) -> tuple[NDArray[np.float16], NDArray[np.int16]]:
    """(d float16 [N, runs], multipliers int16 [N, runs * blocks] from low to high): products near to values [N, runs * blocks] of
    any precision, in least squares; exact where they are such products. A d that overflows becomes the largest float16.

    Tried are the d of which the largest value is a multiple in the upper half of what there is (a smaller multiple is twice one
    of half the d); the best is then refitted to its multipliers, as long as that helps.
    """
    view = np.nan_to_num(values.astype(np.float64)).reshape(-1, blocks).T.copy()  # [blocks, runs]: sums over runs side by side
    largest = np.take_along_axis(view, np.abs(view).argmax(0)[None], 0)[0]
    best, chosen, least = np.zeros(largest.shape), np.zeros(view.shape), np.full(largest.shape, np.inf)

    def consider(d: Float64) -> bool:
        """Whether any run took it."""
        stored = _stored_half(d)
        whole = np.rint(view * np.where(stored == 0, 0, 1 / np.where(stored == 0, 1, stored)))
        np.clip(whole, low, high, out=whole)
        off = view - stored * whole
        error = np.einsum("br,br->r", off, off)
        better = error < least
        np.copyto(best, stored, where=better)
        np.copyto(chosen, whole, where=better)
        np.copyto(least, error, where=better)
        return bool(better.any())

    for multiple in range(low, low // 2) if low < 0 else range(high, high // 2, -1):
        consider(largest / multiple)
        if not least.any():
            break
    for _ in range(REFITS):
        square = np.einsum("br,br->r", chosen, chosen)
        if not consider(np.einsum("br,br->r", view, chosen) / np.where(square == 0, 1, square)):
            break
    shared = best.reshape(values.shape[0], -1).astype(np.float16)
    return shared, np.ascontiguousarray(chosen.T).reshape(values.shape).astype(np.int16)


def _stored_half(values: Float64) -> Float64:
    largest = float(np.finfo(np.float16).max)
    return np.clip(values, -largest, largest).astype(np.float16).astype(np.float64)


def _build(name: str, granularity: Granularity | None, options: frozenset[str]) -> GgmlRuns:
    check_spec(name, granularity, options)
    return GgmlRuns(name)


NAMES = dict.fromkeys(NAMED, _build)
