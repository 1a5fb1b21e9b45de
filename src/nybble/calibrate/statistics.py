"""Second moments of a layer's inputs, summed window by window: products in float32, sums in float64, divided once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

HALVED = 1024
"""From so many columns on, a symmetric product is computed by halves."""
STEP = 512


@dataclass
class Statistics:
    """What calibration knows of the inputs of one weight [N, K]: Y those of the model as quantized so far, X the float
    model's. A weight's rows may fall in equal groups whose tokens count differently."""

    moments: list[Tensor]
    """Per group of rows: 2/T sum of s_t y_t y_t^T, float64 [K, K]; s_t weighs tokens, mean 1."""
    cross: list[Tensor] | None = None
    """2/T sum of s_t x_t y_t^T, float64 [K, K]."""
    tokens: int = 0

    def parts(self, rows: int) -> list[tuple[slice, int]]:
        """(rows, index of their moments) for each group of a weight's rows."""
        step = -(-rows // len(self.moments))
        return [(slice(i * step, min((i + 1) * step, rows)), i) for i in range(len(self.moments))]

    def importance(self) -> Tensor:
        """float64 [K]: mean square of every column, up to a factor."""
        return torch.stack([moment.diagonal() for moment in self.moments]).mean(0)

    def target(self, weight: Tensor, index: int, share: float, ridge: float) -> Tensor:
        """float64 [N, K]: W + share W (C - H) (H + ridge I)^-1, ridge in mean diagonals.

        At share 1 and ridge 0 this is the Q for which |X W^T - Y Q^T|^2 is least, and at any Q that loss exceeds its least
        by tr((Q - target) H (Q - target)^T); the ridge pulls towards W.
        """
        assert self.cross is not None
        moment = self.moments[index]
        eye = torch.eye(len(moment), dtype=torch.float64)
        lower, failed = torch.linalg.cholesky_ex(moment + max(ridge, 1e-6) * moment.diagonal().mean() * eye)
        if int(failed):
            return weight
        pull = weight @ (self.cross[index] - moment)
        return weight + share * torch.cholesky_solve(pull.T, lower).T


@dataclass
class Sums:
    """Moments on their way: sums over windows, float64."""

    moments: list[Tensor] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)
    tokens: int = 0

    def add_window(self, y: Tensor, x: Tensor | None, counts: Sequence[Tensor | None]) -> None:
        """Add one window's activations [T, K]; `counts` weighs its tokens, float32 [T], per group of rows."""
        fresh = not self.moments
        for i, count in enumerate(counts):
            weighted = y if count is None else y * count[:, None]
            moment = second_moment(y) if count is None else weighted.T @ y
            crossed = None if x is None else x.T @ weighted
            if fresh:
                self.moments.append(moment.double())
                if crossed is not None:
                    self.cross.append(crossed.double())
            else:
                self.moments[i] += moment
                if crossed is not None:
                    self.cross[i] += crossed
        self.tokens += len(y)

    def add(self, other: Sums) -> Sums:
        """These sums with others added, in place."""
        for mine, theirs in zip([*self.moments, *self.cross], [*other.moments, *other.cross], strict=True):
            mine += theirs
        self.tokens += other.tokens
        return self

    def finish(self) -> Statistics:
        """Divide by the tokens. The factor 2 is that of GPTQ's Hessian."""
        factor = 2 / max(1, self.tokens)
        moments = [(moment + moment.T) * (factor / 2) for moment in self.moments]
        return Statistics(moments, [cross * factor for cross in self.cross] or None, self.tokens)


def second_moment(y: Tensor) -> Tensor:
    """float32 [K, K]: y^T y for activations [T, K]; each product of two columns is computed once where that pays."""
    columns = y.shape[1]
    if columns < HALVED:
        return y.T @ y
    result = y.new_empty(columns, columns)
    for start in range(0, columns, STEP):
        stop = min(start + STEP, columns)
        strip = y[:, start:stop].T @ y[:, start:]
        result[start:stop, start:] = strip
        result[start:, start:stop] = strip.T
    return result
