"""What becomes of a layer's inputs at run time: the scheme that a weight carries, as a plain value. No torch.

    (none)     inputs stay floating-point numbers
    dynamic    int8, a scale for each token, found when the token is there
    static     uint8 on one grid (scale, zero point) for all tokens, found by calibration
    outliers   as dynamic, but elements of magnitude `threshold` or more stay floating-point numbers

A scheme is no number format: it says nothing about the weight. It travels with it, in the QTensor, to the file and back.
models/inputs.py computes what it says; arXiv 2208.07339 is the source of `outliers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCHEMES = ("dynamic", "static", "outliers")
MIDDLE = 128
"""Zero point of a static grid that is the same on both sides of zero."""


@dataclass(frozen=True)
class Activations:
    """A scheme with its numbers. Raises ValueError for an unknown scheme and for numbers out of range."""

    scheme: str
    """One of SCHEMES."""
    threshold: float = 0.0
    """outliers: magnitudes from which elements stay floats; 0 or more, 0 keeps them all."""
    scale: float = 1.0
    """static: one step of the grid, a float32 above 0."""
    zero: int = MIDDLE
    """static: the code of 0, from 0 to 255. An input x has code round(x / scale) + zero, held between 0 and 255."""

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"unknown activations {self.scheme!r}; this nybble computes {', '.join(SCHEMES)}")
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"threshold {self.threshold} of activations is not a number of 0 or more")
        object.__setattr__(self, "scale", float(np.float32(self.scale)))
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale {self.scale} of activations is not a number above 0")
        if not 0 <= self.zero <= 255:
            raise ValueError(f"zero point {self.zero} of activations is not between 0 and 255")

    def entry(self) -> dict[str, Any]:
        """What config.json says of it; the numbers of a static grid are tensors (`stored`)."""
        return {"scheme": self.scheme, **({"threshold": self.threshold} if self.scheme == "outliers" else {})}

    def stored(self) -> dict[str, NDArray[Any]]:
        """Suffix -> array [1] in a file: `inputs.scale` float32 and `inputs.zero` uint8 of a static grid, else nothing."""
        if self.scheme != "static":
            return {}
        return {"inputs.scale": np.array([self.scale], np.float32), "inputs.zero": np.array([self.zero], np.uint8)}

    def with_stored(self, stored: Mapping[str, NDArray[Any]]) -> Activations:
        """The scheme with the numbers of `stored` arrays. Raises ValueError when they are not what `stored` gives."""
        for suffix, expected in self.stored().items():
            array = stored[suffix]
            if array.dtype != expected.dtype or array.shape != (1,):
                raise ValueError(f"{suffix} is {array.dtype} {array.shape}, it must be {expected.dtype} (1,)")
        if self.scheme != "static":
            return self
        return Activations("static", scale=float(stored["inputs.scale"][0]), zero=int(stored["inputs.zero"][0]))

    @property
    def bits(self) -> int:
        """All bits stored for it."""
        return sum(8 * array.nbytes for array in self.stored().values())

    def __str__(self) -> str:
        return f"{self.scheme}:threshold={self.threshold:g}" if self.scheme == "outliers" else self.scheme


def parse_entry(entry: Any) -> Activations:
    """The scheme of what `Activations.entry` gave. Raises ValueError for what it did not give."""
    if not isinstance(entry, dict) or not isinstance(entry.get("scheme"), str):
        raise ValueError(f"activations {entry!r} name no scheme")
    scheme, numbers = entry["scheme"], {key: value for key, value in entry.items() if key != "scheme"}
    if scheme not in SCHEMES:
        return Activations(scheme)  # raises
    known = {"threshold"} if scheme == "outliers" else set()
    if set(numbers) != known or not all(type(value) in (int, float) for value in numbers.values()):
        raise ValueError(f"activations {entry!r} are not those of scheme {scheme}")
    return Activations(scheme, threshold=float(numbers.get("threshold", 0.0)))
