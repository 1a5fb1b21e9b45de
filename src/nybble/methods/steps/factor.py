"""A Hessian made ready: dead columns, damping, the order of columns, and its factors.

With H = L diag(d) L^T, L unit upper triangular, the loss of an error E [N, K] is

    tr(E H E^T) = sum over columns j of  d_j |(E L)_j|^2

so a loop that takes columns from first to last can bring each term to its least in turn: column j aims at
T_j + (T - Q)[:, <j] L[<j, j], and what remains of the term is the rounding error there, weighted by its pivot d_j. This is
GPTQ (arXiv 2210.17323) without an inverse: d_j = 1 / U_jj^2 with U the Cholesky factor of H's inverse that GPTQ uses; equal
to LDLQ (QuIP, arXiv 2307.13304).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.errors import NumericError

LADDER = (1.0, 10.0, 100.0, 1000.0)
"""Multiples of the damping asked for, tried in turn until H is positive definite."""
ORDERS = ("groups", "activation", "natural")


@dataclass(frozen=True)
class Factor:
    """H, damped, as its loop reads it: all in the loop's order of columns."""

    order: Tensor
    """int64 [K]: the columns in the order they are rounded."""
    upper: Tensor
    """float64 [K, K], unit upper triangular."""
    pivots: Tensor
    """float64 [K]: the weight of each column's rounding error in the loss, in the loop's order."""
    damping: float
    """What was added to the diagonal, as a share of its mean."""
    dead: int
    """Columns that calibration never activated."""

    def pivots_by_column(self) -> Tensor:
        """`pivots` in the weight's order of columns."""
        return torch.empty_like(self.pivots).scatter_(0, self.order, self.pivots)


def factorize(hessian: Tensor, damping: float, order: str, block: int) -> Factor:
    """Factor of a Hessian, float64 [K, K], symmetric. `damping` is the share of the mean diagonal that is added to it.

    A dead column (zero diagonal) takes no part: its weights round to nearest. Raises NumericError for values that are not
    finite, and where no damping of the ladder makes H positive definite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise NumericError("the calibration statistics hold NaN or infinity: activations overflowed; calibrate on other text")
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    columns = order_of(diagonal, order, block)
    permuted = hessian[columns[:, None], columns]
    gone = dead[columns]
    permuted[gone] = 0
    permuted[:, gone] = 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    permuted.diagonal()[gone] = mean
    base = damping if damping > 0 else 1e-6
    for share in (*([0.0] if damping == 0 else []), *(base * step for step in LADDER)):
        damped = permuted.flip(0, 1)  # copies; K^2 doubles are the most memory of all, so that none lives longer than it must
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not int(failed):
            del permuted
            upper = lower.flip(0, 1)
            del lower
            root = upper.diagonal().clone()
            return Factor(columns, upper.div_(root), root.square(), share, int(dead.sum()))
    raise NumericError(
        f"the Hessian [{len(diagonal)}, {len(diagonal)}] is not positive definite even with {base * LADDER[-1]:g} of its mean "
        "diagonal added; give more calibration windows"
    )


def order_of(diagonal: Tensor, order: str, block: int) -> Tensor:
    """int64 [K]: columns in the order of a loop. `groups`: blocks by their largest diagonal, columns inside by theirs, both
    descending (the groups of a file stay whole: GPTQModel's "gar"); `activation`: by the diagonal alone; `natural`."""
    columns = len(diagonal)
    if order == "natural":
        return torch.arange(columns)
    if order == "activation":
        return torch.argsort(diagonal, descending=True, stable=True)
    starts = list(range(0, columns, block))
    largest = torch.stack([diagonal[start : start + block].max() for start in starts])
    runs = [
        starts[i] + torch.argsort(diagonal[starts[i] : starts[i] + block], descending=True, stable=True)
        for i in torch.argsort(largest, descending=True, stable=True).tolist()
    ]
    return torch.cat(runs)


def loss_of(error: Tensor, hessian: Tensor) -> Tensor:
    """float64 [N]: e H e^T of every row of an error [N, K]. What cancellation makes negative is zero."""
    return ((error @ hessian) * error).sum(1).clamp_(min=0)
