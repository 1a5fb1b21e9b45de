"""The plots of a comparison, each a function from records to a `Plot`, or to None where nothing was measured.

Families of formats keep their colour in all of them. Leaves out: the heat map and the explorer of the page itself,
which are drawn by the page; their static counterparts are here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_hex
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from nybble.evaluate.record import LayerRecord, Record
from nybble.report.drawing import PALETTE, Plot, clean_label, new_figure, place_labels, render, style
from nybble.report.figures import MB, format_significant, number
from nybble.report.judge import FAMILIES, PERPLEXITY_FACTOR, Judgement, find_baseline, find_family, name_variants
from nybble.report.overview import draw_overview
from nybble.report.speed_plot import draw_speed

PLOT_NAMES = ("overview", "memory", "speed", "quality", "histograms", "layers", "errors")
LAYER_PANELS = 60
ERROR_MAP = "cividis"


def draw_all(records: list[Record], judgements: list[Judgement]) -> dict[str, Plot]:
    """Every plot that the records allow, by name, in the order of PLOT_NAMES."""
    with style():
        plots = (
            draw_overview(records),
            draw_memory(records),
            draw_speed(records),
            draw_quality(records),
            draw_histograms(records),
            draw_layers(records, judgements),
            draw_errors(records),
        )
    return {plot.name: plot for plot in plots if plot is not None}


def draw_memory(records: list[Record]) -> Plot | None:
    """Resident memory in four phases, and the bytes of the weights, grouped by variant."""
    names = [clean_label(n) for n in name_variants(records)]
    phases = (
        ("before loading", "phase1", [number(r.memory_before_bytes) for r in records]),
        ("loaded", "phase2", [number(r.memory_after_load_bytes) for r in records]),
        ("peak", "phase3", [number(r.memory_peak_bytes) for r in records]),
        ("after cleanup", "phase4", [number(r.memory_after_cleanup_bytes) for r in records]),
    )
    figure = new_figure(1.0 + 0.5 * len(records))
    measured = any(v is not None for _, _, values in phases for v in values)
    grid = figure.subplots(1, 2 if measured else 1, sharey=True, squeeze=False, width_ratios=[3, 2] if measured else [1])
    right = grid[0, -1]
    if measured:
        left = grid[0, 0]
        for k, (label, colour, values) in enumerate(phases):
            rows = [i for i, v in enumerate(values) if v is not None]
            left.barh(
                [i + (k - 1.5) * 0.2 for i in rows],
                [(values[i] or 0) / MB for i in rows],
                height=0.18,
                color=PALETTE[colour],
                label=label,
            )
        left.set_title("Resident memory of a fresh process")
        left.set_xlabel("MB (10⁶ bytes)")
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=4, handlelength=1.2)
    weights = [r.weight_bytes / MB for r in records]
    right.barh(range(len(records)), weights, height=0.5, color=[PALETTE[find_family(r)] for r in records])
    for i, value in enumerate(weights):
        right.annotate(format_significant(value), (value, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    right.set_xlim(0, max(weights) * 1.16 or 1)
    right.set_title("Bytes of the weights")
    right.set_xlabel("MB (10⁶ bytes)")
    for axes in grid[0]:
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    first = grid[0, 0]
    first.set_yticks(range(len(records)), names, color=PALETTE["ink"])
    first.set_ylim(len(records) - 0.45, -0.55)
    alt = "Bars by variant: resident memory before loading, loaded, at its peak and after cleanup; bytes of the weights."
    return render(figure, "memory", "Memory", alt)


def draw_quality(records: list[Record]) -> Plot | None:
    """Mean KL and perplexity against bits per weight, both with one standard error."""
    names = [clean_label(n) for n in name_variants(records)]
    baseline = find_baseline(records)
    with_kl = [i for i, r in enumerate(records) if (number(r.kl_mean) or 0) > 0]
    with_perplexity = [i for i, r in enumerate(records) if (number(r.perplexity) or 0) > 0]
    panels = [p for p in (("kl", with_kl), ("perplexity", with_perplexity)) if p[1]]
    if not panels:
        return None
    figure = new_figure(4.5 * len(panels))
    labelled = []
    for axes, (kind, chosen) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        values = [(number(records[i].kl_mean if kind == "kl" else records[i].perplexity) or 0.0) for i in chosen]
        errors = [(number(records[i].kl_se if kind == "kl" else records[i].perplexity_se) or 0.0) for i in chosen]
        labels = [names[i] for i in chosen]
        reference = None
        if kind == "kl":
            axes.set_title("Mean KL from the float model, nats per token (lower is better)")
        else:
            reference = (number(baseline.perplexity) if baseline else None) or min(values)
            beyond = [v > 1.1 * PERPLEXITY_FACTOR * reference for v in values]
            labels = [f"{n} ↑ {format_significant(v)}" if b else n for n, v, b in zip(labels, values, beyond, strict=True)]
            title = "Perplexity (lower is better)"
            axes.set_title(f"{title} – arrows: beyond the upper edge" if any(beyond) else title)
        shown, whiskers = _draw_against_bits(axes, [records[i] for i in chosen], values, errors, reference)
        bits = [records[i].bpw for i in chosen]
        labelled.append((axes, list(zip(bits, shown, labels, strict=True)), whiskers, reference))
    figure.draw_without_rendering()  # fixes where the panels lie, which labels need to know
    for axes, points, whiskers, reference in labelled:
        place_labels(axes, points, whiskers, reference)
    alt = "Mean KL and perplexity of each variant against its bits per weight, with one standard error."
    return render(figure, "quality", "Quality against bits per weight", alt)


def _draw_against_bits(
    axes: Axes, records: Sequence[Record], values: Sequence[float], errors: Sequence[float], reference: float | None
) -> tuple[list[float], list[tuple[float, float]]]:
    """Points with error bars; returns where each was drawn and the ends of its bar.

    Without a reference the axis is logarithmic, with one it is linear and ends above PERPLEXITY_FACTOR times the
    reference: what lies beyond is an arrow at the edge.
    """
    bits = [r.bpw for r in records]
    colours = [PALETTE[find_family(r)] for r in records]
    axes.set_xscale("log", base=2)
    ticks = [t for t in (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64) if min(bits) / 1.35 <= t <= max(bits) * 1.35]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(bits) / 1.25, max(bits) * 1.45)
    axes.set_xlabel("bits per weight (logarithmic)")
    axes.grid(which="major")
    if reference is None:
        # A bar that reached zero could not be drawn on a logarithmic axis.
        lower = [min(e, v * 0.95) for v, e in zip(values, errors, strict=True)]
        low = min(v - e for v, e in zip(values, lower, strict=True))
        high = max(v + e for v, e in zip(values, errors, strict=True))
        room = max((high / low) ** 0.07, 1.2)
        axes.set_yscale("log")
        axes.set_ylim(low / room, high * room)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        shown = list(values)
    else:
        lower = list(errors)
        within = [v <= 1.1 * PERPLEXITY_FACTOR * reference for v in values]
        near = [(v, e) for v, e, w in zip(values, errors, within, strict=True) if w] or [(reference, 0.0)]
        low, high = min(v - e for v, e in near), max(v + e for v, e in near)
        room = max((high - low) * 0.12, reference * 0.01)
        low, high = low - room, high + (2.2 if not all(within) else 1.0) * room
        shown = [v if w else high - 0.35 * room for v, w in zip(values, within, strict=True)]
        axes.set_ylim(low, high)
        axes.axhline(reference, color=PALETTE["muted"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    in_place = [k for k, (v, s) in enumerate(zip(values, shown, strict=True)) if v == s]
    axes.errorbar(
        [bits[k] for k in in_place],
        [shown[k] for k in in_place],
        yerr=[[lower[k] for k in in_place], [errors[k] for k in in_place]],
        fmt="none",
        ecolor=PALETTE["muted"],
        elinewidth=1,
        capsize=2.5,
        zorder=2,
    )
    for k, (x, y) in enumerate(zip(bits, shown, strict=True)):
        axes.scatter([x], [y], c=[colours[k]], s=40, marker="o" if k in in_place else "^", zorder=3)
    ends = [(y - lower[k], y + errors[k]) if k in in_place else (y, y) for k, y in enumerate(shown)]
    return shown, ends


def _fractions(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [c / total for c in counts] if total else []


def _draw_histogram(axes: Axes, counts: Sequence[int], outline: Sequence[int] | None, limit: float, colour: str) -> None:
    """Filled bars of `counts`, the float weights as an outline. The axis ends at twice the outline's top."""
    bars = _fractions(counts)
    edges = [limit * (2 * k / max(len(bars), 1) - 1) for k in range(len(bars) + 1)]
    reference = _fractions(outline) if outline is not None and len(outline) == len(counts) else []
    top = 1.9 * max(reference) if reference else 1.1 * max(bars, default=0)
    axes.stairs(bars, edges, fill=True, color=colour, linewidth=0)
    if reference:
        axes.stairs(reference, edges, color=PALETTE["ink"], linewidth=0.8)
    top = min(top, 1.1 * max([*bars, *reference], default=1)) or 1.0
    axes.set_ylim(0, top)
    if max(bars, default=0) > top:
        axes.text(
            0.98,
            0.95,
            f"highest bin {max(bars):.0%}",
            transform=axes.transAxes,
            ha="right",
            va="top",
            fontsize=7,
            color=PALETTE["muted"],
        )
    axes.set_xlim(-limit, limit)
    axes.set_xticks([-limit, 0, limit], [f"{-limit:.2g}".replace("-", "−"), "0", f"{limit:.2g}"])
    first, _, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    axes.tick_params(labelsize=7, length=2)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def draw_histograms(records: list[Record]) -> Plot | None:
    """All quantized weights of the model: one panel a variant, the float weights as an outline in each."""
    baseline = find_baseline(records)
    names = name_variants(records)
    chosen = [i for i, r in enumerate(records) if sum(r.model_histogram) > 0 and r.model_histogram_limit > 0]
    if not chosen:
        return None
    columns = min(4, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure = new_figure(1.55 * rows + 0.2)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, i in zip(panels, chosen, strict=False):
        record = records[i]
        same = baseline is not None and baseline.model_histogram_limit == record.model_histogram_limit
        outline = baseline.model_histogram if baseline and same else None
        _draw_histogram(axes, record.model_histogram, outline, record.model_histogram_limit, PALETTE[find_family(record)])
        axes.set_title(clean_label(names[i], 24), fontsize=8.5, fontweight="normal")
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()
    alt = "Histograms of the decoded weights of the whole model by variant, with the float weights as an outline."
    return render(figure, "histograms", "Weights before and after", alt)


def pick_low_bit(records: list[Record], judgements: list[Judgement]) -> int | None:
    """Index of the variant with the fewest bits that is not broken and has layers, fp32 aside."""
    baseline = find_baseline(records)
    usable = [
        i
        for i, (r, j) in enumerate(zip(records, judgements, strict=True))
        if r is not baseline and j.level != "broken" and any(_drawable(layer) for layer in r.layers)
    ]
    return min(usable, key=lambda i: (records[i].bpw, i), default=None)


def _drawable(layer: LayerRecord) -> bool:
    return sum(layer.histogram) > 0 and layer.histogram_limit > 0


def draw_layers(records: list[Record], judgements: list[Judgement]) -> Plot | None:
    """The weights layer by layer for the variant with the fewest bits that is not broken."""
    chosen = pick_low_bit(records, judgements)
    if chosen is None:
        return None
    record, baseline = records[chosen], find_baseline(records)
    originals = {layer.name: layer for layer in baseline.layers} if baseline else {}
    layers = [layer for layer in record.layers if _drawable(layer)]
    shown = layers[:LAYER_PANELS]
    columns = min(5, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(1.28 * rows + 0.5)
    rest = f" (the first {len(shown)} of {len(layers)} layers)" if len(shown) < len(layers) else ""
    figure.suptitle(
        f"{clean_label(name_variants(records)[chosen])}, layer by layer, fp32 as an outline{rest}",
        fontsize=10,
        fontweight="bold",
    )
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, layer in zip(panels, shown, strict=False):
        original = originals.get(layer.name)
        same = original is not None and original.histogram_limit == layer.histogram_limit
        outline = original.histogram if original and same else None
        _draw_histogram(axes, layer.histogram, outline, layer.histogram_limit, PALETTE[find_family(record)])
        axes.set_title(clean_label(shorten_layer(layer.name), 24), fontsize=7.5, fontweight="normal")
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    return render(
        figure,
        "layers",
        "Weights layer by layer",
        "Histograms of the decoded weights of each layer, with the float weights as an outline.",
    )


def shorten_layer(name: str) -> str:
    """`transformer.h.0.attn.c_attn.weight` as `h.0.attn.c_attn`: what every name shares says nothing."""
    for prefix in ("transformer.", "model."):
        name = name.removeprefix(prefix)
    return name.removesuffix(".weight")


def collect_errors(records: list[Record]) -> tuple[list[int], list[str], list[list[float | None]]]:
    """(indices of variants, names of layers, relative error [layers][variants]); fp32 is left out, None is absent."""
    baseline = find_baseline(records)
    variants = [i for i, r in enumerate(records) if r is not baseline and r.format != "fp32" and r.layers]
    names = list(dict.fromkeys(layer.name for i in variants for layer in records[i].layers))
    errors = [{layer.name: number(layer.relative_error) for layer in records[i].layers} for i in variants]
    return variants, names, [[column.get(name) for column in errors] for name in names]


def span_errors(rows: list[list[float | None]]) -> tuple[float, float] | None:
    """log10 of the smallest and largest error above zero; None when there is none."""
    logs = [math.log10(v) for row in rows for v in row if v is not None and v > 0]
    if not logs:
        return None
    return min(logs), max(max(logs), min(logs) + 1e-6)


def colour_error(error: float, span: tuple[float, float]) -> str:
    """Colour of a relative error as #rrggbb; light is a large error. 0 takes the colour of the smallest."""
    place = Normalize(*span, clip=True)(math.log10(error)) if error > 0 else 0.0
    return to_hex(colormaps[ERROR_MAP](float(place)))


def draw_errors(records: list[Record]) -> Plot | None:
    """Heat map of the squared relative error of each layer under each variant."""
    variants, layers, rows = collect_errors(records)
    span = span_errors(rows)
    if span is None:
        return None
    names = name_variants(records)
    figure = new_figure(1.6 + 0.2 * len(layers))
    axes = figure.subplots()
    grid = [[math.log10(v) if v else (math.nan if v is None else span[0]) for v in row] for row in rows]
    image = axes.imshow(grid, cmap=ERROR_MAP, norm=Normalize(*span), aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(layers)), [clean_label(shorten_layer(n), 30) for n in layers], fontsize=7.5)
    axes.set_xticks(
        range(len(variants)),
        [clean_label(names[i], 22) for i in variants],
        rotation=35,
        ha="right",
        rotation_mode="anchor",
    )
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02)
    bar.set_label("log10 of |W − Q|² / |W|²")
    bar.outline.set_visible(False)
    axes.set_title("Relative error of each layer")
    return render(figure, "errors", "Error by layer", "Heat map of the relative error by layer and variant.")


def legend_families(records: list[Record]) -> list[tuple[str, str]]:
    """(family, words) of the families that occur, in their fixed order."""
    present = {find_family(r) for r in records}
    return [(family, words) for family, words in FAMILIES.items() if family in present]
