"""Scales per channel that are taken out of what makes a tensor and put into what reads it: AWQ's and SmoothQuant's.

A scale s is float64 [K], positive; column j of every reader is multiplied by s_j. Where a channel is always zero s is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nybble.calibrate.channels import Channels
from nybble.errors import NumericError
from nybble.formats import Format
from nybble.formats.base import blocked
from nybble.methods.steps.factor import loss_of
from nybble.methods.steps.fitting import Scales, fit_params

EXPONENTS = tuple(0.05 * i for i in range(20))
"""Of the activations' magnitudes; with 0 the plain family leaves the model as it is."""
ROWS = 512
"""Rows of each weight that all candidates are judged on; the best go on to all rows."""
FINALISTS = 2
SMALLEST = 1e-4
"""Clamp of AWQ's scales."""


@dataclass(frozen=True)
class Scaled:
    """A scale and what it was chosen for: squared errors at the readers' outputs, as shares of the outputs' own squares."""

    scale: Tensor
    """float64 [K]."""
    before: float | None = None
    """Without a scale; None: nothing was measured."""
    after: float | None = None


def tied(scale: Tensor, heads: tuple[int, int]) -> Tensor:
    """A scale [K] over the channels of query heads, made the same (the geometric mean) for those that share a value head;
    `heads` are (query heads, of them to a value head), side by side."""
    count, share = heads
    if share == 1:
        return scale
    groups = scale.reshape(count // share, share, -1)
    return groups.log().mean(1, keepdim=True).exp().expand_as(groups).reshape(-1)


def awq_scale(
    weights: Sequence[Tensor], formats: Sequence[Format], channels: Channels, scales: Scales, heads: tuple[int, int] = (1, 1)
) -> Scaled:
    """AWQ's scale for weights, float32 [N, K] each, that read the same channels (`heads`: see `tied`).

    Candidates are x^r (arXiv 2306.00978, equation 5) and x^r / (w^(1-r) + 1e-4) (the "duo" of llm-compressor's AWQ), with
    x = mean |x|, w the mean of |W| as a share of its block's largest, r = 0, .05 .. .95, divided by sqrt(max min).
    The loss is tr(E H E^T), E = Q(W s) / s - W, H the second moments, summed over the weights: that is the paper's error at the
    outputs without activations. All candidates are judged with plain ranges on some rows; the best and s = 1 with `scales`
    as the method sets them, on all rows: the result is never worse than s = 1 there.
    Raises NumericError where the weights do not fit their format, or the statistics are not finite.
    """
    hessian = channels.moment
    assert hessian is not None
    if not bool(torch.isfinite(hessian).all()):
        raise NumericError("the calibration statistics hold NaN or infinity: activations overflowed; calibrate on other text")
    some = [weight[:: -(-len(weight) // ROWS)] for weight in weights]
    coarse = hessian.float() / float(hessian.diagonal().mean() or 1.0)  # only the order counts; float32 holds no 1e40
    candidates = [tied(scale, heads) for scale in awq_candidates(weights, formats, channels.mean)]
    judged = [scaled_loss(some, formats, coarse, s, "range") for s in candidates]
    one = torch.ones_like(channels.mean)
    best, before = one, scaled_loss(weights, formats, hessian, one, scales)
    if before == float("inf"):
        for weight, fmt in zip(weights, formats, strict=True):  # raises what was the matter
            fit_params(fmt, weight.numpy(), scales)
    lowest = before
    for index in sorted(range(len(candidates)), key=judged.__getitem__)[:FINALISTS]:
        loss = scaled_loss(weights, formats, hessian, candidates[index], scales)
        if loss < lowest:
            best, lowest = candidates[index], loss
    energy = sum(float(loss_of(weight.double(), hessian).sum()) for weight in weights) or 1.0
    return Scaled(best, before / energy, lowest / energy)


def awq_candidates(weights: Sequence[Tensor], formats: Sequence[Format], mean: Tensor) -> list[Tensor]:
    """Both families at every exponent, float64 [K] each, for mean |x|, float64 [K]; the first is all ones."""
    live = mean > 0
    shares = sum(_shares(weight, fmt) * len(weight) for weight, fmt in zip(weights, formats, strict=True))
    share = torch.as_tensor(shares / sum(map(len, weights)))
    x = torch.where(live, mean, 1.0)
    found = []
    for family in (torch.zeros_like(mean), share):
        duo = family is share
        for r in EXPONENTS:
            scale = (x**r / (share ** (1 - r) + 1e-4) if duo else x**r).clamp(min=SMALLEST)
            if bool(live.any()):
                scale = scale / torch.sqrt(scale[live].max() * scale[live].min())
            found.append(torch.where(live, scale, 1.0))
    return found


def _shares(weight: Tensor, fmt: Format) -> Tensor:
    """float64 [K]: mean over rows of |W| as a share of its block's largest."""
    rows, columns = weight.shape
    size = np.abs(weight.numpy())
    # per tensor a block is the matrix; taken by rows, like one that is a row, so that one outlier does not flatten all
    view = blocked(size, "channel" if fmt.granularity == "tensor" else fmt.granularity)
    top = view.max(-1, keepdims=True)
    share = (view / np.where(top == 0, 1, top)).reshape(rows, -1)[:, :columns]
    return torch.from_numpy(share.mean(0, dtype=np.float64))


def scaled_loss(weights: Sequence[Tensor], formats: Sequence[Format], hessian: Tensor, scale: Tensor, scales: Scales) -> float:
    """Sum of tr(E H E^T), E = Q(W s) / s - W, over weights, float32 [N, K] each, rounded to nearest; infinity where the scaled
    weight does not fit its format. Computed in the Hessian's type."""
    total = 0.0
    importance = hessian.diagonal() / scale.square()
    importance = importance / importance.max().clamp(min=1e-30)
    for weight, fmt in zip(weights, formats, strict=True):
        wide = (weight * scale).float().numpy()
        try:
            params = fit_params(fmt, wide, scales, importance.float().numpy())
        except NumericError:
            return float("inf")
        value = torch.from_numpy(fmt.decode(fmt.encode(wide, params), params)).to(hessian.dtype)
        total += float(loss_of(value / scale.to(hessian.dtype) - weight, hessian).sum())
    return total


def smooth_scale(weights: Sequence[Tensor], channels: Channels, exponent: float, heads: tuple[int, int] = (1, 1)) -> Tensor:
    """SmoothQuant's scale (arXiv 2211.10438, equation 4): max|x_j|^a / max|W_:j|^(1-a), float64 [K], for weights, float32
    [N, K] each, that read the same channels (`heads`: see `tied`); both the column's largest and the result are at least 1e-5,
    as in its code."""
    largest = torch.stack([weight.abs().amax(0).double() for weight in weights]).amax(0).clamp(min=1e-5)
    scale = (channels.largest**exponent / largest ** (1 - exponent)).clamp(min=1e-5)
    return tied(torch.where(channels.largest > 0, scale, 1.0), heads)
