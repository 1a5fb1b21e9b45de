"""The codes of one weight, from its statistics and a method's settings; never worse than rounding to nearest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.calibrate.statistics import Statistics
from nybble.formats import Format, QTensor
from nybble.formats.base import Params
from nybble.methods.steps.factor import Factor, factorize, loss_of
from nybble.methods.steps.fitting import fit_params
from nybble.methods.steps.grid import Chosen, Floats, Grid, Snap, columns_of, decode, grid_of, params_of, rows_of
from nybble.methods.steps.masks import check_zero, kept_in_matrix, kept_in_rows, runs_of
from nybble.methods.steps.refinement import refine
from nybble.methods.steps.rounding import Mask, round_with_feedback
from nybble.methods.steps.settings import Settings

SLAB_ROWS = (128, 1024)
"""Rows that are worked on together: half of a group of rows, but at least and at most so many. Small slabs would spend their
time between operations, large ones leave nothing to other threads. It must not depend on how many there are: what a slab
gives depends on nothing outside it."""
Each = Callable[[Callable[[int], None], Iterable[int]], None]
"""Calls a function with every index, in any order, perhaps on several threads."""


def in_turn(function: Callable[[int], None], indices: Iterable[int]) -> None:
    """The plain `Each`."""
    for index in indices:
        function(index)


@dataclass(frozen=True)
class Account:
    """What a method did to one weight. Losses are squared errors of the layer's outputs on its inputs, as shares of the
    outputs' own squares: tr(E H E^T) / tr(W H W^T). What tuning does afterwards is not in them: it looks at predictions."""

    loss_of_rounding: float
    """Of plain rounding to nearest."""
    loss: float
    damping: float
    """What was added to the Hessian's diagonal, as a share of its mean; more than asked for where that did not do."""
    dead_columns: int
    """Columns that calibration never activated."""
    rows_fallen_back: int
    """Rows for which rounding to nearest was better than the loop, and was taken."""


def choose(
    weight: NDArray[np.float32], fmt: Format, settings: Settings, stats: Statistics, each: Each = in_turn
) -> tuple[QTensor, Account]:
    """QTensor for a float32 weight [N, K], and the account of it.

    Raises NumericError as the format does (weights that are not finite) and as `factorize` does (statistics).
    """
    snap = Floats() if fmt.is_cast else Snap(fmt)
    keep, rounded = None, weight
    if settings.prunes:
        check_zero(fmt)
        by_magnitude = kept_in_matrix(torch.from_numpy(np.abs(weight)), settings)
        rounded = np.where(by_magnitude.numpy(), weight, np.float32(0))  # not -0, as a product would have it
        keep = by_magnitude if settings.mask == "magnitude" else None
    codes, plain_params = fmt.round(rounded)
    plain = Chosen(torch.from_numpy(rounded).double() if fmt.is_cast else torch.from_numpy(codes), *grid_of(fmt, plain_params))
    shared = None
    if not fmt.independent or fmt.blocks((weight.shape[0], weight.shape[1]))[0] == 1:  # params that rows share
        shared = fit_params(fmt, rounded, settings.scales, _normalised(stats.importance()))
    work = _Weight(torch.from_numpy(weight), fmt, settings, snap, plain, shared, keep)
    damping = 0.0
    dead = 0
    for rows, index in stats.parts(weight.shape[0]):
        factor = work.part(rows, stats, index, each)
        damping, dead = max(damping, factor.damping), max(dead, factor.dead)
    params = shared if shared is not None else params_of(fmt, work.result.scale, work.result.offset)
    as_one = shared is not None and not settings.target and not settings.prunes  # nothing to mix row by row
    if as_one and work.after.sum() > work.before.sum():
        params, work.result, work.after = plain_params, plain, work.before
        work.fallen[:] = True
    energy = float(work.energies.sum()) or 1.0
    account = Account(float(work.before.sum()) / energy, float(work.after.sum()) / energy, damping, dead, int(work.fallen.sum()))
    if fmt.is_cast:
        return QTensor(fmt, *fmt.round(work.result.codes.numpy().astype(np.float32))), account
    return QTensor(fmt, work.result.codes.numpy(), params), account


class _Weight:
    """One weight while its codes are chosen, group of rows by group of rows."""

    def __init__(
        self,
        weight: Tensor,
        fmt: Format,
        settings: Settings,
        snap: Snap,
        plain: Chosen,
        shared: Params | None,
        keep: Tensor | None,
    ) -> None:
        rows = weight.shape[0]
        self.keep = keep
        self.weight, self.fmt, self.settings, self.snap, self.plain, self.shared = weight, fmt, settings, snap, plain, shared
        self.result = Chosen(plain.codes.clone(), plain.scale.clone(), None if plain.offset is None else plain.offset.clone())
        self.before, self.after = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
        self.fallen = torch.zeros(rows, dtype=torch.bool)
        self.energies = torch.zeros(rows, dtype=torch.float64)

    def part(self, rows: slice, stats: Statistics, index: int, each: Each) -> Factor:
        """Choose for the rows of one group; they share a Hessian."""
        columns = self.weight.shape[1]
        hessian = stats.moments[index]
        in_turn = self.settings.mask == "feedback" and runs_of(self.settings) is not None  # runs of neighbours, one by one
        order = "natural" if in_turn else self.settings.order
        factor = factorize(hessian, self.settings.damp, order, self.fmt.block(columns))
        damped = None
        if self.settings.refine:
            damped = hessian.clone()
            damped.diagonal().add_(factor.damping * hessian.diagonal().mean())
        target = self.weight[rows]  # float32: in float64 a head's would be the most memory of all
        if self.settings.target > 0 and stats.cross is not None:
            target = stats.target(target.double(), index, self.settings.target, self.settings.ridge)
        keep = self._kept(rows, target, hessian, factor)
        if self.shared is not None:
            grid: Grid | None = rows_of(grid_of(self.fmt, self.shared), rows, len(self.weight))
        else:
            grid = self._grid_before(target if keep is None else target * keep, factor, hessian)
        if self.settings.mask == "feedback":
            keep = None  # the loop chooses by what columns aim at when it comes to them

        least, most = SLAB_ROWS
        step = min(max(-(-(rows.stop - rows.start) // (2 * least)) * least, least), most)

        def slab(start: int) -> None:
            self._slab(slice(start, min(start + step, rows.stop)), rows, target, hessian, damped, factor, grid, keep)

        each(slab, range(rows.start, rows.stop, step))
        return factor

    def _kept(self, rows: slice, target: Tensor, hessian: Tensor, factor: Factor) -> Tensor | None:
        """bool, like target: which weights of a group of rows are not pruned; None: none are."""
        if not self.settings.prunes:
            return None
        if self.keep is not None:
            return self.keep[rows]
        if self.settings.mask == "activations":
            return kept_in_rows(self.weight[rows].abs() * hessian.diagonal().clamp(min=0).sqrt(), self.settings)
        return kept_in_matrix(target.square() * factor.pivots_by_column(), self.settings)

    def _slab(
        self,
        rows: slice,
        part: slice,
        target: Tensor,
        hessian: Tensor,
        damped: Tensor | None,
        factor: Factor,
        grid: Grid | None,
        keep: Tensor | None,
    ) -> None:
        fmt, settings, snap = self.fmt, self.settings, self.snap
        inside = slice(rows.start - part.start, rows.stop - part.start)
        goal, weight = target[inside].double(), self.weight[rows].double()
        mine = None if grid is None else rows_of(grid, inside, len(target))
        if settings.feedback:
            mask = Mask(settings, None if keep is None else keep[inside]) if settings.prunes else None
            got = round_with_feedback(goal, factor, fmt, mine, settings.scales, snap, mask)
        else:
            assert mine is not None
            block = fmt.block(goal.shape[1])
            wide = [None if each is None else columns_of(each, goal.shape[1], block) for each in mine]
            assert wide[0] is not None
            got = Chosen(snap(goal, wide[0], wide[1]).clone(), *mine)
            if keep is not None:
                got.codes.masked_fill_(~keep[inside], snap.zero)
        plain = self._plain(rows)
        plain_value = decode(fmt, plain, snap)
        losses, of_plain = loss_of(decode(fmt, got, snap) - goal, hessian), loss_of(plain_value - goal, hessian)
        if self.shared is None and not settings.prunes:  # other weights would be zero in some rows than in others
            worse = losses > of_plain
            got, losses = _mix(worse, plain, got), torch.where(worse, of_plain, losses)
            self.fallen[rows] = worse
        if damped is not None:
            got = refine(goal, damped, fmt, got, settings.refine, snap, settings.prunes)
        self.result.codes[rows] = got.codes
        if self.shared is None:
            self.result.scale[rows] = got.scale
            if self.result.offset is not None and got.offset is not None:
                self.result.offset[rows] = got.offset
        self.energies[rows] = loss_of(weight, hessian)
        aims_at_weight = not settings.target
        self.before[rows] = of_plain if aims_at_weight else loss_of(plain_value - weight, hessian)
        known = aims_at_weight and not settings.refine
        self.after[rows] = losses if known else loss_of(decode(fmt, got, snap) - weight, hessian)

    def _plain(self, rows: slice) -> Chosen:
        return Chosen(self.plain.codes[rows], *rows_of((self.plain.scale, self.plain.offset), rows, len(self.weight)))

    def _grid_before(self, target: Tensor, factor: Factor, hessian: Tensor) -> Grid | None:
        """The grid fitted before the loop, where a block is the whole row, or the order of columns tears blocks apart; None
        where the loop fits it block by block."""
        settings, columns = self.settings, self.weight.shape[1]
        if settings.feedback and self.fmt.block(columns) < columns and settings.order != "activation":
            return None
        weights = hessian.diagonal() if settings.importance else torch.ones(columns)
        if settings.feedback:
            weights = factor.pivots_by_column()
        return grid_of(self.fmt, fit_params(self.fmt, target.numpy().astype(np.float32), settings.scales, _normalised(weights)))


def _mix(worse: Tensor, plain: Chosen, got: Chosen) -> Chosen:
    pick = worse[:, None]
    offset = None if got.offset is None or plain.offset is None else torch.where(pick, plain.offset, got.offset)
    return Chosen(torch.where(pick, plain.codes, got.codes), torch.where(pick, plain.scale, got.scale), offset)


def _normalised(weights: Tensor) -> NDArray[np.float32]:
    """float32, the largest 1: float32 would not hold some Hessians."""
    return (weights / max(float(weights.max()), 1e-300)).numpy().astype(np.float32)
