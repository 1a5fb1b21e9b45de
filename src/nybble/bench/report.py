"""A race as people read it: the table of the terminal, the same table in Markdown, and a plot of the decoding speed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from nybble.bench.adapters import OURS
from nybble.bench.racers import Racer
from nybble.bench.standing import Race
from nybble.bench.workload import BATCHES
from nybble.formats import parse_format
from nybble.mixes import find_mix
from nybble.report.figures import format_megabytes, format_percent, format_significant


@dataclass(frozen=True)
class Column:
    """One column: `key` is a figure of `Race.figures`, or `weight_bytes`."""

    key: str
    header: str
    unit: str
    show: Callable[[float | None], str]


COLUMNS = (
    Column("weight_bytes", "weights", "MB", format_megabytes),
    Column("load_s", "loaded", "s", format_significant),
    Column("first_token_s", "first token", "s", format_significant),
    Column("tokens_per_second", "decode", "tokens/s", format_significant),
    Column("ratio_to_baseline", "speed", "× {baseline}", format_significant),
    Column("bandwidth_share", "bandwidth", "%", lambda value: format_percent(value, 0)),
    Column("prefill_tokens_per_second", "prefill", "tokens/s", format_significant),
    *(Column(f"batch{rows}_tokens_per_second", f"batch {rows}", "tokens/s", format_significant) for rows in BATCHES[1:]),
    Column("memory_loaded_bytes", "resident", "MB", format_megabytes),
    Column("memory_peak_bytes", "peak", "MB", format_megabytes),
)
LEAST_FIRST = ("memory_loaded_bytes", "batch4_tokens_per_second", "load_s", "batch16_tokens_per_second", "memory_peak_bytes")
"""Columns that a narrow terminal goes without, in this order; the files have them all."""


def table_of(race: Race) -> tuple[list[Column], list[str], list[list[str]]]:
    """(columns with any figure, names of the racers, rows of cells in their order)."""
    measured = [(standing, race.figures(standing)) for standing in race.finished]
    rows = []
    for standing, figures in measured:
        medians: dict[str, float] = {name: statistics.median(values) for name, values in figures.items()}
        medians["weight_bytes"] = standing.facts["weight_bytes"]
        rows.append(medians)
    columns = [column for column in COLUMNS if any(column.key in medians for medians in rows)]
    cells = [[column.show(medians.get(column.key)) for column in columns] for medians in rows]
    return columns, [str(standing.racer) for standing, _ in measured], cells


def unit_of(column: Column, race: Race) -> str:
    """The unit in a column's head."""
    return column.unit.format(baseline=race.baseline.racer)


def describe(race: Race) -> list[str]:
    """What was measured, on which machine, in a few lines."""
    work = race.workload
    machine = race.machine
    lines = [
        f"{race.model}: prompt of {work.prompt_tokens} tokens, {work.new_tokens} new ones, greedy; prefill of "
        f"{work.prefill_tokens}; median of {race.rounds} rounds, each the best of {race.repeats} runs in a new process",
        f"{machine['cpu']}, {race.threads} of {machine['cores']} threads, {machine['instruction_set']}; memory reads "
        f"{_reads(race)}" + (f"; load average {statistics.median(race.loads):.2f}" if race.loads else ""),
    ]
    if any(standing.racer.runtime == OURS for standing in race.finished):
        lines.append("nybble computes with float activations (--exact)" if race.exact else "nybble may round activations to int8")
    return [*lines, *work.notes]


def _reads(race: Race) -> str:
    """What memory read at in the race."""
    least, most = (f"{each / 1e9:.1f}" for each in race.bandwidths)
    return f"{least} GB/s" if least == most else f"{least} to {most} GB/s"


def render_markdown(race: Race, plot: bool) -> str:
    """The table and its circumstances as Markdown; with `plot` the picture decode.png beside it."""
    from nybble.report.markdown import escape

    columns, names, rows = table_of(race)
    heads = [f"{column.header} ({unit_of(column, race)})" for column in columns]
    lines = [f"# nybble bench: {escape(race.model)}", ""]
    lines += [f"| racer | {' | '.join(heads)} |", f"| :-- | {' | '.join('--:' for _ in heads)} |"]
    lines += [f"| {escape(name)} | {' | '.join(cells)} |" for name, cells in zip(names, rows, strict=True)]
    lines += ["", *(f"- {escape(line)}" for line in (*describe(race), *race.skipped)), ""]
    lines += ["MB are 10^6 bytes. Bandwidth is the share that decoding reaches of what memory reads right before and after.", ""]
    if plot:
        lines += ["![Tokens per second of each racer](decode.png)", ""]
    return "\n".join(lines)


def draw_decode(race: Race) -> bytes | None:
    """PNG with a bar for each racer's tokens per second and the share of the bandwidth beside it; None without figures."""
    from nybble.report.drawing import PALETTE, clean_label, new_figure, render, style

    found = []
    for standing in race.finished:
        figures = race.figures(standing)
        if "tokens_per_second" in figures:
            rates = figures["tokens_per_second"]
            found.append((statistics.median(rates), rates, statistics.median(figures["bandwidth_share"]), standing.racer))
    if not found:
        return None
    found.sort(key=lambda row: -row[0])
    with style():
        figure = new_figure(1.2 + 0.36 * len(found))
        axes = figure.subplots()
        for place, (rate, rates, share, racer) in enumerate(found):
            axes.barh(place, rate, height=0.62, color=PALETTE[_colour(racer)])
            axes.plot([min(rates), max(rates)], [place, place], color=PALETTE["ink"], linewidth=1.2)
            text = f"{format_significant(rate)}   {format_percent(share, 0)} %"
            place_of = (max(rates), place)
            axes.annotate(text, place_of, xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_yticks(range(len(found)), [clean_label(str(row[3])) for row in found], color=PALETTE["ink"])
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xlim(0, 1.18 * max(max(row[1]) for row in found))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_title("Decoding: tokens per second (higher is better), and share of the memory's read bandwidth")
        axes.set_xlabel(
            f"{clean_label(race.model, 60)}; {clean_label(str(race.machine['cpu']), 60)}, {race.threads} threads, "
            f"{_reads(race)}; line: range of the rounds; grey: peers"
        )
        return render(figure, "decode", "Decoding speed", "Tokens per second of each racer.").png


def _colour(racer: Racer) -> str:
    """Name in the palette: the family of nybble's formats, one grey for peers."""
    if racer.runtime != OURS:
        return "phase1"
    mix = find_mix(racer.format)
    fmt = parse_format(mix[1].default if mix else racer.format)
    if fmt.is_cast:
        return "float"
    if fmt.bits == 8:
        return "int8"
    return "low" if fmt.bits < 4 else "int4" if racer.format.startswith("int") else "codebook"
