"""The plot of speed: seconds and tokens per second from FP32 to the fewest bits, the engine's with torch's beside them."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from nybble.evaluate.record import Record
from nybble.report.drawing import PALETTE, Plot, clean_label, new_figure, render
from nybble.report.figures import format_significant, number
from nybble.report.judge import engine_seconds, find_family, name_variants

LIMIT_SHOWN = 2.5


@dataclass(frozen=True)
class Series:
    """The figures of one way to compute, one a variant; None where it was not measured."""

    name: str
    seconds: list[float | None]
    runs: list[list[float]]
    rates: list[float | None]
    limits: list[float | None]
    """Tokens per second that the measured memory bandwidth allows."""

    @property
    def measured(self) -> list[int]:
        """Places that have seconds."""
        return [i for i, value in enumerate(self.seconds) if value]


def engine_series(records: list[Record]) -> Series:
    """The engine's figures."""
    engines = [r.engine for r in records]
    return Series(
        "engine",
        [engine_seconds(r) for r in records],
        [[v for v in (e.seconds_50_tokens_runs if e else []) if number(v) is not None] for e in engines],
        [number(e.tokens_per_second) if e else None for e in engines],
        [number(e.tokens_per_second / e.bandwidth_share) if e and e.bandwidth_share else None for e in engines],
    )


def torch_series(records: list[Record]) -> Series:
    """The figures of torch's `generate`."""
    return Series(
        "torch's generate",
        [number(r.seconds_50_tokens) for r in records],
        [[v for v in r.seconds_50_tokens_runs or [] if number(v) is not None] for r in records],
        [number(r.tokens_per_second) for r in records],
        [number(r.limit_tokens_per_second) for r in records],
    )


def draw_speed(records: list[Record]) -> Plot | None:
    """From FP32 to the fewest bits: seconds for the new tokens with their range, tokens per second with their limit."""
    names = [clean_label(n) for n in name_variants(records)]
    order = [i for i, r in enumerate(records) if engine_seconds(r) or number(r.seconds_50_tokens)]
    order.sort(key=lambda i: (-records[i].bpw, i))
    if not order:
        return None
    chosen = [records[i] for i in order]
    both = [series for series in (engine_series(chosen), torch_series(chosen)) if series.measured]
    first, beside = both[0], both[1] if len(both) > 1 else None
    figure = new_figure(6.4)
    upper, lower = figure.subplots(2, 1, sharex=True)
    colours = [PALETTE[find_family(r)] for r in chosen]
    if beside:
        _draw_seconds(upper, beside, [PALETTE["muted"]] * len(chosen), hollow=True)
    _draw_seconds(upper, first, colours)
    highest = max(max([*s.runs[i], s.seconds[i] or 0.0]) for s in both for i in s.measured)
    lowest = min(min([*s.runs[i], s.seconds[i] or highest]) for s in both for i in s.measured)
    title = f"Seconds for {chosen[0].run.new_tokens} new tokens, lowest to highest run (lower is better)"
    if beside:
        upper.set_yscale("log")
        upper.set_ylim(lowest / 1.5, highest * 1.9)
        upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        upper.yaxis.set_minor_formatter(NullFormatter())
        title += f"\nfilled: {first.name}, hollow: {beside.name}; logarithmic"
    else:
        upper.set_ylim(0, highest * 1.18)
        title += f", {first.name}"
    upper.set_title(title)
    _draw_rates(lower, first, beside, colours)
    labels = [names[i] for i in order]
    lower.set_xticks(range(len(order)), labels, rotation=32, ha="right", rotation_mode="anchor", color=PALETTE["ink"])
    lower.set_xlim(-0.6, len(order) - 0.4)
    for axes in (upper, lower):
        axes.grid(axis="y")
    alt = (
        f"Seconds for the new tokens by variant in order of falling bits, by {' and '.join(s.name for s in both)}, "
        "with the range of the runs; tokens per second with the limit of memory bandwidth."
    )
    return render(figure, "speed", "Speed from FP32 to INT4", alt)


def _draw_seconds(axes: Axes, series: Series, colours: list[str], hollow: bool = False) -> None:
    places = series.measured
    seconds = [series.seconds[i] or 0.0 for i in places]
    ranges = [series.runs[i] or [s] for i, s in zip(places, seconds, strict=True)]
    spread = [
        [max(s - min(r), 0) for s, r in zip(seconds, ranges, strict=True)],
        [max(max(r) - s, 0) for s, r in zip(seconds, ranges, strict=True)],
    ]
    line = PALETTE["muted"] if hollow else PALETTE["phase1"]
    axes.plot(places, seconds, color=line, linewidth=1 if hollow else 2, zorder=1)
    axes.errorbar(places, seconds, yerr=spread, fmt="none", ecolor=PALETTE["muted"], elinewidth=1, capsize=3, zorder=2)
    edges = [colours[i] for i in places]
    faces = [PALETTE["surface"]] * len(places) if hollow else edges
    axes.scatter(places, seconds, c=faces, edgecolors=edges, s=44, zorder=3)
    for x, s, r in zip(places, seconds, ranges, strict=True):
        text, top = format_significant(s), max(*r, s)
        axes.annotate(text, (x, top), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)


def _draw_rates(axes: Axes, first: Series, beside: Series | None, colours: list[str]) -> None:
    rates = [rate or 0.0 for rate in first.rates]
    places = range(len(rates))
    width = 0.5 if beside else 0.56
    axes.bar([x - (0.13 if beside else 0) for x in places], rates, width=width, color=colours)
    if beside:
        axes.bar([x + 0.27 for x in places], [rate or 0.0 for rate in beside.rates], width=0.22, color=PALETTE["muted"])
    # One far limit would flatten every bar: beyond LIMIT_SHOWN times the fastest it is written at the upper edge.
    top = max(*rates, *((rate or 0.0) for rate in (beside.rates if beside else [])), 0.0) or 1.0
    shown = [v for v in first.limits if v is not None and v <= LIMIT_SHOWN * top]
    ceiling = max([top, *shown]) * 1.16
    for x, rate, limit in zip(places, rates, first.limits, strict=True):
        at = x - (0.13 if beside else 0)
        if rate:
            text = format_significant(rate)
            axes.annotate(text, (at, rate), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8)
        if limit is None:
            continue
        if limit <= LIMIT_SHOWN * top:
            axes.plot([at - 0.33, at + 0.33], [limit, limit], color=PALETTE["limit"], linewidth=2)
        else:
            text = f"↑ {format_significant(limit)}"
            axes.annotate(text, (at, ceiling), ha="center", va="top", fontsize=7.5, color=PALETTE["limit"])
    note = " – line or arrow: what the memory bandwidth allows" if any(v is not None for v in first.limits) else ""
    grey = f"\nwide: {first.name}, narrow: {beside.name}" if beside else f", {first.name}"
    axes.set_title(f"Tokens per second (higher is better){note}{grey}")
    axes.set_ylim(0, ceiling)
