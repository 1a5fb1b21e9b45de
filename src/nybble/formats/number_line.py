"""The levels of a format on the number line, in text: for a terminal, and counted for a picture."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from nybble.formats.explain import Explanation

COLUMNS = 72
BARS = "▁▂▃▄▅▆▇█"
DOUBLINGS = 8
"""What the highest bar stands for at least, so that a line of 2 or 3 levels a column does not look like mountains."""


def count_in_cells(explained: Explanation, cells: int) -> list[int]:
    """How many levels lie in each of `cells` equal cells, the lowest level in the middle of the first, the highest in that of
    the last. Exact for floats of any size, without listing them."""
    floating = explained.floating
    if explained.levels or floating is None:
        levels = np.array(explained.levels)
        at = np.rint((levels - levels[0]) / (levels[-1] - levels[0]) * (cells - 1)).astype(np.int64)
        return [int(count) for count in np.bincount(at, minlength=cells)]

    def up_to(edge: float) -> int:
        """Levels at or below a share of the largest, from -1 to 1."""
        bound = abs(edge) * floating.largest
        if edge >= 0:
            return floating.positive + 1 + floating.count_to(bound)
        return floating.positive - floating.count_to(math.nextafter(bound, 0.0))

    inner = [up_to((2 * cell - 1) / (cells - 1) - 1) for cell in range(1, cells)]
    edges = [0, *inner, explained.count]
    return [above - below for below, above in pairwise(edges)]


def number_line(explained: Explanation, columns: int = COLUMNS) -> tuple[str, str, str]:
    """Lines of at most `columns` characters: the levels, the ends and zero below them, and what the marks mean."""
    counts = count_in_cells(explained, columns)
    if explained.count <= columns:
        line = "".join("·" if not count else "|" if count == 1 else str(min(count, 9)) for count in counts)
        legend = "| a level" + (", a digit: so many levels in one column" if max(counts) > 1 else "")
    else:
        full = max(DOUBLINGS, math.log2(max(counts)) * 0.999)  # two columns that differ by one level of thousands look alike
        line = "".join("·" if not count else BARS[int((len(BARS) - 1) * min(1.0, math.log2(count) / full))] for count in counts)
        none = "" if min(counts) else ", · none"
        legend = f"height: levels in a column, up to {format_figure(max(counts))}, on a logarithmic scale{none}"
    ends = [format_figure(explained.lowest), format_figure(explained.highest)]
    zero = round((columns - 1) / (1 - explained.highest / explained.lowest)) if explained.lowest else 0
    below = list(ends[0].ljust(columns - len(ends[1])) + ends[1])
    if len(ends[0]) < zero < columns - len(ends[1]) - 1:
        below[zero] = "0"
    return line, "".join(below), legend


def format_figure(value: float) -> str:
    """A level, a step or a count: whole numbers below a million as they are, others by four significant digits (5.96e-8)."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    mantissa, exponent, power = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(power)}" if exponent else mantissa
