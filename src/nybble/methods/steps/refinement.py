"""Refinement: every stored number is a coordinate, and along each the loss is a parabola.

Given all the others, the decoded row q is linear in any one code, scale or offset; f(q) = (q - t) H (q - t)^T has its
vertex along that line, and the best storable value is the one nearest to the vertex. So: round after round, for every
block its codes, then its scale, then its offset. Each step is taken only if the loss falls: it never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.formats import Format
from nybble.methods.steps.grid import Chosen, Snap, columns_of, grid_of, params_of

STRIP = 128
ENOUGH = 1e-3
"""A round that lowers a slab's loss by less than this share is the last."""


def refine(target: Tensor, hessian: Tensor, fmt: Format, chosen: Chosen, rounds: int, snap: Snap, pruned: bool = False) -> Chosen:
    """A better choice for target rows, float64 [N, K], under a Hessian [K, K] without dead columns left zero. Of weights that are
    pruned, what is zero stays so."""
    columns = target.shape[1]
    block = fmt.block(columns)
    diagonal = hessian.diagonal().clone()
    live = diagonal > 0
    diagonal[~live] = 1.0
    scales = fmt.independent and chosen.scale.shape[0] == target.shape[0]
    codes = chosen.codes.T.contiguous()  # [K, N]
    scale, offset = chosen.scale.clone(), None if chosen.offset is None else chosen.offset.clone()
    value = _values(codes, scale, offset, block, snap)
    keep = codes != snap.zero if pruned else None
    goal = target.T.contiguous()
    before = float("inf")
    for _ in range(rounds):
        slope = hessian @ (value - goal)  # [K, N]: half the gradient of the loss
        loss = float((slope * (value - goal)).sum())
        if not loss < before * (1 - ENOUGH):
            break
        before = loss
        for start in range(0, columns, min(block, columns)):
            stop = min(start + block, columns)
            at = start // block
            s = scale[:, min(at, scale.shape[1] - 1)]
            o = None if offset is None else offset[:, min(at, scale.shape[1] - 1)]
            for first in range(start, stop, STRIP):
                last = min(first + STRIP, stop)
                _sweep(codes, value, slope, hessian, diagonal, live, first, last, s, o, snap, keep)
            if scales and snap.dtype is torch.uint8:
                s, o = _move_grid(fmt, codes, value, slope, hessian, start, stop, s, o, snap)
                scale[:, at] = s
                if o is not None and offset is not None:
                    offset[:, at] = o
    return Chosen(codes.T.contiguous(), scale, offset)


def _sweep(
    codes: Tensor,
    value: Tensor,
    slope: Tensor,
    hessian: Tensor,
    diagonal: Tensor,
    live: Tensor,
    first: int,
    last: int,
    scale: Tensor,
    offset: Tensor | None,
    snap: Snap,
    keep: Tensor | None,
) -> None:
    """One pass over the codes of some columns; slopes inside are kept up, those outside in one product at the end."""
    moved = torch.zeros((last - first, value.shape[1]), dtype=torch.float64)
    for j in range(first, last):
        if not live[j]:
            continue
        best = value[j] - slope[j] / diagonal[j]
        code = snap(best, scale, offset)
        new = snap.value(code, scale, offset)
        step = new - value[j]
        falls = step * (2 * slope[j] + diagonal[j] * step) < 0
        if keep is not None:
            falls &= keep[j]
        step = torch.where(falls, step, 0.0)
        codes[j] = torch.where(falls, code, codes[j])
        value[j] += step
        moved[j - first] = step
        slope[first:last].addr_(hessian[first:last, j], step)
    inside = slope[first:last].clone()
    slope.addmm_(hessian[:, first:last], moved)
    slope[first:last] = inside


def _move_grid(
    fmt: Format,
    codes: Tensor,
    value: Tensor,
    slope: Tensor,
    hessian: Tensor,
    start: int,
    stop: int,
    scale: Tensor,
    offset: Tensor | None,
    snap: Snap,
) -> tuple[Tensor, Tensor | None]:
    """Scale, then offset, of one block [columns start to stop]: to the storable value nearest to the parabola's vertex."""
    part = hessian[start:stop, start:stop]

    def propose(direction: Tensor, now: Tensor) -> Tensor:
        curve = (direction * (part @ direction)).sum(0)
        return now - torch.where(curve > 0, (direction * slope[start:stop]).sum(0) / torch.where(curve > 0, curve, 1.0), 0.0)

    def take(new_scale: Tensor, new_offset: Tensor | None) -> tuple[Tensor, Tensor | None]:
        s, o = _stored(fmt, new_scale, new_offset)
        new = snap.value(codes[start:stop], s, o)
        step = new - value[start:stop]
        falls = (step * (2 * slope[start:stop] + part @ step)).sum(0) < 0
        step = torch.where(falls, step, 0.0)
        value[start:stop] += step
        slope.addmm_(hessian[:, start:stop], step)
        return torch.where(falls, s, scale), None if o is None or offset is None else torch.where(falls, o, offset)

    level = snap.value(codes[start:stop], torch.ones_like(scale), None if snap.shifted else offset)
    scale, offset = take(propose(level, scale), offset)
    if offset is not None:
        direction = (torch.ones_like(scale) if snap.shifted else -scale).expand(stop - start, -1)
        scale, offset = take(scale, propose(direction, offset))
    return scale, offset


def _stored(fmt: Format, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The nearest grid that the format stores, [N] each."""
    s, o = grid_of(fmt, params_of(fmt, scale[:, None], None if offset is None else offset[:, None]))
    return s[:, 0], None if o is None else o[:, 0]


def _values(codes: Tensor, scale: Tensor, offset: Tensor | None, block: int, snap: Snap) -> Tensor:
    columns = codes.shape[0]
    wide = columns_of(scale, columns, block).T
    return snap.value(codes, wide, None if offset is None else columns_of(offset, columns, block).T).contiguous()
