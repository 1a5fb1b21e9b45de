"""The table of a comparison: one row a variant, the columns of columns.py.

The page, `report.md` and the terminal all show it. Leaves out: colours and markup, which belong to whoever shows the table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nybble.evaluate.record import Record
from nybble.report.column import Column
from nybble.report.columns import COLUMNS
from nybble.report.figures import number
from nybble.report.judge import Judgement, find_baseline, find_family, judge_variant, name_variants


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


TORCH_MAIN = ("torch_seconds",)
"""Columns of torch's speed that the short form keeps beside the engine's."""


def _columns(records: list[Record]) -> tuple[Column, ...]:
    """The columns of these records: the engine's only where it decoded any of them."""
    counts = {r.run.new_tokens for r in records}
    new = str(counts.pop()) if len(counts) == 1 else "new"
    named = [replace(c, header=c.header.format(new=new)) for c in COLUMNS]
    if all(r.engine is None for r in records):
        return tuple(replace(c, by="") for c in named if c.by != "engine")
    return tuple(replace(c, main=c.main and (c.group != "torch speed" or c.key in TORCH_MAIN)) for c in named)


def summary_table(records: list[Record]) -> Table:
    """All columns and one row a record, differences against the first fp32 record. `Column.main` picks the short form.

    `best` is marked among the variants that are not broken; in the columns of quality, the baseline does not compete.
    """
    baseline = find_baseline(records)
    judgements = [judge_variant(r, baseline) for r in records]
    columns = _columns(records)
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
                    row[k] is not None and row[k] == best[k] and judgement.level != "broken",
                )
                for k, c in enumerate(columns)
            ),
        )
        for name, record, judgement, row in zip(name_variants(records), records, judgements, values, strict=True)
    )
    return Table(columns, rows)


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
