"""How large a layer's inputs are: a histogram of their magnitudes over calibration windows, for static grids.

2,048 bins from 0 to a range that is a power of two and doubles, bins merged in pairs, when something larger comes. So bin
limits are exact in float32 and the result depends on what was added, not on the order or on how it was cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nybble.calibrate.watching import watch_inputs
from nybble.errors import NumericError

BINS = 2048
LEAST = 2.0**-100
"""The range is at least this, so that a bin's width is a number that float32 holds in full."""


class Histogram:
    """Magnitudes of what was added, those below zero apart from the others."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros((2, BINS), dtype=np.int64)
        """[below zero, zero and above], bins ascending by magnitude; bin i holds i * width <= |x| < (i + 1) * width."""
        self.range = LEAST
        self.low = self.high = 0.0
        """Least and largest value seen; 0 counts as seen."""

    @property
    def width(self) -> float:
        """Of a bin."""
        return self.range / BINS

    @property
    def magnitudes(self) -> NDArray[np.int64]:
        """int64 [2048]: the histogram of |x|."""
        total: NDArray[np.int64] = self.counts.sum(0)
        return total

    def add(self, x: Tensor) -> None:
        """Count float32 values of any shape. Raises NumericError when one is not finite."""
        flat = x.detach().reshape(-1).float()
        if not len(flat):
            return
        low, high = (float(end) for end in torch.aminmax(flat))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NumericError("inputs are not finite in calibration, so they have no range; check the model's weights")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._reach(max(-low, high))
        bins = (flat.abs() * (BINS / self.range)).to(torch.int64)
        self.counts += torch.bincount(bins + (flat >= 0) * BINS, minlength=2 * BINS).numpy().reshape(2, BINS)

    def _reach(self, magnitude: float) -> None:
        """Double the range until it is above a magnitude."""
        while self.range <= magnitude:
            self.range *= 2
            merged = self.counts.reshape(2, BINS // 2, 2).sum(-1)
            self.counts = np.concatenate([merged, np.zeros_like(merged)], axis=1)


def input_histograms(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    windows: NDArray[np.integer[Any]],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Histogram]:
    """Name -> histogram of what a layer of the model is fed over token windows, integers [windows, tokens].

    Raises NumericError naming the layer when inputs are not finite.
    """
    found = {name: Histogram() for name in layers}

    def see(name: str, inputs: Tensor) -> None:
        try:
            found[name].add(inputs)
        except NumericError as error:
            raise NumericError(f"{name}: {error}") from error

    watch_inputs(model, layers.items(), windows, see, progress)
    return found
