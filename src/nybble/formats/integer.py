"""Integers of 2 to 8 bits: symmetric (absmax) and asymmetric (zero point), per tensor, channel or group.

    symmetric    value = scale * (code - 2^(bits-1))      levels -128..127 for int8
    asymmetric   value = scale * (code - zero)            zero: an integer code, 0 .. 2^bits - 1

The plain symmetric range is absmax / (2^(bits-1) - 1): int8 uses 127, so that both ends are representable; a searched
scale may be negative and then uses the extra level at the other end. The plain asymmetric range spans
[min(w, 0), max(w, 0)] in 2^bits - 1 steps; zero is exactly representable. Scales are float16 in groups, float32 otherwise,
rounded up so that nothing clips (option `f32`: float32 in groups too, as other tools' files have them); zero points are packed
at `bits` bits. Division is in float64, rounding half to even.
Bound: |w - value| <= scale / 2 (1 + 2^(bits - 23)), the second term for the float32 rounding of the value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nybble import kernels
from nybble.errors import NumericError
from nybble.formats.base import (
    Codes,
    Float32,
    Float64,
    Granularity,
    PackedFormat,
    Params,
    blocked,
    check_finite,
    granularity_suffix,
    nearest_stored,
    scale_dtype,
    store_up,
)
from nybble.formats.search import blocked_importance, search_affine, search_scale
from nybble.formats.spec import check_options, check_wide

LARGEST = float(np.finfo(np.float32).max) / 2
"""Values lie up to half a step outside the range of the weights, and a step may be two thirds of its magnitude."""


@dataclass(frozen=True)
class Integer(PackedFormat):
    """`int2` to `int8`. Storage: codes, `scale`, and for asymmetric ones `zero`."""

    bits: int
    granularity: Granularity
    asymmetric: bool = False
    wide: bool = False
    """Scales of groups are float32."""
    is_integer: ClassVar[bool] = True  # type: ignore[misc]  # of the class, not one of its fields

    @property
    def name(self) -> str:  # type: ignore[override]  # derived from bits here
        return f"int{self.bits}"

    @property
    def levels(self) -> Float32:
        zero = 0 if self.asymmetric else 2 ** (self.bits - 1)
        return np.arange(2**self.bits, dtype=np.float32) - np.float32(zero)

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        check_finite(weight)
        low, high = self._ends(weight)
        largest = float(max(-low.min(), high.max())) if weight.size else 0.0
        if largest > LARGEST:
            raise NumericError(
                f"a weight of magnitude {largest:.5g} is over {LARGEST:.5g}, half the largest float32: its code "
                "could decode to infinity; repair the checkpoint or keep this tensor in float"
            )
        view = blocked(weight, self.granularity) if importance is not None else weight
        dtype = scale_dtype(self.granularity, self.wide)
        if self.asymmetric:
            low, high = np.minimum(low, 0).astype(np.float64), np.maximum(high, 0).astype(np.float64)
            scale = store_up((high - low) / (2**self.bits - 1), dtype)
            zero = np.rint(-low / _divisor(scale)).clip(0, 2**self.bits - 1).astype(np.uint8)
            if importance is not None:
                weights = blocked_importance(importance, weight.shape, self.granularity)
                scale, zero = search_affine(view, weights, self.bits, scale, zero)
            return {"scale": scale, "zero": kernels.pack(zero, self.bits)}
        ends = np.maximum(-low, high).astype(np.float64) + 0.0  # of zeros: not -0
        scale = store_up(ends / (2 ** (self.bits - 1) - 1), dtype)
        if importance is not None:
            weights = blocked_importance(importance, weight.shape, self.granularity)
            scale = search_scale(view, weights, self._snap, float(2 ** (self.bits - 1)), scale, both_signs=True)
        return {"scale": scale}

    def _ends(self, weight: Float32) -> tuple[Float32, Float32]:
        """Lowest and highest weight of every block; a short last block counts as filled up with zeros."""
        low, high = kernels.extremes(np.ascontiguousarray(weight), max(1, self.block(weight.shape[1])))
        if self.granularity == "tensor":
            return low.min(keepdims=True, initial=np.inf), high.max(keepdims=True, initial=-np.inf)
        return low, high

    def _snap(self, ratio: Float32) -> Float32:
        """Nearest level of weight / scale."""
        half = 2 ** (self.bits - 1)
        return np.clip(np.rint(ratio), -half, half - 1)

    def grid(self, params: Params) -> tuple[Float32, Float32 | None]:
        scale = params["scale"].astype(np.float32)
        if not self.asymmetric:
            return scale, None
        return scale, kernels.unpack(params["zero"], scale.shape[1], self.bits).astype(np.float32)

    def from_grid(self, scale: Float64, offset: Float64 | None) -> Params:
        params: Params = {"scale": nearest_stored(scale, scale_dtype(self.granularity, self.wide))}
        if offset is not None:
            params["zero"] = kernels.pack(np.rint(offset).clip(0, 2**self.bits - 1).astype(np.uint8), self.bits)
        return params

    def encode(self, weight: Float32, params: Params) -> Codes:
        check_finite(weight)
        scale, zero = self.grid(params)
        block = max(1, self.block(weight.shape[1]))
        rows = np.require(np.broadcast_to(scale, (len(weight), scale.shape[1])), requirements="C")
        zeros = None if zero is None else np.require(np.broadcast_to(zero, rows.shape), requirements="C")
        return kernels.uniform(np.ascontiguousarray(weight), self.bits, block, rows, zeros)

    def round(self, weight: Float32, importance: Float32 | None = None) -> tuple[Codes, Params]:
        found = None if importance is not None else self.round_stored(weight, "f32")
        return super().round(weight, importance) if found is None else found

    def round_stored(self, values: NDArray[Any], kind: str) -> tuple[Codes, Params] | None:
        if self.granularity == "tensor" or not values.size:
            return None
        wide = scale_dtype(self.granularity, self.wide) == "float32"
        whole = np.require(values, requirements=("C", "A"))
        found = kernels.round_uniform(whole, kind, self.bits, self.block(values.shape[1]), wide, self.asymmetric)
        if found is None:
            return None
        codes, scale, zero = found
        return codes, {"scale": scale} if zero is None else {"scale": scale, "zero": kernels.pack(zero, self.bits)}

    def param_storage(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        rows, blocks = self.blocks(shape)
        stored: dict[str, tuple[str, tuple[int, ...]]] = {"scale": (scale_dtype(self.granularity, self.wide), (rows, blocks))}
        if self.asymmetric:
            stored["zero"] = ("uint8", (rows, kernels.row_bytes(blocks, self.bits)))
        return stored

    def max_error(self, params: Params) -> Float64:
        rounding = 2.0 ** (self.bits - 23)  # of the decoded value, at most 2^bits steps, to float32
        return np.abs(params["scale"].astype(np.float64)) / 2 * (1 + rounding)

    def __str__(self) -> str:
        options = f"{',asym' if self.asymmetric else ''}{',f32' if self.wide else ''}"
        return f"{self.name}{granularity_suffix(self.granularity)}{options}"


def _divisor(scale: NDArray[np.floating]) -> Float64:
    """Scale in float64 to divide by; 1 where it is zero (a block of zeros: the quotient is zero)."""
    wide = scale.astype(np.float64)
    wide[wide == 0] = 1.0
    return wide


def _build(name: str, granularity: Granularity | None, options: frozenset[str]) -> Integer:
    check_options(name, options, {"asym", "f32"})
    check_wide(name, granularity, options)
    return Integer(int(name.removeprefix("int")), granularity or "channel", "asym" in options, "f32" in options)


NAMES = {f"int{bits}": _build for bits in range(2, 9)}
