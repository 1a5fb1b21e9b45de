"""How plots look and how they become bytes: palette, figures without global state, SVG that follows the page's theme.

A plot is drawn once, in the light palette. On disk it stays so; for the page each colour of the palette is replaced by
the CSS variable of its name, so the same drawing turns dark with the page. Text stays text (`svg.fonttype: none`) and
takes the page's font. The bytes are the same for the same records: ids come from a fixed salt, no date is written.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.style import context as style_context
from matplotlib.transforms import Bbox

# Families keep apart for the common kinds of colour blindness: they differ in lightness as well as in hue.
PALETTE = {
    "ink": "#1b2430",
    "muted": "#5d6977",
    "grid": "#e3e7ec",
    "surface": "#fdfdfe",
    "float": "#66717f",
    "int8": "#0b6fb8",
    "int4": "#12937a",
    "codebook": "#d98a06",
    "low": "#b8447f",
    "limit": "#8a5bd0",
    "phase1": "#c9d1da",
    "phase2": "#3f78b5",
    "phase3": "#163f6b",
    "phase4": "#98c1dd",
}
WIDTH = 9.8  # inches; text of 8.5 to 10 points then reads well at the width of the page

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": PALETTE["ink"],
    "axes.labelcolor": PALETTE["muted"],
    "axes.edgecolor": PALETTE["muted"],
    "axes.facecolor": PALETTE["surface"],
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": PALETTE["surface"],
    "grid.color": PALETTE["grid"],
    "grid.linewidth": 0.7,
    "text.color": PALETTE["ink"],
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclass(frozen=True)
class Plot:
    """One picture: the bytes of both files, and what a reader who cannot see it is told."""

    name: str
    """Stem of its files, and prefix of every id in its SVG."""
    title: str
    alt: str
    svg: bytes
    png: bytes


def style() -> Any:
    """The context in which figures are made and saved: our settings over matplotlib's own, whatever the user has."""
    return style_context(["default", _STYLE])


def render(figure: Figure, name: str, title: str, alt: str) -> Plot:
    """Both files of a figure. To be called within `style()`."""
    svg, png = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": f"nybble-{name}"}):
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(svg, format="svg", metadata=metadata, bbox_inches="tight", pad_inches=0.06)
    FigureCanvasAgg(figure)
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None}, bbox_inches="tight", pad_inches=0.06)
    return Plot(name, title, alt, svg.getvalue(), png.getvalue())


def clean_label(text: str, limit: int = 26) -> str:
    """A label for a plot: what its font cannot draw becomes a question mark, an overlong one is cut in the middle."""
    shown = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in text)
    return shown if len(shown) <= limit else f"{shown[: limit // 2 - 1]}…{shown[-(limit - limit // 2) :]}"


def inline_svg(plot: Plot) -> str:
    """The plot's SVG for the page: no prolog, own ids, colours as CSS variables, scaled by its container."""
    text = plot.svg.decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', head)
    if box is None:
        raise ValueError(f"plot {plot.name}: matplotlib wrote an SVG without a viewBox")
    prefix = f"plot-{plot.name}-"
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)  # the page's own style says it
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", body)
    body = re.sub(r"font-family: [^;\"]*(?:;\s*)?", "", body)
    for name, colour in PALETTE.items():
        body = body.replace(colour, f"var(--p-{name})")
    # Text without a colour of its own is black, which a dark page would swallow.
    width = float(box.group(1).split()[2])
    size = f'viewBox="{box.group(1)}" width="{width:.0f}"'
    opening = f'<svg class="plot" {size} role="img" aria-labelledby="{prefix}alt" fill="var(--p-ink)">'
    return f'{opening}<title id="{prefix}alt">{_escape(plot.alt)}</title>{body}'


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """A figure of its own, known to no global list."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def place_labels(
    axes: Axes,
    points: list[tuple[float, float, str]],
    whiskers: list[tuple[float, float]],
    line: float | None = None,
) -> None:
    """Write (x, y, label) beside each point so that labels cover neither each other nor the points nor the
    whiskers, given as (low, high) of each.

    Greedy: each label takes the free place nearest to its point from rings of candidates, the most crowded point
    first; far ones get a thin line. A horizontal line at y = `line` is kept free too. Needs final limits on both axes
    and a figure that has been laid out.
    """
    figure = axes.figure
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    scale = figure.dpi / 72
    pixels = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_bounds(px - 4 * scale, py - 4 * scale, 8 * scale, 8 * scale) for px, py in pixels]
    for (x, _, _), (low, high) in zip(points, whiskers, strict=True):
        if high > low:
            (px, bottom), (_, top) = axes.transData.transform([(x, low), (x, high)])
            taken.append(Bbox.from_bounds(px - 2 * scale, bottom, 4 * scale, top - bottom))
    inside = axes.get_window_extent(renderer)
    if line is not None:
        level = float(axes.transData.transform((1, line))[1])
        taken.append(Bbox.from_bounds(inside.x0, level - 2 * scale, inside.width, 4 * scale))

    def crowding(i: int) -> float:
        return -float(sum(1 / (1 + abs(pixels[i][0] - q[0]) + abs(pixels[i][1] - q[1])) for q in pixels))

    for i in sorted(range(len(points)), key=lambda i: (crowding(i), i)):
        x, y, label = points[i]
        probe = axes.annotate(label, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8)
        size = probe.get_window_extent(renderer)
        probe.remove()
        best: tuple[float, float, float, Bbox] | None = None
        for radius in (8, 14, 21, 29, 38, 48):
            for dx, dy in (
                (1, 0),
                (1, 0.6),
                (1, -0.6),
                (0.6, 1),
                (0.6, -1),
                (0, 1),
                (0, -1),
                (-1, 0),
                (-1, 0.6),
                (-1, -0.6),
                (-0.6, 1),
                (-0.6, -1),
            ):
                anchor = 0.0 if dx > 0.3 else 1.0 if dx < -0.3 else 0.5
                left = pixels[i][0] + dx * radius * scale - anchor * size.width
                bottom = pixels[i][1] + dy * radius * scale - size.height / 2
                box = Bbox.from_bounds(left, bottom, size.width, size.height)
                overlap = sum(_overlap(box, other) for other in taken)
                outside = size.width * size.height - _overlap(box, inside)
                cost = overlap + 3 * max(outside, 0) + radius * scale * 0.6
                if best is None or cost < best[0]:
                    best = (cost, left, bottom, box)
        assert best is not None
        _, left, bottom, box = best
        taken.append(box)
        dx, dy = (left - pixels[i][0]) / scale, (bottom - pixels[i][1]) / scale
        nearest = (min(max(pixels[i][0], box.x0), box.x1), min(max(pixels[i][1], box.y0), box.y1))
        far = abs(nearest[0] - pixels[i][0]) + abs(nearest[1] - pixels[i][1]) > 13 * scale
        if far:
            end = ((nearest[0] - pixels[i][0]) / scale, (nearest[1] - pixels[i][1]) / scale)
            leader = {"arrowstyle": "-", "lw": 0.6, "color": PALETTE["muted"], "shrinkA": 0, "shrinkB": 3}
            line_to = axes.annotate("", (x, y), xytext=end, textcoords="offset points", arrowprops=leader)
            line_to.set_in_layout(False)
        written = axes.annotate(label, (x, y), xytext=(dx, dy + 2), textcoords="offset points", fontsize=8)
        written.set_in_layout(False)


def _overlap(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0
