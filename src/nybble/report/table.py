"""The table of a comparison: one row a variant, one place for how each figure is computed, named and written.

The page, `report.md` and the terminal all show these columns. 1 MB is 10^6 bytes. A value that was not measured is
written as an en dash. Leaves out: colours and markup, which belong to whoever shows the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nybble.evaluate.record import Record
from nybble.report.figures import (
    MISSING,
    format_difference,
    format_megabytes,
    format_percent,
    format_perplexity,
    format_significant,
    number,
)
from nybble.report.judge import Judgement, find_baseline, find_family, judge_variant, name_variants

Value = Callable[[Record, Record | None], float | None]


@dataclass(frozen=True)
class Column:
    """One column: what it holds and how it is written."""

    key: str
    group: str
    """Heading over several columns: Size, Memory, Speed, Quality."""
    header: str
    unit: str
    """Empty for a plain number."""
    help: str
    """One sentence for the page's tooltip and glossary."""
    value: Value
    """(record, baseline) to the figure in `unit`-free base units; what sorting uses."""
    text: Callable[[float | None], str]
    best: str = ""
    """`low`, `high`, or empty where no value is better than another."""
    main: bool = True
    """Shown in the terminal and in report.md too, not on the page alone."""
    detail: Callable[[Record, Record | None], str] | None = None
    """A second, smaller line in the cell."""
    title: Callable[[Record, Record | None], str] | None = None
    """A tooltip."""


@dataclass(frozen=True)
class Cell:
    """One figure of one variant, as it is written."""

    value: float | None
    text: str
    detail: str
    title: str
    best: bool


@dataclass(frozen=True)
class Row:
    """One variant."""

    name: str
    family: str
    judgement: Judgement
    record: Record
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Rows in the order of the records, cells in the order of the columns."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def _ratio(top: float | None, bottom: float | None) -> float | None:
    top, bottom = number(top), number(bottom)
    return top / bottom if top is not None and bottom else None


def _growth(record: Record) -> float | None:
    after, before = record.memory_after_load_bytes, record.memory_before_bytes
    return None if after is None or before is None else after - before


def _detail_growth(record: Record, _: Record | None) -> str:
    growth = _growth(record)
    return "" if growth is None else f"{'+' if growth >= 0 else '−'}{format_megabytes(abs(growth))}"


def _title_memory(record: Record, _: Record | None) -> str:
    if record.memory_before_bytes is None:
        return ""
    return f"{format_megabytes(record.memory_before_bytes)} MB before the model was loaded; below: growth by loading"


def _title_spread(record: Record, _: Record | None) -> str:
    runs = [r for r in record.seconds_50_tokens_runs or [] if number(r) is not None]
    return f"{len(runs)} runs, {format_significant(min(runs))} to {format_significant(max(runs))} s" if runs else ""


def _title_limit(record: Record, _: Record | None) -> str:
    limit, own = number(record.limit_tokens_per_second), number(record.tokens_per_second)
    if not limit:
        return ""
    share = f"; reached {own / limit:.0%}" if own else ""
    return f"memory bandwidth allows {format_significant(limit)} tokens/s{share}"


def _spread(value: float | None, text: Callable[[float | None], str]) -> str:
    return "" if number(value) is None or value == 0 else f"±{text(value)}"


def _change(record: Record, baseline: Record | None) -> float | None:
    ratio = _ratio(record.perplexity, baseline.perplexity if baseline else None)
    return None if ratio is None else ratio - 1


COLUMNS = (
    Column(
        "bpw",
        "Size",
        "bits",
        "per weight",
        "Everything stored for the quantized weights (codes, scales, offsets), over their number.",
        lambda r, b: r.bpw,
        lambda v: MISSING if number(v) is None else f"{v:.2f}",
        "low",
    ),
    Column(
        "weights",
        "Size",
        "weights",
        "MB",
        "All tensors of the loaded model as they lie in memory, parts kept in float included.",
        lambda r, b: r.weight_bytes,
        format_megabytes,
        "low",
    ),
    Column(
        "share",
        "Size",
        "of fp32",
        "%",
        "Bytes of the weights over those of fp32.",
        lambda r, b: _ratio(r.weight_bytes, b.weight_bytes if b else None),
        format_percent,
        "low",
    ),
    Column(
        "file",
        "Size",
        "file",
        "MB",
        "The weight file on disk, header included.",
        lambda r, b: r.file_bytes,
        format_megabytes,
        "low",
        main=False,
    ),
    Column(
        "resident",
        "Memory",
        "loaded",
        "MB",
        "Resident memory of a fresh process after loading; below it the growth by loading.",
        lambda r, b: r.memory_after_load_bytes,
        format_megabytes,
        "low",
        detail=_detail_growth,
        title=_title_memory,
    ),
    Column(
        "peak",
        "Memory",
        "peak",
        "MB",
        "Highest resident memory from loading through generation.",
        lambda r, b: r.memory_peak_bytes,
        format_megabytes,
        "low",
    ),
    Column(
        "cleanup",
        "Memory",
        "cleanup",
        "MB",
        "Resident memory after the model was deleted and freed memory was given back.",
        lambda r, b: r.memory_after_cleanup_bytes,
        format_megabytes,
        "",
        main=False,
    ),
    Column(
        "load",
        "Speed",
        "load",
        "s",
        "From the file on disk to a model that is ready.",
        lambda r, b: r.load_seconds,
        format_significant,
        "low",
        main=False,
    ),
    Column(
        "first",
        "Speed",
        "first token",
        "s",
        "From the prompt to the first new token, the model loaded and warm.",
        lambda r, b: r.first_token_seconds,
        format_significant,
        "low",
        main=False,
    ),
    Column(
        "seconds",
        "Speed",
        "{new} tokens",
        "s",
        "Prompt in, new tokens out, greedy, one sequence; median of the timed runs.",
        lambda r, b: r.seconds_50_tokens,
        format_significant,
        "low",
        title=_title_spread,
    ),
    Column(
        "rate",
        "Speed",
        "rate",
        "tok/s",
        "New tokens over those seconds.",
        lambda r, b: r.tokens_per_second,
        format_significant,
        "high",
        title=_title_limit,
    ),
    Column(
        "speedup",
        "Speed",
        "vs fp32",
        "×",
        "Seconds of fp32 over seconds of the variant: above 1 is faster.",
        lambda r, b: _ratio(b.seconds_50_tokens if b else None, r.seconds_50_tokens),
        lambda v: MISSING if number(v) is None else f"{v:.2f}",
        "high",
    ),
    Column(
        "prefill",
        "Speed",
        "prefill",
        "tok/s",
        "Tokens of the prompt read per second.",
        lambda r, b: r.prefill_tokens_per_second,
        format_significant,
        "high",
        main=False,
    ),
    Column(
        "perplexity",
        "Quality",
        "perplexity",
        "± se",
        "exp of the mean loss per token of the text under the stated protocol; lower is better.",
        lambda r, b: r.perplexity,
        format_perplexity,
        "low",
        detail=lambda r, b: _spread(r.perplexity_se, lambda v: format_significant(v, 2)),
    ),
    Column(
        "change",
        "Quality",
        "change",
        "%",
        "Difference of the perplexity to that of fp32.",
        _change,
        format_difference,
        "",
    ),
    Column(
        "kl",
        "Quality",
        "mean KL",
        "nats ± se",
        "Kullback-Leibler divergence of the variant's next-token distribution from the float model's; 0 is equal.",
        lambda r, b: r.kl_mean,
        format_significant,
        "low",
        detail=lambda r, b: _spread(r.kl_se, lambda v: format_significant(v, 2)),
    ),
    Column(
        "kl_p99",
        "Quality",
        "KL p99",
        "nats",
        "99th percentile of the per-token divergence: how bad the worst tokens are.",
        lambda r, b: r.kl_p99,
        format_significant,
        "low",
        main=False,
    ),
    Column(
        "top1",
        "Quality",
        "same top 1",
        "%",
        "Tokens whose most likely successor is the float model's.",
        lambda r, b: r.top1_agreement,
        format_percent,
        "high",
    ),
    Column(
        "quantize",
        "Making",
        "quantize",
        "s",
        "Choosing the codes and writing the file.",
        lambda r, b: r.quantize_seconds,
        format_significant,
        "low",
        main=False,
    ),
)


def summary_table(records: list[Record]) -> Table:
    """All columns and one row a record, differences against the first fp32 record. `Column.main` picks the short form.

    `best` is marked among the variants that are not broken; in the columns of quality, the baseline does not compete.
    """
    baseline = find_baseline(records)
    judgements = [judge_variant(r, baseline) for r in records]
    counts = {r.run.new_tokens for r in records}
    new = str(counts.pop()) if len(counts) == 1 else "new"
    columns = tuple(_with_header(c, c.header.format(new=new)) for c in COLUMNS)
    values = [[number(c.value(r, baseline)) for c in columns] for r in records]
    best = [_find_best(c, [row[k] for row in values], records, judgements, baseline) for k, c in enumerate(columns)]
    rows = tuple(
        Row(
            name,
            find_family(record),
            judgement,
            record,
            tuple(
                Cell(
                    row[k],
                    c.text(row[k]),
                    c.detail(record, baseline) if c.detail and row[k] is not None else "",
                    c.title(record, baseline) if c.title else "",
                    row[k] is not None and row[k] == best[k],
                )
                for k, c in enumerate(columns)
            ),
        )
        for name, record, judgement, row in zip(name_variants(records), records, judgements, values, strict=True)
    )
    return Table(columns, rows)


def _with_header(column: Column, header: str) -> Column:
    return column if header == column.header else Column(**{**column.__dict__, "header": header})


def _find_best(
    column: Column,
    values: list[float | None],
    records: list[Record],
    judgements: list[Judgement],
    baseline: Record | None,
) -> float | None:
    """The value to mark, or None: fewer than two competitors, or all alike."""
    field = [
        v
        for v, r, j in zip(values, records, judgements, strict=True)
        if v is not None and j.level != "broken" and not (column.group == "Quality" and r is baseline)
    ]
    if not column.best or len(field) < 2 or min(field) == max(field):
        return None
    return min(field) if column.best == "low" else max(field)
