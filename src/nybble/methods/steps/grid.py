"""Rounding to the values of a format when scale and offset are known: the inner step of every loop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nybble.formats import Format
from nybble.formats.base import Params, spread

Grid = tuple[Tensor, Tensor | None]
"""(scale, offset) as in `Chosen`."""


@dataclass
class Chosen:
    """Codes and the grid they stand on, for some rows of a weight. All tensors are changed in place by the loops."""

    codes: Tensor
    """uint8 [N, K]; float64, the values themselves, of `Floats`."""
    scale: Tensor
    """float64 [N or 1, blocks], values that the format can store."""
    offset: Tensor | None
    """float64, like `scale`; None: zero."""


class Snap:
    """The nearest value that a format holds. Equal to the format's `encode`, but column by column and in float64."""

    dtype = torch.uint8
    zero: float
    """The code of zero, where there is one."""

    def __init__(self, fmt: Format) -> None:
        levels = fmt.levels.astype(np.float64)
        self.zero = int(np.argmin(np.abs(levels)))
        ascending, codes = np.unique(levels, return_index=True)  # of two equal levels (FP4's zeros) the first
        self.levels = torch.from_numpy(levels)
        self._ascending = torch.from_numpy(ascending)
        self._midpoints = (self._ascending[1:] + self._ascending[:-1]) / 2
        self._codes = torch.from_numpy(codes.astype(np.uint8))
        self.shifted = fmt.shifted
        self._uniform = bool((np.diff(ascending) == 1).all()) and bool((codes == np.arange(len(codes))).all())

    def __call__(self, value: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        """Codes, uint8, of the values nearest to `value`; all arguments float64 and broadcast. Scale 0 gives any code."""
        if offset is not None and self.shifted:
            value = value - offset
        ratio = value / torch.where(scale == 0, 1.0, scale)
        if offset is not None and not self.shifted:
            ratio = ratio + offset
        if self._uniform:  # half to even
            return ratio.sub_(self._ascending[0]).round_().clamp_(0, len(self._ascending) - 1).to(torch.uint8)
        return self._codes[torch.bucketize(ratio, self._midpoints)]

    def value(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        """float64: what codes stand for."""
        level = self.levels[codes.long()]
        if offset is None:
            return level.mul_(scale)
        return level.mul_(scale).add_(offset) if self.shifted else level.sub_(offset).mul_(scale)


class Floats(Snap):
    """Floating formats while a weight is pruned: any value is its own code, and rounded to the format when all is done."""

    dtype = torch.float64

    def __init__(self) -> None:
        self.zero, self.shifted = 0.0, False

    def __call__(self, value: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        """The value."""
        return value

    def value(self, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        """The codes: they are values. A copy, as of others."""
        return codes.clone()


def grid_of(fmt: Format, params: Params) -> Grid:
    """A format's (scale, offset), float64 tensors [N or 1, blocks]."""
    scale, offset = fmt.grid(params)
    wide = torch.from_numpy(scale.astype(np.float64))
    return wide, None if offset is None else torch.from_numpy(offset.astype(np.float64))


def params_of(fmt: Format, scale: Tensor, offset: Tensor | None) -> Params:
    """The params whose grid this is; see `Format.from_grid`."""
    return fmt.from_grid(scale.numpy(), None if offset is None else offset.numpy())


def rows_of(grid: Grid, rows: slice, count: int) -> Grid:
    """The grid of some rows of a weight of `count`; as it is where all rows share it."""
    scale, offset = grid
    return (scale, offset) if scale.shape[0] != count else (scale[rows], None if offset is None else offset[rows])


def columns_of(grid: Tensor, columns: int, block: int) -> Tensor:
    """A grid [N or 1, blocks] as [N or 1, K or 1], one value a column."""
    return torch.from_numpy(spread(grid.numpy(), columns, block))


def decode(fmt: Format, chosen: Chosen, snap: Snap) -> Tensor:
    """float64 [N, K]: the weight that a choice stands for."""
    columns = chosen.codes.shape[1]
    block = fmt.block(columns)
    offset = None if chosen.offset is None else columns_of(chosen.offset, columns, block)
    return snap.value(chosen.codes, columns_of(chosen.scale, columns, block), offset)
