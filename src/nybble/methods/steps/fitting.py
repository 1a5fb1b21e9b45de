"""Scales and offsets of a weight as a method's settings want them: from the plain range, searched, or half-quadratic.

Half-quadratic (HQQ, Badri and Shaji 2023, mobiusml.github.io/hqq_blog): no data; minimise |W - Q|_p^p with p below 1, for
which a few large errors cost less than they do squared, so that outliers do not set the scale of their block. With an
auxiliary error E the problem falls in two closed forms that take turns: E is W - Q shrunk by the proximal operator of the
p-norm, and the grid is the least-squares fit of W - E. Differences from the paper and its code: they keep a float zero point
and fit that alone; files hold whole ones, so here the scale is fitted with the zero point as stored (for formats without
offset the scale alone). Errors are shrunk in units of the mean gap between two values of a block, so that `BETA` means the same
for every weight and format; in those of the weights, as in the code, next to nothing of a usual weight's error is beyond it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nybble.formats import Format
from nybble.formats.base import Float32, Float64, Params, blocked, slabs

Scales = Literal["range", "search", "hqq"]
POWER = 0.7
BETA = 10.0
KAPPA = 1.01
"""`BETA` grows by this each round, so less and less is left to the auxiliary error."""
ROUNDS = 20


def fit_params(fmt: Format, weight: Float32, scales: Scales, importance: Float32 | None = None) -> Params:
    """Params of a format for a float32 weight [N, K]. `importance`, float32 [K], weighs the columns in a search; None: all
    alike. Raises NumericError as `Format.fit` does."""
    if scales == "hqq" and not fmt.is_cast:
        return fit_half_quadratic(fmt, weight)
    if scales == "search" and not fmt.is_cast:
        return fmt.fit(weight, np.ones(weight.shape[1], np.float32) if importance is None else importance)
    return fmt.fit(weight)


def fit_half_quadratic(fmt: Format, weight: Float32) -> Params:
    """Params, in storage precision, whose error |W - Q|_p^p is never above that of the plain range: block by block where the
    format's blocks are independent, else over the whole weight. Raises NumericError as `Format.fit` does."""
    plain = fmt.fit(weight)
    scale, offset = _grid(fmt, plain)
    of_rows = scale.shape[0] == weight.shape[0]
    for rows in slabs(weight.shape) if of_rows else [slice(None)]:
        found, zero = _rounds(fmt, weight[rows], scale[rows], None if offset is None else offset[rows])
        scale[rows] = found
        if offset is not None and zero is not None:
            offset[rows] = zero
    params = fmt.from_grid(scale, offset)
    if fmt.independent:
        return params
    return min(params, plain, key=lambda p: float(half_quadratic_loss(fmt, weight, p).sum()))


def half_quadratic_loss(fmt: Format, weight: Float32, params: Params) -> Float64:
    """float64 [N, blocks] or [1, 1]: the sum of |W - Q|^p over each block, W float32 [N, K] rounded to nearest."""
    error = np.abs(weight - fmt.decode(fmt.encode(weight, params), params))
    loss: Float64 = (blocked(error, fmt.granularity) ** POWER).sum(-1, dtype=np.float64)
    return loss


class _Blocks:
    """A weight seen block by block."""

    def __init__(self, fmt: Format, weight: Float32) -> None:
        self.fmt, self.weight = fmt, weight
        self.view = blocked(weight, fmt.granularity).astype(np.float64)
        self.real = blocked(np.ones(weight.shape, bool), fmt.granularity)  # the last block of a row may be filled up

    def error(self, scale: Float64, offset: Float64 | None) -> tuple[Float64, Float64]:
        """(W - Q, levels of Q's codes), float64 [rows, blocks, columns], of rounding to nearest on a stored grid."""
        codes = self.fmt.encode(self.weight, self.fmt.from_grid(scale, offset))
        level = blocked(self.fmt.levels[codes], self.fmt.granularity).astype(np.float64)
        if offset is None:
            value = scale[..., None] * level
        elif self.fmt.shifted:
            value = scale[..., None] * level + offset[..., None]
        else:
            value = scale[..., None] * (level - offset[..., None])
        return np.where(self.real, self.view - value, 0.0), level

    @staticmethod
    def loss(error: Float64) -> Float64:
        total: Float64 = (np.abs(error) ** POWER).sum(-1)
        return total


def _rounds(fmt: Format, weight: Float32, scale: Float64, offset: Float64 | None) -> tuple[Float64, Float64 | None]:
    """The best stored grid met on the way, from a stored one."""
    blocks = _Blocks(fmt, weight)
    gap = float(np.ptp(fmt.levels)) / (len(fmt.levels) - 1)
    best, best_offset = scale.copy(), None if offset is None else offset.copy()
    error, level = blocks.error(scale, offset)
    lowest, mean, beta = blocks.loss(error), float(np.abs(error).mean()), BETA
    for _ in range(ROUNDS):
        unit = gap * np.where(scale == 0, 1.0, np.abs(scale))[..., None]
        target = blocks.view - unit * shrink(error / unit, beta)
        scale, offset = _grid(fmt, fmt.from_grid(*_refit(fmt, target, level, blocks.real, scale, offset)))
        error, level = blocks.error(scale, offset)
        loss = blocks.loss(error)
        better = loss < lowest if fmt.independent else np.full(loss.shape, loss.sum() < lowest.sum())
        best, lowest = np.where(better, scale, best), np.where(better, loss, lowest)
        if best_offset is not None and offset is not None:
            best_offset = np.where(better, offset, best_offset)
        before, mean, beta = mean, float(np.abs(error).mean()), beta * KAPPA
        if mean >= before:
            break
    return best, best_offset


def shrink(error: Float64, beta: float) -> Float64:
    """float64, any shape: sign(e) max(|e| - |e|^(p-1) / beta, 0), the generalised soft threshold of HQQ's equation for E."""
    size = np.abs(error)
    safe = np.where(size == 0, 1.0, size)
    result: Float64 = np.sign(error) * np.maximum(size - safe ** (POWER - 1) / beta, 0.0)
    return result


def _refit(
    fmt: Format, target: Float64, level: Float64, real: NDArray[np.bool_], scale: Float64, offset: Float64 | None
) -> tuple[Float64, Float64 | None]:
    """The grid whose values at these levels are nearest to `target`, in least squares."""
    if offset is not None:  # first the line through (level, target), for its zero
        count = real.sum(-1)
        middle, height = np.where(real, level, 0).sum(-1) / count, np.where(real, target, 0).sum(-1) / count
        run = np.where(real, level - middle[..., None], 0.0)
        square, slope = (run * run).sum(-1), (run * target).sum(-1)
        fits = (square > 0) & (slope > 0)
        line = np.where(fits, slope / np.where(square > 0, square, 1.0), 1.0)
        offset = np.where(fits, height - middle * line if fmt.shifted else middle - height / line, offset)
        # as it is stored: the scale is fitted to that
        offset = _grid(fmt, fmt.from_grid(scale, offset))[1]
        assert offset is not None
        if fmt.shifted:
            target = np.where(real, target - offset[..., None], 0.0)
        else:
            level = level - offset[..., None]
    level = np.where(real, level, 0.0)
    square, slope = (level * level).sum(-1), (level * target).sum(-1)
    return np.where((square > 0) & (slope > 0), slope / np.where(square > 0, square, 1.0), scale), offset


def _grid(fmt: Format, params: Params) -> tuple[Float64, Float64 | None]:
    scale, offset = fmt.grid(params)
    return scale.astype(np.float64), None if offset is None else offset.astype(np.float64)
