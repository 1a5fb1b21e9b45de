"""The one value that flows from method to file: a quantized tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nybble.formats.activations import Activations
from nybble.formats.base import Codes, Float32, Format, Params


@dataclass(frozen=True, eq=False)
class QTensor:
    """A weight [N, K] = [out, in] as codes and params of a format. A plain value: arrays are not to be changed.

    `codes` are unsigned integers [N, K], one per element in original column order (uint8; uint16 or uint32 bit patterns
    for the floating formats); `params` are as stored, in storage precision.
    """

    format: Format
    codes: Codes
    params: Params
    activations: Activations | None = None
    """What becomes of the inputs that this weight multiplies; None: they stay floats."""

    def __post_init__(self) -> None:
        if self.codes.ndim != 2:
            raise ValueError(f"codes have shape {self.codes.shape}; a weight is a matrix [N, K]")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) = (out features, in features)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def bpw(self) -> float:
        """Everything stored for this tensor, in bits, over its number of weights."""
        return self.format.bits_per_weight(self.shape)

    def decode(self) -> Float32:
        """The float32 weight [N, K] that this stands for."""
        return self.format.decode(self.codes, self.params)

    def stored(self) -> dict[str, NDArray[np.generic]]:
        """Suffix -> array, exactly the bytes that a file holds."""
        return self.format.to_storage(self.codes, self.params)

    @classmethod
    def from_stored(
        cls,
        fmt: Format,
        stored: dict[str, NDArray[np.generic]],
        shape: tuple[int, int],
        activations: Activations | None = None,
    ) -> QTensor:
        """Inverse of `stored`; `activations` comes from beside it.

        Raises ValueError when arrays do not have the dtype and shape that the format states."""
        expected = fmt.storage(shape)
        if set(stored) != set(expected):
            raise ValueError(f"{fmt} of shape {shape} stores {sorted(expected)}, got {sorted(stored)}")
        for name, (dtype, size) in expected.items():
            if stored[name].dtype != np.dtype(dtype) or stored[name].shape != size:
                raise ValueError(f"{name} is {stored[name].dtype} {stored[name].shape}, {fmt} needs {dtype} {size}")
        codes, params = fmt.from_storage(stored, shape)
        return cls(fmt, codes, params, activations)
