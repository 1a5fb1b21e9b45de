"""What a column of the table is, and what the modules that list columns share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nybble.evaluate.record import Record
from nybble.report.figures import format_megabytes, number

Value = Callable[[Record, Record | None], float | None]


@dataclass(frozen=True)
class Column:
    """One column: what it holds and how it is written."""

    key: str
    group: str
    """Heading over several columns: Size, Memory, Engine speed, torch speed, Quality."""
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
    by: str = ""
    """`engine` or `torch`: what computed while it was measured, shown before the header; empty where nothing did."""

    @property
    def label(self) -> str:
        """Header with what computed before it, for places without headings over several columns."""
        return f"{self.by}: {self.header}" if self.by else self.header


def ratio(top: float | None, bottom: float | None) -> float | None:
    """top / bottom; None where one is missing or bottom is 0."""
    top, bottom = number(top), number(bottom)
    return top / bottom if top is not None and bottom else None


def signed_megabytes(growth: float) -> str:
    """Bytes as MB with their sign."""
    return f"{'+' if growth >= 0 else '−'}{format_megabytes(abs(growth))}"


def of_engine(name: str) -> Value:
    """A field of the engine's figures."""
    return lambda r, b: getattr(r.engine, name) if r.engine else None
