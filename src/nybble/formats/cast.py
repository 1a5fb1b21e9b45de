"""Floating formats: fp32, fp16, bf16. No params; a code is the bit pattern of the float, stored as it is.

Rounding to nearest, ties to even. A weight that is finite but overflows (over 65519 for fp16) raises NumericError.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nybble.errors import NumericError, UsageError
from nybble.formats.base import Codes, Float32, Float64, Format, Granularity, Params, check_finite
from nybble.formats.spec import check_options

BITS = {"fp32": 32, "fp16": 16, "bf16": 16}


@dataclass(frozen=True)
class Cast(Format):
    """A floating format. Storage: `values` (bf16 as uint16 bit patterns, since numpy has no such type)."""

    name: str
    granularity: Granularity = "tensor"
    is_cast: bool = True

    @property
    def bits(self) -> int:  # type: ignore[override]  # follows from the name
        return BITS[self.name]

    @property
    def levels(self) -> Float32:
        if self.name == "fp32":
            raise ValueError("fp32 has 2^32 levels; decode() is exact")
        return self.decode(np.arange(2**16, dtype=np.uint16)[None], {})[0]

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        check_finite(weight)
        return {}

    def grid(self, params: Params) -> tuple[Float32, Float32 | None]:
        return np.ones((1, 1), dtype=np.float32), None

    def from_grid(self, scale: Float64, offset: Float64 | None) -> Params:
        return {}

    def encode(self, weight: Float32, params: Params) -> Codes:
        check_finite(weight)
        weight = np.ascontiguousarray(weight, dtype=np.float32)
        if self.name == "fp32":
            return weight.view(np.uint32)
        if self.name == "fp16":
            with np.errstate(over="ignore"):
                codes = weight.astype(np.float16).view(np.uint16)
        else:
            wide = weight.view(np.uint32)
            codes = ((wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
        overflow = ~np.isfinite(self.decode(codes, {}))
        if overflow.any():
            at = tuple(int(i) for i in np.argwhere(overflow)[0])
            raise NumericError(
                f"{int(overflow.sum())} weights overflow {self.name}, the first is {weight[at]:.6g} at {at}; use bf16 or fp32"
            )
        return codes

    def decode(self, codes: Codes, params: Params) -> Float32:
        if self.name == "fp32":
            return codes.view(np.float32)
        if self.name == "fp16":
            return codes.view(np.float16).astype(np.float32)
        return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)

    def storage(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"values": ({"fp32": "float32", "fp16": "float16", "bf16": "uint16"}[self.name], shape)}

    def to_storage(self, codes: Codes, params: Params) -> dict[str, NDArray[np.generic]]:
        return {"values": codes.view(self.storage((1, 1))["values"][0])}

    def from_storage(self, stored: dict[str, NDArray[np.generic]], shape: tuple[int, int]) -> tuple[Codes, Params]:
        return stored["values"].view(np.uint32 if self.bits == 32 else np.uint16), {}

    def max_error(self, params: Params) -> Float64:
        raise ValueError("the error of a floating format is relative: half a unit in the last place of each weight")

    def __str__(self) -> str:
        return self.name


def _build(name: str, granularity: Granularity | None, options: frozenset[str]) -> Cast:
    check_options(name, options, set())
    if granularity is not None:
        raise UsageError(f"format {name} has no blocks; write {name!r} alone")
    return Cast(name)


NAMES = dict.fromkeys(BITS, _build)
