"""The search of scales and codes for blocks of weights, in plain numpy: what body_search.hpp computes, to the bit.

A run of R blocks shares d (and dmin); block b of it stands on scale d * m[b] and, where values are shifted, on offset
-(dmin * n[b]), with m and n whole numbers from `low` to `high`. A format whose blocks stand alone has runs of one block and
m = n = 1. To be found are the stored numbers that make the weighted squared error of rounding to nearest small:

1. each block by itself, in real numbers: its range is divided in several ways (`tries`), the weights are rounded on each
   grid, and the least squares fit for those levels says what that grid can become; the best one stays.
2. d and dmin, float16: of several parts of the largest scale of the run (`dividers`) the one whose multiples are nearest to
   the scales found, weighed by how much the error grows with them. The same is done for the plain ranges of all blocks (the
   first `plains` of the tries), and the best stays: nothing found is worse than a plain range.
3. in turns, each kept only where it lowers the error of rounding to the stored grid: d and dmin by least squares over the run,
   with d as it is, shorter and longer, and m and n anew by those of their blocks; then every m and n up and down by one.

Least squares are taken around the grid that the sums belong to: A, B, C are the weighted sums of level^2, level and 1, P and
Q those of error * level and error, E that of error^2. Nothing is lost to cancellation so, and float32 is enough.

Arrays are [R, columns of a block, M] for M runs side by side; every sum is taken one term after the other, and each product
and sum is rounded to float32 by itself, so that any number of runs may be worked on at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nybble.kernels.arguments import Bytes, Floats, Found, Search

SLAB = 1 << 21
"""Weights worked on at once."""
ROUNDS = 2
STRETCHES = (1.0, 0.85, 1.2)
"""By which d is multiplied when m and n are chosen anew: where one block is far larger than the others, a small m of theirs makes
much of a small change."""
SMALLEST = np.float32(2.0**-100)
"""Scales of smaller magnitude count as zero: every level then stands for the offset."""
LARGEST = np.float32(3e38)
"""More than any error."""
FLAT = np.float32(2.0**-20)
"""Levels that differ by less, in A C - B^2 over A C, say nothing about scale and offset apart."""
ONE, ZERO = np.float32(1), np.float32(0)


class Sums(NamedTuple):
    """What rounding to a grid gives, float32 [R, M] each."""

    a: Floats
    b: Floats
    p: Floats
    q: Floats
    e: Floats


class State:
    """Stored grids of all runs, and the sums of rounding to them; changed in place."""

    def __init__(self, d: Floats, dmin: Floats, m: Floats, n: Floats, sums: Sums) -> None:
        self.d, self.dmin, self.m, self.n, self.sums = d, dmin, m, n, sums

    def take(self, other: State, better: NDArray[np.bool_]) -> None:
        """The other's runs [M] or blocks [R, M] where it is better."""
        for mine, its in zip((self.m, self.n, *self.sums), (other.m, other.n, *other.sums), strict=True):
            np.copyto(mine, its, where=better)
        if better.ndim == 1:
            np.copyto(self.d, other.d, where=better)
            np.copyto(self.dmin, other.dmin, where=better)


def search(weight: Floats, importance: Floats | None, how: Search, out: Found) -> None:
    """Write the codes and stored numbers of weight [N, K]; importance [1, K] or [N, K], None: all alike."""
    blocks = how.run // how.block
    runs = weight.reshape(-1, how.run)
    weights = None if importance is None else importance.reshape(-1, how.run)
    step = max(1, SLAB // how.run)
    for start in range(0, len(runs), step):
        part = slice(start, min(len(runs), start + step))

        def laid(values: Floats) -> Floats:
            return np.ascontiguousarray(values.reshape(-1, blocks, how.block).transpose(1, 2, 0))

        w = laid(runs[part])
        if weights is None:
            h = np.ones_like(w)
        else:
            h = laid(weights[np.arange(part.start, part.stop) % len(weights)])
        found = _Runs(w, h, how).search()
        out.d.reshape(-1)[part] = found.d.astype(np.float16)
        out.scale.reshape(-1, blocks)[part] = found.m.T.astype(np.int8)
        if out.dmin is not None and out.offset is not None:
            out.dmin.reshape(-1)[part] = found.dmin.astype(np.float16)
            out.offset.reshape(-1, blocks)[part] = found.n.T.astype(np.int8)
    scale = np.repeat(out.d.astype(np.float32), blocks, axis=1) * out.scale
    offset = None
    if out.dmin is not None and out.offset is not None:
        offset = -(np.repeat(out.dmin.astype(np.float32), blocks, axis=1) * out.offset)
    nearest(weight, how.levels, how.block, scale, offset, out.codes)


def nearest(weight: Floats, levels: Floats, block: int, scale: Floats, offset: Floats | None, out: Bytes) -> None:
    """Write the places in `levels` of those nearest to (weight - offset) / scale, rounded step by step to float32; where the
    scale is 0, to 0. Halfway: whole levels take the even quotient, others the lower level."""
    columns = weight.shape[1]
    step = max(1, SLAB // max(1, columns))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        wide = np.repeat(scale[rows], block, axis=1)[:, :columns]
        zero = wide == 0
        with np.errstate(over="ignore", invalid="ignore"):
            ratio = weight[rows] if offset is None else weight[rows] - np.repeat(offset[rows], block, axis=1)[:, :columns]
            ratio = np.where(zero, ZERO, ratio / np.where(zero, ONE, wide))
        if _whole(levels):
            out[rows] = np.clip(np.rint(ratio), levels[0], levels[-1]) - levels[0]
        else:
            out[rows] = np.searchsorted(_between(levels), ratio)


def _whole(levels: Floats) -> bool:
    return bool((np.diff(levels) == 1).all()) and bool(levels[0] == np.rint(levels[0]))


def _between(levels: Floats) -> Floats:
    return (levels[1:] + levels[:-1]) * np.float32(0.5)


def inverse(x: Floats) -> Floats:
    """1 / x, and 0 for what counts as zero."""
    some = np.abs(x) > SMALLEST
    return np.where(some, ONE / np.where(some, x, ONE), ZERO)


def quotient(x: Floats, y: Floats) -> Floats:
    """x / y, and 0 where y is not positive."""
    return np.where(y > 0, x / np.where(y > 0, y, ONE), ZERO)


def half(x: Floats) -> Floats:
    """The nearest float16."""
    return x.astype(np.float16).astype(np.float32)


def total(values: Floats) -> Floats:
    """The sum over blocks [R, M] -> [M], one after the other."""
    out = np.zeros_like(values[0])
    for value in values:
        out = out + value
    return out


class _Runs:
    """M runs: weights and importance [R, columns, M]."""

    def __init__(self, w: Floats, h: Floats, how: Search) -> None:
        self.w, self.h, self.how = w, h, how
        self.low, self.high = np.float32(how.low), np.float32(how.high)
        self.alone = how.low == how.high
        self.whole = _whole(how.levels)
        self.c = np.zeros_like(w[:, 0])
        for k in range(how.block):
            self.c = self.c + h[:, k]

    @np.errstate(over="ignore", invalid="ignore")  # what overflows, or is not a number, loses every comparison
    def search(self) -> State:
        low, width = self.ends()
        found = self.start(width / self.how.tries[0, 0], low, settled=False)
        for steps in self.how.tries[1 : self.how.plains, 0]:
            self.keep_runs(found, self.start(width / steps, low, settled=False))
        self.keep_runs(found, self.start(*self.best_of_tries(low, width), settled=True))
        for _ in range(ROUNDS):
            for stretch in STRETCHES[: 1 if self.alone else None]:
                self.refit(found, anew=True, stretch=np.float32(stretch))
            if self.alone:
                continue
            for i, j in ((-1, 0), (1, 0), (0, -1), (0, 1)) if self.how.shifted else ((-1, 0), (1, 0)):
                self.move(found, np.float32(i), np.float32(j))
        self.refit(found, anew=False, stretch=ONE)
        return found

    def ends(self) -> tuple[Floats, Floats]:
        """Shifted: (lowest weight, range) of each block; from zero where all are positive and dmin cannot be negative. Else: (0,
        the weight of largest magnitude)."""
        low, high = self.w[:, 0], self.w[:, 0]
        largest = np.zeros_like(low)
        for k in range(self.how.block):
            x = self.w[:, k]
            low, high = np.where(low > x, x, low), np.where(x > high, x, high)
            largest = np.where(np.abs(x) > np.abs(largest), x, largest)
        if not self.how.shifted:
            return np.zeros_like(largest), largest
        if not self.alone:
            low = np.where(low > 0, ZERO, low)
        return low, high - low

    def best_of_tries(self, low: Floats, width: Floats) -> tuple[Floats, Floats]:
        """Scale and offset of each block by itself."""
        scale, offset, least = np.zeros_like(low), np.zeros_like(low), np.full_like(low, LARGEST)
        for steps, raised in self.how.tries:
            s = width / steps
            o = low + s * raised if self.how.shifted else low
            s, o, e = self.settle(self.sums(s, o), s, o)
            better = e < least
            scale, offset, least = np.where(better, s, scale), np.where(better, o, offset), np.where(better, e, least)
        return scale, offset

    def sums(self, s: Floats, o: Floats) -> Sums:
        """Of rounding to scale s and offset o [R, M]."""
        t = inverse(s)
        a, b, p, q, e = (np.zeros_like(s) for _ in range(5))
        for k in range(self.how.block):
            x, h = self.w[:, k], self.h[:, k]
            if self.how.shifted:
                x = x - o
            level = self.nearest_level(x * t)
            error = x - s * level
            weighed, weighed_error = h * level, h * error
            a = a + weighed * level
            p = p + weighed_error * level
            e = e + weighed_error * error
            if self.how.shifted:
                b, q = b + weighed, q + weighed_error
        return Sums(a, b, p, q, e)

    def nearest_level(self, ratio: Floats) -> Floats:
        levels = self.how.levels
        if self.whole:
            return np.rint(np.clip(ratio, levels[0], levels[-1]))
        found = np.full_like(ratio, levels[0])
        for level, middle in zip(levels[1:], _between(levels), strict=True):
            found = np.where(ratio > middle, level, found)
        return found

    def line(self, a: Floats, b: Floats, c: Floats, p: Floats, q: Floats) -> tuple[Floats, Floats]:
        """The steps of scale and offset that least squares ask for."""
        alone = quotient(p, a)
        if not self.how.shifted:
            return alone, np.zeros_like(alone)
        product = a * c
        determinant = product - b * b
        apart = determinant > FLAT * product
        divisor = np.where(apart, determinant, ONE)
        return np.where(apart, (c * p - b * q) / divisor, alone), np.where(apart, (a * q - b * p) / divisor, ZERO)

    def settle(self, sums: Sums, s: Floats, o: Floats) -> tuple[Floats, Floats, Floats]:
        """(scale, offset, error) of the least squares fit for the levels that the sums are of."""
        a, b, p, q, e = sums
        ds, do = self.line(a, b, self.c, p, q)
        if self.how.shifted:
            if not self.alone:
                above = o + do > 0
                do = np.where(above, ZERO - o, do)
                ds = np.where(above, quotient(p - b * do, a), ds)
            rises = s + ds > 0
            ds, do = np.where(rises, ds, ZERO), np.where(rises, do, ZERO)
        gain = ds * ((p + p) - (a * ds + b * do)) + do * ((q + q) - (b * ds + self.c * do))
        return s + ds, o + do, e - gain

    def start(self, s: Floats, o: Floats, settled: bool) -> State:
        """The stored grid nearest to scales and offsets; settled: to their least squares fit."""
        sums = self.sums(s, o)
        bend = sums.a - sums.b * quotient(sums.b, self.c) if self.how.shifted else sums.a
        d, m = self.multiples(self.settle(sums, s, o)[0] if settled else s, bend)
        dmin, n = np.zeros_like(d), np.zeros_like(m)
        if self.how.shifted:
            dmin, n = self.multiples(ZERO - (self.offset_for(sums, s, o, d * m) if settled else o), self.c)
        return State(d, dmin, m, n, self.evaluate(d, dmin, m, n))

    def multiples(self, wanted: Floats, bend: Floats) -> tuple[Floats, Floats]:
        """(d [M], multipliers [R, M]) whose products are nearest to `wanted`, an error's square counted `bend` times."""
        largest = np.zeros_like(wanted[0])
        for x in wanted:
            largest = np.where(np.abs(x) > np.abs(largest), x, largest)
        best, chosen, least = np.zeros_like(largest), np.zeros_like(wanted), np.full_like(largest, LARGEST)
        for divider in self.how.dividers:
            d = half(largest / divider)
            m = self.multiplier(wanted, d)
            off = wanted - d * m
            loss = total(bend * (off * off))
            better = loss < least
            best, chosen, least = np.where(better, d, best), np.where(better, m, chosen), np.where(better, loss, least)
        return best, chosen

    def multiplier(self, wanted: Floats, d: Floats) -> Floats:
        return np.rint(np.clip(wanted * inverse(d), self.low, self.high))

    def offset_for(self, sums: Sums, s: Floats, o: Floats, scale: Floats) -> Floats:
        """The best offset of a block for its levels, when its scale becomes another one."""
        wanted = o + (sums.q - sums.b * (scale - s)) / self.c
        return wanted if self.alone else np.where(wanted > 0, ZERO, wanted)

    def evaluate(self, d: Floats, dmin: Floats, m: Floats, n: Floats) -> Sums:
        return self.sums(d * m, ZERO - dmin * n)

    def keep_runs(self, found: State, other: State) -> None:
        found.take(other, total(other.sums.e) < total(found.sums.e))

    def refit(self, found: State, anew: bool, stretch: np.float32) -> None:
        """d, stretched, and dmin by least squares; anew: the multipliers too, each by that of its block."""
        d, dmin, m, n, (a, b, p, q, _) = found.d, found.dmin, found.m, found.n, found.sums
        low = ZERO - n
        step, step_of_min = self.line(
            total((a * m) * m), total((b * m) * low), total((self.c * low) * low), total(p * m), total(q * low)
        )
        moved, moved_min = half((d + step) * stretch), half(dmin + step_of_min)
        if self.how.shifted:
            moved = np.where(moved > 0, moved, d)
            moved_min = moved_min if self.alone else np.where(moved_min > 0, moved_min, dmin)
        if anew:
            s, o = d * m, ZERO - dmin * n
            m = self.multiplier(self.settle(found.sums, s, o)[0], moved)
            if self.how.shifted:
                n = self.multiplier(ZERO - self.offset_for(found.sums, s, o, moved * m), moved_min)
        self.keep_runs(found, State(moved, moved_min, m, n, self.evaluate(moved, moved_min, m, n)))

    def move(self, found: State, i: np.float32, j: np.float32) -> None:
        """Each m by i, with the n that then is best, or each n by j."""
        m, n = np.clip(found.m + i, self.low, self.high), found.n
        if j != 0:
            n = np.clip(n + j, self.low, self.high)
        elif self.how.shifted:
            offset = self.offset_for(found.sums, found.d * found.m, ZERO - found.dmin * found.n, found.d * m)
            n = self.multiplier(ZERO - offset, found.dmin)
        sums = self.evaluate(found.d, found.dmin, m, n)
        found.take(State(found.d, found.dmin, m, n, sums), sums.e < found.sums.e)
