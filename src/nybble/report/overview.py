"""The overview: what each variant takes, how long it needs and what it loses, side by side in one picture."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from nybble.evaluate.record import Record
from nybble.report.drawing import PALETTE, Plot, clean_label, new_figure, render
from nybble.report.figures import MB, format_significant, number
from nybble.report.judge import KL_BOUND, engine_seconds, find_family, name_variants

Value = Callable[[Record], float | None]


def draw_overview(records: list[Record]) -> Plot | None:
    """A row a variant, a panel a question: weights in MB, seconds for the new tokens, mean KL (logarithmic)."""
    names = [clean_label(n) for n in name_variants(records)]
    count = records[0].run.new_tokens
    by_engine = any(engine_seconds(r) for r in records)
    seconds: tuple[str, Value] = (f"Seconds for {count} tokens, torch", lambda r: number(r.seconds_50_tokens))
    if by_engine:
        seconds = (f"{count} tokens, s: engine (torch)", engine_seconds)
    panels: list[tuple[str, Value]] = [
        ("Weights, MB", lambda r: r.weight_bytes / MB),
        seconds,
        ("Mean KL to the float model", lambda r: number(r.kl_mean)),
    ]
    panels = [panel for panel in panels if any(panel[1](r) for r in records)]
    if len(panels) < 2:  # the memory plot says as much
        return None
    figure = new_figure(1.1 + 0.3 * len(records))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, value) in zip(grid, panels, strict=True):
        values = [value(r) for r in records]
        axes.set_title(title)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        if title.startswith("Mean KL"):
            _draw_loss(axes, records, values)
        elif value is engine_seconds:
            beside = [f" ({format_significant(r.seconds_50_tokens)})" if number(r.seconds_50_tokens) else "" for r in records]
            _draw_bars(axes, records, values, beside)
        else:
            _draw_bars(axes, records, values)
    grid[0].set_yticks(range(len(records)), names, color=PALETTE["ink"])
    grid[0].set_ylim(len(records) - 0.4, -0.6)
    by = "the engine (torch in parentheses)" if by_engine else "torch"
    alt = f"By variant: megabytes of weights, seconds for the new tokens by {by}, and mean KL from the float model."
    return render(figure, "overview", "Size, speed and loss", alt)


def _draw_bars(axes: Axes, records: list[Record], values: list[float | None], beside: list[str] | None = None) -> None:
    """A bar a record with its figure, and the text `beside` behind it."""
    shown = [value or 0.0 for value in values]
    axes.barh(range(len(records)), shown, height=0.62, color=[PALETTE[find_family(r)] for r in records])
    for i, value in enumerate(values):
        text = ("–" if value is None else format_significant(value)) + (beside[i] if beside else "")
        axes.annotate(text, (shown[i], i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, (max(shown) or 1.0) * (1.75 if beside else 1.22))


def _draw_loss(axes: Axes, records: list[Record], values: list[float | None]) -> None:
    positive = [value for value in values if value]
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = min(positive) / 4, max(max(positive), KL_BOUND) * 30
    axes.set_xlim(low, high)
    axes.axvline(KL_BOUND, color=PALETTE["limit"], linewidth=1, linestyle="--")
    axes.annotate("broken", (KL_BOUND, -0.5), xytext=(3, 0), textcoords="offset points", fontsize=7.5, color=PALETTE["limit"])
    for i, (record, value) in enumerate(zip(records, values, strict=True)):
        if value:
            axes.plot([low, value], [i, i], color=PALETTE[find_family(record)], linewidth=1.4, alpha=0.5)
            axes.scatter([value], [i], s=40, color=PALETTE[find_family(record)], zorder=3)
            axes.annotate(
                format_significant(value), (value, i), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8
            )
        else:
            text = "the reference" if value == 0 else "–"
            axes.annotate(text, (low, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
