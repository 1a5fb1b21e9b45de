"""Static grids: from a histogram of a layer's inputs to one scale and zero point. Numpy, float64.

Every observer names the magnitude `limit` that the grid reaches; what lies beyond is cut to it.

    minmax       the largest magnitude seen
    percentile   the least upper limit of a bin below which 99.99 % of the inputs lie
    mse          of the upper limits of bins, that of the least squared error after rounding
    entropy      that of the least KL between the histogram, its tail added to the last bin kept, and the same merged to 128
                 levels and spread again over the bins that hold anything (TensorRT, "8-bit inference", GTC 2017)

mse and entropy try limits from bin 128 on, below which a level would be narrower than a bin.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nybble.calibrate.histogram import BINS, Histogram
from nybble.formats.activations import MIDDLE, Activations
from nybble.methods.steps.settings import Settings

LEVELS = 128
PERCENTILE = 0.9999
LOPSIDED = 4.0
"""Inputs that reach this many times as far on one side of zero as on the other get a zero point."""
STRIDE = 8
"""Bins between the limits that mse and entropy try; around mse's best then every one."""

Floats = NDArray[np.float64]


def static_grid(histogram: Histogram, settings: Settings) -> Activations:
    """The static scheme for inputs with this histogram; scale 1 where all of them were zero."""
    if histogram.low == histogram.high == 0:
        return Activations("static", scale=1.0, zero=MIDDLE)
    return grid_to(histogram, find_limit(histogram, settings), settings.lopsided)


def grid_to(histogram: Histogram, limit: float, lopsided: bool) -> Activations:
    """The grid that reaches `limit` on both sides, or on a side with inputs much smaller only as far as they do."""
    below, above = min(-histogram.low, limit), min(histogram.high, limit)
    if not lopsided or max(below, above) < LOPSIDED * min(below, above):
        return Activations("static", scale=_storable(limit / 127), zero=MIDDLE)
    scale = _storable((below + above) / 255)
    return Activations("static", scale=scale, zero=int(np.clip(np.rint(below / scale), 0, 255)))


def find_limit(histogram: Histogram, settings: Settings) -> float:
    """The magnitude that the grid reaches, above 0."""
    largest = max(-histogram.low, histogram.high)
    if settings.observer == "minmax":
        return largest
    if settings.observer == "percentile":
        reached = np.cumsum(histogram.magnitudes) >= PERCENTILE * histogram.magnitudes.sum()
        return min(largest, float(np.argmax(reached) + 1) * histogram.width)
    if settings.observer == "entropy":
        return min(largest, _entropy_bin(histogram.magnitudes) * histogram.width)
    last = min(BINS, int(np.ceil(largest / histogram.width)))

    def loss(bins: int) -> float:
        grid = grid_to(histogram, min(largest, bins * histogram.width), settings.lopsided)
        return squared_error(histogram, grid)

    tried = {bins: loss(bins) for bins in (*range(LEVELS, last, STRIDE), last)}
    best = min(tried, key=lambda bins: tried[bins])
    near = {bins: loss(bins) for bins in range(max(LEVELS, best - STRIDE + 1), min(last, best + STRIDE - 1) + 1)}
    tried.update(near)
    return min(largest, min(tried, key=lambda bins: tried[bins]) * histogram.width)


def squared_error(histogram: Histogram, grid: Activations) -> float:
    """Sum of squared errors of all inputs after rounding to a grid, a bin's inputs taken as spread evenly over it.

    In steps of the grid, the error of u is u - k with k = round(u), at most the last code; its square integrates from 0 to u
    to k / 12 + (u - k)^3 / 3. (The middles of bins alone would favour grids that the bins are a whole part of.)
    """
    total = 0.0
    for counts, last in zip(histogram.counts, (grid.zero, 255 - grid.zero), strict=True):
        edges = np.arange(BINS + 1) * (histogram.width / grid.scale)
        codes = np.minimum(np.rint(edges), last)
        total += float(counts @ np.diff(codes / 12 + (edges - codes) ** 3 / 3))
    return total * grid.scale**3 / histogram.width


def _entropy_bin(counts: NDArray[np.int64]) -> int:
    """How many bins are kept for the least KL; as many as hold anything where those are fewer than levels."""
    last = int(np.flatnonzero(counts)[-1]) + 1
    if last <= LEVELS:
        return last
    best, at = np.inf, last
    for bins in (*range(LEVELS, last, STRIDE), last):
        kept = counts[:bins].astype(np.float64)
        p = kept.copy()
        p[-1] += counts[bins:].sum()
        level = np.arange(bins) * LEVELS // bins
        filled = kept > 0
        share = np.bincount(level, kept, LEVELS) / np.maximum(np.bincount(level, filled, LEVELS), 1)
        q = np.where(filled, share[level], 0.0)
        kl = _divergence(p, q)
        if kl <= best:
            best, at = kl, bins
    return at


def _divergence(p: Floats, q: Floats) -> float:
    """KL of two histograms, in nats. Where the tail alone filled p's last bin, q has nothing there: infinite."""
    if not q.sum() or ((p > 0) & (q == 0)).any():
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    held = p > 0
    return float((p[held] * np.log(p[held] / q[held])).sum())


def _storable(scale: float) -> float:
    """A scale that float32 holds above 0."""
    return max(scale, float(np.finfo(np.float32).tiny))
