"""Second moments of a layer's inputs, summed window by window: products in float32, sums in float64, divided once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

CHUNK = 4
"""Windows that are summed on one thread before they are added to the others'."""
STEP = 512
"""Columns whose products are computed together."""


@dataclass
class Statistics:
    """What calibration knows of the inputs of one weight [N, K]: Y those of the model as quantized so far, X the float
    model's. A weight's rows may fall in equal groups whose tokens count differently."""

    moments: list[Tensor]
    """Per group of rows: 2/T sum of s_t y_t y_t^T, float64 [K, K]; s_t weighs tokens, mean 1."""
    cross: list[Tensor] | None = None
    """2/T sum of s_t x_t y_t^T, float64 [K, K]."""
    tokens: int = 0
    means: list[Tensor] | None = None
    """Weighted means of y_t, float64 [K], where moments are around them (and `cross` around both means); else None."""
    float_means: list[Tensor] | None = None
    """The same of x_t."""

    def around_zero(self) -> Statistics:
        """The same inputs, their moments not around their means."""
        if self.means is None:
            return self
        moments = [moment + 2 * torch.outer(mean, mean) for moment, mean in zip(self.moments, self.means, strict=True)]
        cross = None
        if self.cross is not None and self.float_means is not None:
            pairs = zip(self.cross, self.float_means, self.means, strict=True)
            cross = [each + 2 * torch.outer(x, y) for each, x, y in pairs]
        return Statistics(moments, cross, self.tokens)

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
        damped = moment.clone()
        damped.diagonal().add_(max(ridge, 1e-6) * moment.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            return weight
        pull = weight @ (self.cross[index] - moment)
        return weight + share * torch.cholesky_solve(pull.T, lower).T


@dataclass
class Sums:
    """Moments on their way: float32 sums over a few windows, then float64 over all of them."""

    moments: list[Tensor] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    centre: Tensor | None = None
    """float32 [K], near the mean of y, where moments are wanted around means: what is subtracted first. Moments less the
    square of a mean much larger than the spread would lose all digits."""
    sums: list[Tensor] = field(default_factory=list)
    """Sum of s_t (y_t - centre), float64 [K]; then the same of x, where there is one."""

    def add_window(self, y: Tensor, x: Tensor | None, counts: Sequence[Tensor | None]) -> None:
        """Add one window's activations [T, K]; `counts` weighs its tokens, float32 [T], per group of rows."""
        columns = y.shape[1]
        if self.centre is not None:
            y, x = y - self.centre, None if x is None else x - self.centre
            found = [
                (z if count is None else z * count[:, None]).sum(0).double() for z in (y, x) if z is not None for count in counts
            ]
            self.sums = [one + two for one, two in zip(self.sums, found, strict=True)] if self.sums else found
        if not self.moments:
            self.moments = [y.new_zeros(columns, columns) for _ in counts]
            self.cross = [] if x is None else [y.new_zeros(columns, columns) for _ in counts]
        for i, count in enumerate(counts):
            weighted = y if count is None else y * count[:, None]
            add_product(self.moments[i], weighted, y)
            if x is not None:
                self.cross[i].addmm_(x.T, weighted)
        self.tokens += len(y)

    def add(self, other: Sums) -> Sums:
        """Sums of these and others in float64; what is float64 here already is changed in place."""
        mine = [moment.double() for moment in [*self.moments, *self.cross]]
        for total, more in zip(mine, [*other.moments, *other.cross], strict=True):
            total += more
        sums = [one + two for one, two in zip(self.sums, other.sums, strict=True)]
        return Sums(mine[: len(self.moments)], mine[len(self.moments) :], self.tokens + other.tokens, self.centre, sums)

    def finish(self) -> Statistics:
        """Divide by the tokens. The factor 2 is that of GPTQ's Hessian."""
        factor = 2 / max(1, self.tokens)
        moments = []
        for moment in self.moments:
            upper = moment.double().triu_().mul_(factor)  # `moment` is not used again
            moments.append(upper.add_(upper.triu(1).T))
        found = Statistics(moments, [cross.double() * factor for cross in self.cross] or None, self.tokens)
        if self.centre is not None:  # weights have mean 1: the tokens are the sum of them
            means = [total / max(1, self.tokens) for total in self.sums]
            mine, floats = means[: len(moments)], means[len(moments) :]
            for moment, mean in zip(moments, mine, strict=True):
                moment -= 2 * torch.outer(mean, mean)
            for cross, x, y in zip(found.cross or (), floats, mine, strict=False):  # none without x
                cross -= 2 * torch.outer(x, y)
            found.means = [mean + self.centre for mean in mine]
            found.float_means = [mean + self.centre for mean in floats] or None
        return found


def add_product(total: Tensor, weighted: Tensor, y: Tensor) -> None:
    """Add weighted^T y to a symmetric sum [K, K], float32, of which only the upper triangle need be right: strips of rows
    from the diagonal on, so that each product of two columns is computed once."""
    columns = y.shape[1]
    for start in range(0, columns, STEP):
        total[start : start + STEP, start:].addmm_(weighted[:, start : start + STEP].T, y[:, start:])
