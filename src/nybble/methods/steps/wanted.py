"""Where each code stands in its own parabola: the real-valued level that would be best for it, all other codes given.

The layer's loss f(q) = (q - t) H (q - t)^T is a parabola along every single weight, with its vertex at
q_j - ((q - t) H)_j / H_jj. After rounding with feedback or refinement the code is the nearest to that vertex, though it may
be far from the nearest to the weight itself: at 2 bits, most are. So the vertex says what a change of the code would cost,
and tuning starts from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.calibrate.statistics import Statistics
from nybble.formats import QTensor
from nybble.methods.steps.grid import columns_of, grid_of
from nybble.methods.steps.settings import Settings

SLAB_ROWS = 4096
"""Rows worked on together: an embedding has 50,000, and float64 copies of it all would be the largest thing in memory."""


def wanted(tensor: QTensor, weight: Tensor, settings: Settings, stats: Statistics, damping: float) -> Tensor:
    """float32 [N, K]: the vertex of every weight less its decoded value, in steps of the format's levels. `weight` is the
    float one, [N, K]; `damping` is what was added to the Hessian's diagonal, as a share of its mean."""
    rows, columns = tensor.shape
    decoded, result = torch.from_numpy(tensor.decode()), torch.empty((rows, columns))
    wide = columns_of(grid_of(tensor.format, tensor.params)[0], columns, tensor.format.block(columns)).expand(rows, -1)
    for part, index in stats.parts(rows):
        moment = stats.moments[index]
        diagonal = moment.diagonal()
        added = damping * diagonal.mean()
        curve = diagonal + added
        for first in range(part.start, part.stop, SLAB_ROWS):
            slab = slice(first, min(first + SLAB_ROWS, part.stop))
            goal = weight[slab].double()
            if settings.target > 0 and stats.cross is not None:
                goal = stats.target(goal, index, settings.target, settings.ridge)
            move = goal - decoded[slab]
            if settings.hessian:  # a column that is never activated, and plain rounding, have every weight by itself
                slope = move @ moment + added * move
                move = torch.where(diagonal > 0, slope / torch.where(curve > 0, curve, 1.0), move)
            result[slab] = (move / torch.where(wide[slab] == 0, 1.0, wide[slab])).float()
    return result
