"""Rounding with feedback: column by column, the error so far is carried into what the next column aims at.

One loop for every format: scales of a block are fitted to what its columns aim at by then, weighted by the pivots, which
is exactly the loss that the loop leaves (see `factor`). With a diagonal Hessian this is rounding to nearest.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nybble.formats import Format
from nybble.methods.steps.factor import Factor
from nybble.methods.steps.fitting import Scales, fit_params
from nybble.methods.steps.grid import Chosen, Grid, Snap, columns_of, grid_of
from nybble.methods.steps.masks import kept_in_matrix, kept_in_rows, runs_of
from nybble.methods.steps.settings import Settings

STRIP = 128
"""Columns whose feedback is applied one by one; what they owe to later strips is one product."""


def round_with_feedback(
    target: Tensor, factor: Factor, fmt: Format, grid: Grid | None, scales: Scales, snap: Snap, mask: Mask | None = None
) -> Chosen:
    """Codes and grid for target rows, float64 [N, K]. The grid is given, or each block's is fitted when
    the loop comes to it, as `scales` says (a search is weighted by the pivots); its columns then must stand together in the
    loop's order. What `mask` does not keep becomes zero."""
    rows, columns = target.shape
    block = fmt.block(columns)
    goal = target.T[factor.order].contiguous()  # [K, N]: a column of the weight is a row of memory
    debt = torch.zeros_like(goal)  # target - rounded, of columns done
    codes = torch.empty((columns, rows), dtype=snap.dtype)
    keep = None if mask is None else mask.begin(factor, rows)
    if grid is not None:
        scale, offset = grid
        wide = columns_of(scale, columns, block).expand(-1, columns)[:, factor.order]
        wide_offset = None if offset is None else columns_of(offset, columns, block).expand(-1, columns)[:, factor.order]
    else:
        scale = torch.empty((rows, -(-columns // block)), dtype=torch.float64)
        offset, wide, wide_offset = None, torch.empty(0), None
    upper = factor.upper
    start = 0
    while start < columns:
        stop = _end_of_strip(start, columns, block, factor.order, whole_blocks=grid is None)
        strip = goal[start:stop] + upper[:start, start:stop].T @ debt[:start]
        if keep is not None and mask is not None:
            mask.strip(keep, _free_of_loss(strip, goal, upper, start, stop), start, stop, factor.pivots)
        first = start
        while first < stop:
            last = stop
            if grid is None:
                at = int(factor.order[first]) // block
                last = first + min(block, columns - at * block)
                inner = strip[first - start : last - start] + upper[start:first, first:last].T @ debt[start:first]
                wanted = _free_of_loss(inner, goal, upper, first, last)  # what the scale has to reach
                if keep is not None:
                    wanted = wanted * keep[first:last]
                s, o = _fit(fmt, wanted, factor.order[first:last], factor.pivots[first:last], scales)
                scale[:, at] = s[:, 0]
                if o is not None:
                    offset = torch.zeros_like(scale) if offset is None else offset
                    offset[:, at] = o[:, 0]
            for j in range(first, last):
                if keep is not None and mask is not None and mask.turns(j):
                    ahead = slice(j, min(j + mask.columns, stop))
                    inner = strip[j - start : ahead.stop - start] + upper[start:j, ahead].T @ debt[start:j]
                    mask.turn(keep, _free_of_loss(inner, goal, upper, j, ahead.stop), ahead, factor.pivots)
                aim = strip[j - start]
                if j > start:
                    aim = aim + upper[start:j, j] @ debt[start:j]
                if grid is None:
                    s_j, o_j = s[:, 0], None if o is None else o[:, 0]
                else:
                    s_j, o_j = wide[:, j], None if wide_offset is None else wide_offset[:, j]
                codes[j] = snap(aim, s_j, o_j)
                if keep is not None:
                    codes[j].masked_fill_(~keep[j], snap.zero)
                debt[j] = goal[j] - snap.value(codes[j], s_j, o_j)
            first = last
        start = stop
    result = torch.empty((rows, columns), dtype=snap.dtype)
    result[:, factor.order] = codes.T
    return Chosen(result, scale, offset)


def _free_of_loss(aims: Tensor, goal: Tensor, upper: Tensor, first: int, last: int) -> Tensor:
    """[columns, N]: the weights of columns `first` to `last` that would leave their terms of the loss at zero, whose `aims` have
    the debts of all columns before them."""
    return goal[first:last] + torch.linalg.solve_triangular(upper[first:last, first:last].T, aims - goal[first:last], upper=False)


class Mask:
    """Which weights the loop keeps: given before, or chosen as it comes to them by what losing them costs, the square of what a
    column aims at by then times its pivot (SparseGPT, arXiv 2301.00774, section 3.3): the least of all rows and columns of a
    strip, or of each row's run of columns when it is the run's turn. Those then stand in their natural order.
    """

    def __init__(self, settings: Settings, keep: Tensor | None) -> None:
        """`keep`, bool [N, K], is what is given before."""
        self._settings, self._keep = settings, keep
        runs = runs_of(settings) if keep is None else None
        self.columns = runs[1] if runs else 0
        """Of a run; 0 where there are none."""

    def begin(self, factor: Factor, rows: int) -> Tensor:
        """bool [K, N], in the loop's order, to be filled as the loop goes."""
        if self._keep is not None:
            return self._keep.T[factor.order].contiguous()
        return torch.ones((len(factor.order), rows), dtype=torch.bool)

    def strip(self, keep: Tensor, aims: Tensor, start: int, stop: int, pivots: Tensor) -> None:
        """A strip begins; `aims` [columns, N]. For runs of columns a guess, for scales to be fitted to."""
        if self._keep is None:
            scores = aims.square() * pivots[start:stop, None]
            keep[start:stop] = kept_in_matrix(scores.T.contiguous(), self._settings).T

    def turns(self, column: int) -> bool:
        """Whether a run of columns begins here."""
        return self.columns > 0 and column % self.columns == 0

    def turn(self, keep: Tensor, aims: Tensor, ahead: slice, pivots: Tensor) -> None:
        """A run of columns begins; `aims` [columns, N]."""
        scores = aims.square() * pivots[ahead, None]
        keep[ahead] = kept_in_rows(scores.T.contiguous(), self._settings).T


def _fit(fmt: Format, wanted: Tensor, order: Tensor, pivots: Tensor, scales: Scales) -> tuple[Tensor, Tensor | None]:
    """(scale, offset), float64 [N, 1], of one block whose columns [n, N] stand in the loop's order."""
    place = torch.argsort(order)
    weight = np.ascontiguousarray(wanted[place].T.numpy(), dtype=np.float32)
    importance = pivots[place].numpy()
    importance = (importance / max(importance.max(), 1e-300)).astype(np.float32)  # float32 holds no 1e40
    return grid_of(fmt, fit_params(fmt, weight, scales, importance))


def _end_of_strip(start: int, columns: int, block: int, order: Tensor, whole_blocks: bool) -> int:
    if not whole_blocks:
        return min(start + STRIP, columns)
    stop = start
    while stop < columns and (stop == start or stop + block - start <= STRIP):
        stop += min(block, columns - int(order[stop]) // block * block)
    return stop
