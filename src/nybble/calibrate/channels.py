"""What calibration knows of the channels of one tensor: their mean and largest magnitudes, and their second moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.calibrate.statistics import CHUNK, Sums
from nybble.calibrate.workers import Workers


@dataclass(frozen=True)
class Channels:
    """Over all tokens of all windows; float64."""

    mean: Tensor
    """[K]: mean |x_k|."""
    largest: Tensor
    """[K]: max |x_k|."""
    moment: Tensor | None
    """[K, K]: 2/T sum of x x^T, where asked for."""


def channels_of(inputs: Callable[[int], Tensor], windows: int, moments: bool, workers: Workers) -> Channels:
    """Statistics of the activations `inputs(w)`, float32 [T, K], of windows 0 to `windows` - 1. The result does not depend on
    the number of threads."""

    def chunk(start: int) -> tuple[Tensor, Tensor, int, Sums]:
        total, largest, tokens, sums = torch.zeros(()), torch.zeros(()), 0, Sums()
        with torch.no_grad():
            for w in range(start, min(start + CHUNK, windows)):
                x = inputs(w)
                size = x.abs()
                total = total + size.sum(0, dtype=torch.float64)
                largest = torch.maximum(largest, size.amax(0).double())
                tokens += len(x)
                if moments:
                    sums.add_window(x, None, [None])
        return total, largest, tokens, sums

    total, largest, tokens, sums = torch.zeros(()).double(), torch.zeros(()).double(), 0, None
    for more, larger, count, others in workers.map(chunk, range(0, windows, CHUNK)):
        total, largest, tokens = total + more, torch.maximum(largest, larger), tokens + count
        sums = others if sums is None else sums.add(others)
    return Channels(total / max(1, tokens), largest, sums.finish().moments[0] if moments and sums is not None else None)
