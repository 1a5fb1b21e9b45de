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

STRIP = 128
"""Columns whose feedback is applied one by one; what they owe to later strips is one product."""


def round_with_feedback(target: Tensor, factor: Factor, fmt: Format, grid: Grid | None, scales: Scales, snap: Snap) -> Chosen:
    """Codes and grid for target rows, float64 [N, K]. The grid is given, or each block's is fitted when
    the loop comes to it, as `scales` says (a search is weighted by the pivots); its columns then must stand together in the
    loop's order."""
    rows, columns = target.shape
    block = fmt.block(columns)
    goal = target.T[factor.order].contiguous()  # [K, N]: a column of the weight is a row of memory
    debt = torch.zeros_like(goal)  # target - rounded, of columns done
    codes = torch.empty((columns, rows), dtype=torch.uint8)
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
        first = start
        while first < stop:
            last = stop
            if grid is None:
                at = int(factor.order[first]) // block
                last = first + min(block, columns - at * block)
                inner = strip[first - start : last - start] + upper[start:first, first:last].T @ debt[start:first]
                owed = inner - goal[first:last]
                # the weights that would make the loss of these columns zero: what the scale has to reach
                wanted = goal[first:last] + torch.linalg.solve_triangular(upper[first:last, first:last].T, owed, upper=False)
                s, o = _fit(fmt, wanted, factor.order[first:last], factor.pivots[first:last], scales)
                scale[:, at] = s[:, 0]
                if o is not None:
                    offset = torch.zeros_like(scale) if offset is None else offset
                    offset[:, at] = o[:, 0]
            for j in range(first, last):
                aim = strip[j - start]
                if j > start:
                    aim = aim + upper[start:j, j] @ debt[start:j]
                if grid is None:
                    s_j, o_j = s[:, 0], None if o is None else o[:, 0]
                else:
                    s_j, o_j = wide[:, j], None if wide_offset is None else wide_offset[:, j]
                codes[j] = snap(aim, s_j, o_j)
                debt[j] = goal[j] - snap.value(codes[j], s_j, o_j)
            first = last
        start = stop
    result = torch.empty((rows, columns), dtype=torch.uint8)
    result[:, factor.order] = codes.T
    return Chosen(result, scale, offset)


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
