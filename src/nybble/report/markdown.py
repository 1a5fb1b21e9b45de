"""`report.md`: the verdict, the main columns of the table, warnings and plots, for reading without a browser.

Leaves out the histograms' explorer and the generated texts, which only the page can show well.
"""

from __future__ import annotations

import re

from nybble.evaluate.record import Record
from nybble.report.drawing import Plot
from nybble.report.judge import (
    compare_zero_point,
    count_runs,
    find_baseline,
    has_random_weights,
    judge_variant,
    list_warnings,
    state_verdict,
)
from nybble.report.page import LEVEL_WORDS, collect_notes, describe_engine, describe_run, explain_missing_quality
from nybble.report.table import summary_table


def escape(text: object) -> str:
    """Text that Markdown shows as it is: one line, no markup, no HTML, no end of a table cell."""
    line = re.sub(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", str(text))
    line = re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", line)
    # An address would become a link in most readers: break its scheme.
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("://", ":&#47;&#47;")


def render_markdown(records: list[Record], plots: dict[str, Plot]) -> str:
    """The whole report as Markdown."""
    baseline = find_baseline(records)
    judgements = [judge_variant(r, baseline) for r in records]
    lines = [
        f"# nybble compare: {escape(records[0].run.model.get('name', 'model'))}",
        "",
        escape(state_verdict(records, judgements)),
        "",
    ]
    if has_random_weights(records):
        lines += ["**Random weights: good for speed and memory only.**", ""]
    if count_runs(records) > 1:
        lines += [
            f"**These records come from {count_runs(records)} runs; figures of different runs may not be comparable.**",
            "",
        ]
    finding = compare_zero_point(records)
    if finding:
        lines += [escape(finding), ""]
    lines += [
        "## Results",
        "",
        *_table(records),
        "",
        "MB are 10^6 bytes. Differences are to fp32. A dash is a figure that was not measured.",
        "",
    ]
    warnings = list_warnings(records, judgements)
    if warnings:
        lines += [
            "## Warnings",
            "",
            *(f"- **{LEVEL_WORDS[level]}**: {escape(sentence)}" for _, level, sentence in warnings),
            "",
        ]
    notes = collect_notes(records)
    if notes:
        lines += ["## Notes", "", *(f"- {escape(note)} ({escape(', '.join(names))})" for note, names in notes), ""]
    lines += ["## Plots", ""]
    for name, plot in plots.items():
        lines += [
            f"### {plot.title}",
            "",
            f"![{plot.alt}](plots/{name}.png)",
            "",
            f"[{name}.svg](plots/{name}.svg)",
            "",
        ]
    if "quality" not in plots:
        lines += [explain_missing_quality(records), ""]
    lines += [
        "## Where the figures come from",
        "",
        *(f"- {term}: {escape(words)}" for term, words in describe_run(records[0]) + describe_engine(records)),
        "",
    ]
    return "\n".join(lines)


def _table(records: list[Record]) -> list[str]:
    table = summary_table(records)
    chosen = [k for k, column in enumerate(table.columns) if column.main]
    heads = [
        f"{table.columns[k].label} ({table.columns[k].unit})" if table.columns[k].unit else table.columns[k].label for k in chosen
    ]
    lines = [f"| variant | {' | '.join(heads)} | verdict |", f"| :-- | {' | '.join('--:' for _ in chosen)} | :-- |"]
    for row in table.rows:
        cells = [f"{row.cells[k].text} {row.cells[k].detail}".strip() for k in chosen]
        lines.append(f"| {escape(row.name)} | {' | '.join(cells)} | {LEVEL_WORDS[row.judgement.level]} |")
    return lines
