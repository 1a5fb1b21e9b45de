"""From records to what a person reads: `report.html`, `report.md` and the folder `plots/`.

    write_report(records, html)   writes all of it
    summary_table(records)        the table alone, for the terminal

Reads records only: it never loads a model, and needs neither torch nor transformers. matplotlib and jinja2 are imported
when a report is written.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nybble.errors import InputError, OutputError
from nybble.evaluate.record import EngineRecord, Record
from nybble.files.folder import write_whole
from nybble.report.column import Column
from nybble.report.judge import find_baseline, judge_variant
from nybble.report.table import Row, Table, summary_table

__all__ = ["Column", "Row", "Table", "summary_table", "write_report"]

_NUMBERS = {f.name: "None" in str(f.type) for f in dataclasses.fields(Record) if str(f.type).split(" ")[0] in ("int", "float")}
_ENGINE = {f.name: str(f.type) for f in dataclasses.fields(EngineRecord)}
_TEXTS = ("variant", "format", "method", "plan_hash", "sample_greedy", "sample_top_k")


def write_report(records: list[Record], html: Path) -> list[Path]:
    """Write the page to `html`, `report.md` beside it (the same stem), and every plot as SVG and PNG under `plots/`.

    The same records give the same bytes. All files are first written under temporary names in their folder and renamed
    at the end, so nothing half-written is ever seen; plots of an earlier report that this one lacks are removed.
    Returns the paths written, the page first. Raises InputError when there are no records or one is malformed,
    OutputError when the files cannot be written.
    """
    _check(records)
    html = Path(html)
    markdown = html.with_suffix(".md")
    if html.suffix.lower() == ".md":
        raise OutputError(f"{html}: the page needs another suffix than .md, which names the text report beside it; use .html")
    if html.is_dir():
        raise OutputError(f"{html} is a folder; give the page's file name, e.g. {html / 'report.html'}")

    from nybble.report.markdown import render_markdown
    from nybble.report.page import render_page
    from nybble.report.plots import PLOT_NAMES, draw_all

    baseline = find_baseline(records)
    plots = draw_all(records, [judge_variant(r, baseline) for r in records])
    folder = html.parent / "plots"
    files = {html: _encode(render_page(records, plots)), markdown: _encode(render_markdown(records, plots))}
    for name, plot in plots.items():
        files[folder / f"{name}.svg"] = plot.svg
        files[folder / f"{name}.png"] = plot.png
    stale = [folder / f"{name}.{kind}" for name in PLOT_NAMES if name not in plots for kind in ("svg", "png")]
    try:
        write_whole(files, stale)
    except OSError as error:
        raise OutputError(
            f"cannot write the report to {html}: {error.strerror or error}; choose another place with -o"
        ) from error
    return list(files)


def _encode(text: str) -> bytes:
    # A record may hold half of a surrogate pair, which no UTF-8 file can.
    return text.encode("utf-8", errors="replace")


def _check(records: list[Record]) -> None:
    """Figures must be numbers and texts strings: a results file comes from outside."""
    if not records:
        raise InputError("there are no records to report on; run nybble compare first")
    for i, record in enumerate(records, 1):
        for name, optional in _NUMBERS.items():
            value = getattr(record, name)
            if not (optional and value is None) and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise InputError(f"record {i}: {name} is {value!r:.60}, not a number; measure again with nybble compare")
        for name in _TEXTS:
            value = getattr(record, name)
            if value is not None and not isinstance(value, str):
                raise InputError(f"record {i}: {name} is {value!r:.60}, not a text; measure again with nybble compare")
        for name, kind in _ENGINE.items() if record.engine else ():
            value = getattr(record.engine, name)
            if not _is_of(value, kind):
                raise InputError(
                    f"record {i}: the engine's {name} is {value!r:.60}, not {kind}; measure again with nybble compare"
                )
        for where, counts in (
            ("the model", record.model_histogram),
            *((layer.name, layer.histogram) for layer in record.layers),
        ):
            if not isinstance(counts, list) or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in counts):
                raise InputError(f"record {i}: the histogram of {where!r:.80} is not a list of counts; measure again")


def _is_of(value: object, kind: str) -> bool:
    """Whether a field of EngineRecord holds what its annotation says."""
    if kind == "str":
        return isinstance(value, str)
    if kind == "list[float]":
        return isinstance(value, list) and all(_is_of(item, "float") for item in value)
    return (value is None and "None" in kind) or (isinstance(value, int | float) and not isinstance(value, bool))
