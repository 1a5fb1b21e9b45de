"""What is searched for ggml's formats where ggml's own rounding does not say it: their shapes, how they are searched, and
importance as the search takes it. The search itself is nybble.kernels.search (reference_search.py explains it).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from nybble import kernels
from nybble.errors import NumericError
from nybble.formats.base import Codes, Float32, check_finite
from nybble.formats.ggml_tries import EVEN, SAME_AS, WEIGHED
from nybble.formats.search import check_importance

RUN = 256
"""Columns that share d and dmin in the formats with scales of scales."""
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Levels of iq4_nl and iq4_xs."""
LARGEST_HALF = 65504.0
LEAST = 2.0**-40
"""Importance of less than this share of the largest of its run counts as none."""
UNIMPORTANT = 2.0**-20
"""What the columns of a block without any importance count against the largest of their run."""


@dataclass(frozen=True)
class Shape:
    """The numbers of one format."""

    bits: int
    block: int
    lowest: int
    """Level of code 0; 127 below zero: the table IQ4."""
    shifted: bool = False
    low: int = 1
    """Smallest multiplier of a block; 1, like `high`, where every block has a scale for itself."""
    high: int = 1
    fallback: str = "fp16"
    """What takes its place in rows that are no multiple of `run`."""

    @property
    def run(self) -> int:
        """Columns that share a float16."""
        return self.block if self.low == self.high else RUN

    @property
    def levels(self) -> Float32:
        """float32 [2**bits], ascending."""
        return np.array(IQ4 if self.lowest == IQ4[0] else range(self.lowest, self.lowest + 2**self.bits), np.float32)


SHAPES = {
    "q4_0": Shape(4, 32, -8),
    "q4_1": Shape(4, 32, 0, shifted=True),
    "q5_0": Shape(5, 32, -16),
    "q5_1": Shape(5, 32, 0, shifted=True),
    "q8_0": Shape(8, 32, -128),
    "iq4_nl": Shape(4, 32, IQ4[0]),
    "q2_k": Shape(2, 16, 0, True, 0, 15, "iq4_nl"),
    "q3_k": Shape(3, 16, -4, False, -32, 31, "iq4_nl"),
    "q4_k": Shape(4, 32, 0, True, 0, 63, "q5_0"),
    "q5_k": Shape(5, 32, 0, True, 0, 63, "q5_1"),
    "q6_k": Shape(6, 16, -32, False, -128, 127, "q8_0"),
    "iq4_xs": Shape(4, 32, IQ4[0], False, -32, 31, "iq4_nl"),
}


_PLAIN = {"q8_0": (127, -127)}
"""Steps of the plain range where they are not the lowest level, or the highest of shifted ones: ggml's scales of q8_0 are never
negative, and their sign matters where rounding to float16 makes them too small for the largest weight."""
_DIVIDERS: dict[str, tuple[float, float, float]] = {
    "q2_k": (12, 19, 0.5), "q3_k": (-32, -19, 1), "q4_k": (59, 75, 1), "q5_k": (59, 75, 1), "q6_k": (-128, -98, 2),
    "iq4_xs": (-32, -19, 1),
}  # fmt: skip
"""d is the largest scale of a run over one of these: from, to, step."""


@cache
def search_of(name: str, weighed: bool) -> kernels.Search:
    """How the format is searched."""
    shape = SHAPES[name]
    plain = _PLAIN.get(name, (2**shape.bits - 1 if shape.shifted else shape.lowest,))
    key = SAME_AS.get(name, name)
    tried = (WEIGHED if weighed else EVEN).get(key, ())
    tries = [(steps, 0.0) for steps in plain] + [each if isinstance(each, tuple) else (each, 0.0) for each in tried]
    return kernels.Search(
        shape.levels, shape.block, shape.run, shape.low, shape.high, shape.shifted, len(plain),
        np.array(tries, np.float32), np.arange(*_DIVIDERS.get(name, (1, 2, 1)), dtype=np.float32),
    )  # fmt: skip


def search(name: str, weight: Float32, importance: Float32 | None) -> kernels.Found:
    """Codes and stored numbers of a weight [N, K], importance [K] or [N, K]. Raises NumericError for weights that are not finite
    or whose scales overflow a float16, UsageError for importance that makes no sense."""
    shape = SHAPES[name]
    check_range(weight, shape)
    weights = None if importance is None else weigh(importance, weight.shape, shape)
    how = search_of(name, importance is not None)
    return kernels.search(np.require(weight, np.float32, ["C", "A"]), how, weights, kernels.cores())


def check_range(weight: Float32, shape: Shape) -> None:
    """Raise NumericError for weights that are not finite, and for those whose scale no float16 times a multiplier can be."""
    if not weight.size:
        return
    low, high = float(weight.min()), float(weight.max())
    if not np.isfinite([low, high]).all():
        check_finite(weight)
    reach = LARGEST_HALF * max(shape.high, -shape.low)
    span = high - low if shape.shifted else max(high, -low)
    steps = float(shape.levels[-1] - shape.levels[0] if shape.shifted else shape.levels[-1])
    if span > reach * steps:
        row, column = (int(i) for i in np.argwhere((weight == high) if high >= -low else (weight == low))[0])
        raise NumericError(
            f"scale {span / steps / max(shape.high, -shape.low):.3g} of block {(row, column // shape.block)} exceeds 65504, "
            "the largest float16; keep this tensor in float"
        )


def weigh(importance: Float32, shape: tuple[int, int], of: Shape) -> Float32:
    """Importance [K] or [N, K] as a search takes it, float32 [1, K] or [N, K]: at most 1 and as a whole power of two of what was
    given within a run; a block without any counts its columns alike, a run's too. Raises UsageError for another shape and for
    values that are negative or not finite."""
    check_importance(importance, shape)
    given = np.array(importance, np.float32).reshape(-1, shape[1] // of.run, of.run // of.block, of.block)
    largest = given.max((2, 3), keepdims=True)
    scaled = np.ldexp(given, -np.frexp(largest)[1])
    scaled[scaled < LEAST] = 0
    empty = ~scaled.any(-1, keepdims=True)
    np.copyto(scaled, np.float32(UNIMPORTANT), where=empty)
    np.copyto(scaled, np.float32(1), where=largest == 0)
    return scaled.reshape(-1, shape[1])


def nearest(name: str, weight: Float32, scale: Float32, offset: Float32 | None) -> Codes:
    """Codes of the levels nearest to a weight [N, K] on a grid [N, blocks]. Raises NumericError where a weight is not finite."""
    check_finite(weight)
    shape = SHAPES[name]
    wide = None if offset is None else np.ascontiguousarray(offset)
    return kernels.nearest(
        np.require(weight, np.float32, ["C", "A"]), shape.levels, shape.block, np.ascontiguousarray(scale), wide, kernels.cores()
    )


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
