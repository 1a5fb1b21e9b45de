"""Search of the scale that minimises the importance-weighted squared error of a block.

For fixed codes the best scale is a quotient (`sum h w l / sum h l^2`, h importance, w weight, l level), and the loss
along the scale is piecewise a parabola. So: try a grid of ranges, keep the best per block, then alternate rounding and
the closed form. The result is rounded to storage precision and kept only where it beats the plain range it started from,
judged in float64: a searched scale is never worse.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nybble.errors import UsageError
from nybble.formats.base import Float32, Float64, Granularity, blocked

Blocks = NDArray[np.float32]
Snap = Callable[[Float32], Float32]

SHRINKS = np.linspace(0.35, 1.1, 40)
"""Ranges tried, as fractions of the block's largest magnitude."""
AFFINE_SHRINKS = np.linspace(0.5, 1.05, 9)
"""Ranges tried at each end of an asymmetric block: 81 pairs."""
REFITS = 3


def blocked_importance(importance: Float32, shape: tuple[int, int], granularity: Granularity) -> Blocks:
    """Importance [K] or [N, K] as [rows, blocks, columns of a block], float32. Raises UsageError for another shape or
    for values that are negative or not finite. A block without any importance counts all its columns alike."""
    check_importance(importance, shape)
    full = np.broadcast_to(importance.astype(np.float32), shape)
    view = np.array(blocked(full, granularity))
    view[view.sum(-1) == 0] = 1.0
    return view


def check_importance(importance: Float32, shape: tuple[int, int]) -> None:
    """Raise UsageError for importance of another shape than [K] or [N, K], or with values that are negative or not finite."""
    if importance.shape not in (shape, shape[1:]):
        raise UsageError(f"importance has shape {importance.shape}; a weight {shape} needs {shape[1:]} or {shape}")
    if not np.isfinite(importance).all() or (importance < 0).any():
        raise UsageError("importance holds negative or non-finite values; calibrate again on finite activations")


@np.errstate(over="ignore", invalid="ignore")  # a candidate whose loss overflows loses every comparison
def search_scale(
    view: Blocks, importance: Blocks, snap: Snap, top: float, plain: NDArray[np.floating], both_signs: bool
) -> NDArray[np.floating]:
    """Searched scales [rows, blocks] for codes without offset, in the dtype of `plain`, the scales to beat.

    `snap` maps weight / scale to the nearest level; `top` is the largest magnitude of a level.
    """
    largest = np.abs(view).max(-1)
    best = plain.astype(np.float32)
    lowest = _loss(view, importance, snap, best)
    for sign in (1.0, -1.0) if both_signs else (1.0,):
        for shrink in SHRINKS:
            scale = (largest * np.float32(sign * shrink / top)).astype(np.float32)
            _keep_better(best, lowest, scale, _loss(view, importance, snap, scale))
    for _ in range(REFITS):
        levels = snap(view / _divisor(best)[..., None])
        weighted = importance * levels
        square = np.einsum("rbk,rbk->rb", weighted, levels)
        scale = np.where(square > 0, np.einsum("rbk,rbk->rb", weighted, view) / np.where(square > 0, square, 1), best)
        if not both_signs:
            scale = np.abs(scale)
        _keep_better(best, lowest, scale.astype(np.float32), _loss(view, importance, snap, scale.astype(np.float32)))
    stored = best.astype(plain.dtype)
    stored = np.where(np.isfinite(stored), stored, plain)  # what overflows its storage type is no candidate
    better = exact_loss(view, importance, snap, stored) < exact_loss(view, importance, snap, plain)
    return np.where(better, stored, plain)


@np.errstate(over="ignore", invalid="ignore")
def search_affine(
    view: Blocks, importance: Blocks, bits: int, plain: NDArray[np.floating], plain_zero: NDArray[np.uint8]
) -> tuple[NDArray[np.floating], NDArray[np.uint8]]:
    """Searched (scale, integer zero point) of asymmetric blocks, to beat the plain ones given."""
    steps = 2**bits - 1
    low, high = np.minimum(view.min(-1), 0), np.maximum(view.max(-1), 0)
    best, best_zero = plain.astype(np.float32), plain_zero.astype(np.float32)
    lowest = _affine_loss(view, importance, steps, best, best_zero)
    for at_low in AFFINE_SHRINKS:
        for at_high in AFFINE_SHRINKS:
            scale = ((high * at_high - low * at_low) / steps).astype(np.float32)
            zero = np.clip(np.rint(-low * at_low / _divisor(scale)), 0, steps).astype(np.float32)
            loss = _affine_loss(view, importance, steps, scale, zero)
            better = loss < lowest
            best[better], best_zero[better], lowest[better] = scale[better], zero[better], loss[better]
    for _ in range(REFITS):
        levels = np.clip(np.rint(view / _divisor(best)[..., None]) + best_zero[..., None], 0, steps)
        levels -= best_zero[..., None]
        weighted = importance * levels
        square = np.einsum("rbk,rbk->rb", weighted, levels)
        scale = np.where(square > 0, np.einsum("rbk,rbk->rb", weighted, view) / np.where(square > 0, square, 1), best)
        scale = np.abs(scale).astype(np.float32)
        _keep_better(best, lowest, scale, _affine_loss(view, importance, steps, scale, best_zero))
    stored = best.astype(plain.dtype)
    stored = np.where(np.isfinite(stored), stored, plain)
    zero8 = best_zero.astype(np.uint8)
    better = _affine_loss(view, importance, steps, stored, zero8, np.float64) < _affine_loss(
        view, importance, steps, plain, plain_zero, np.float64
    )
    return np.where(better, stored, plain), np.where(better, zero8, plain_zero)


def exact_loss(view: Blocks, importance: Blocks, snap: Snap, scale: NDArray[np.floating]) -> Float64:
    """Weighted squared error per block [rows, blocks], in float64, of rounding to `scale` as stored."""
    wide = scale.astype(np.float64)[..., None]
    error = view - wide * snap(view / _divisor(wide))
    return np.einsum("rbk,rbk,rbk->rb", importance.astype(np.float64), error, error)


def _loss(view: Blocks, importance: Blocks, snap: Snap, scale: Float32) -> Float32:
    levels = snap(view / _divisor(scale)[..., None])
    levels *= scale[..., None]
    levels -= view
    levels *= levels
    levels *= importance
    return levels.sum(-1)


def _affine_loss(
    view: Blocks,
    importance: Blocks,
    steps: int,
    scale: NDArray[np.floating],
    zero: NDArray[np.generic],
    dtype: type[np.floating] = np.float32,
) -> NDArray[np.floating]:
    wide, offset = scale.astype(dtype)[..., None], zero.astype(dtype)[..., None]
    levels = np.clip(np.rint(view / _divisor(wide)) + offset, 0, steps)
    error = view - wide * (levels - offset)
    error *= error
    error *= importance
    return error.sum(-1)


def _keep_better(best: Float32, lowest: Float32, scale: Float32, loss: Float32) -> None:
    better = loss < lowest
    best[better], lowest[better] = scale[better], loss[better]


def _divisor(scale: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.where(scale == 0, scale.dtype.type(1), scale)
