"""The levels of number formats on one number line, a row a format. Imported only to draw: it takes matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from nybble.errors import OutputError, UsageError
from nybble.files.folder import write_whole
from nybble.formats.explain import Explanation
from nybble.formats.number_line import count_in_cells, format_figure
from nybble.report.drawing import PALETTE, Plot, new_figure, render, style

CELLS = 121
"""Of the strip that stands for formats whose levels cannot be told apart."""
FAMILIES = {
    "float": "floats",
    "int8": "integers of 5 to 8 bits",
    "int4": "4-bit integers",
    "codebook": "4-bit codebooks",
    "low": "3 bits and fewer",
}
KINDS = (".svg", ".png")


def write_levels(explained: list[Explanation], path: Path) -> None:
    """Draw formats to a file .svg or .png, which appears whole or not at all. The same formats give the same bytes.

    Raises UsageError for another suffix, OutputError where the file cannot be written.
    """
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"{path} is no picture that can be drawn; give a name that ends in {' or '.join(KINDS)}")
    plot = draw_levels(explained)
    try:
        write_whole({path: plot.svg if path.suffix.lower() == ".svg" else plot.png})
    except OSError as error:
        raise OutputError(
            f"cannot write the picture to {path}: {error.strerror or error}; choose another place with -o"
        ) from error


def draw_levels(explained: list[Explanation]) -> Plot:
    """One row a format, scaled so that its largest magnitude is 1; those with a zero point or shift from end to end."""
    with style():
        figure = new_figure(1.3 + 0.21 * len(explained))
        axes = figure.subplots()
        for row, each in enumerate(explained):
            _draw_row(axes, row, each)
        _write_beside(axes, -1, "levels")
        axes.set_ylim(len(explained) - 0.3, -0.7)
        axes.set_xlim(-1.03, 1.03)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        axes.set_yticks(range(len(explained)), [each.spec for each in explained], color=PALETTE["ink"])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.set_title("Levels of number formats" if len(explained) > 1 else f"Levels of {explained[0].spec}")
        moved = any(each.offset for each in explained)
        axes.set_xlabel(
            "value / largest magnitude"
            + ("; with a zero point or shift (dotted): from the block's least to its greatest" * moved)
        )
        present = {_family(each) for each in explained}
        handles = [Patch(color=PALETTE[name], label=text) for name, text in FAMILIES.items() if name in present]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.2)
        names = ", ".join(each.spec for each in explained)
        return render(figure, "formats", "Number formats", f"Levels on the number line from -1 to 1, a row a format: {names}.")


def _draw_row(axes: Axes, row: int, each: Explanation) -> None:
    colour = PALETTE[_family(each)]
    if each.levels:
        line = ":" if each.offset else "-"
        axes.plot([-1, 1], [row, row], color=PALETTE["muted"], linewidth=0.7, linestyle=line, zorder=1)
        low, high = (each.lowest, each.highest) if each.offset else _symmetric(each)
        places = [(level - low) / (high - low) * 2 - 1 for level in each.levels]
        width = 1.5 if len(places) <= 32 else 0.9 if len(places) <= 64 else 0.45
        axes.vlines(places, row - 0.3, row + 0.3, color=colour, linewidth=width, zorder=2)
    else:
        _draw_strip(axes, row, each, colour)
    _write_beside(axes, row, format_figure(each.count))


def _write_beside(axes: Axes, row: float, text: str) -> None:
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (36, 0), "textcoords": "offset points"}
    axes.annotate(text, (1.0, row), va="center", ha="right", fontsize=8, color=PALETTE["muted"], **place)


def _symmetric(each: Explanation) -> tuple[float, float]:
    largest = max(-each.lowest, each.highest)
    return -largest, largest


def _draw_strip(axes: Axes, row: int, each: Explanation, colour: str) -> None:
    """Levels that lie closer than a line is wide: the darker, the more of them, by the logarithm of their number."""
    depths = [count.bit_length() for count in count_in_cells(each, CELLS)]
    starts = [cell for cell in range(CELLS) if cell == 0 or depths[cell] != depths[cell - 1]]
    for start, end in zip(starts, [*starts[1:], CELLS], strict=True):
        left, right = (max(-1.0, min(1.0, (2 * cell - 1) / (CELLS - 1) - 1)) for cell in (start, end))
        alpha = round(depths[start] / max(depths), 2)
        axes.broken_barh([(left, right - left)], (row - 0.3, 0.6), facecolor=colour, alpha=alpha, linewidth=0, zorder=2)


def _family(each: Explanation) -> str:
    """A key of FAMILIES: the colours of the other plots."""
    if each.floating:
        return "float"
    if each.bits <= 3:
        return "low"
    if each.smallest_step != each.largest_step:
        return "codebook"
    return "int4" if each.bits == 4 else "int8"
