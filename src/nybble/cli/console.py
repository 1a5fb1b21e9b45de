"""What the verbs share: tables on standard output, progress on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def stdout() -> Console:
    """Console for results. Wide when it is not a terminal, so that tables in a file or pipe are not cut."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200, soft_wrap=not sys.stdout.isatty())


def stderr() -> Console:
    """Console for progress and remarks."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table on standard output: the first `left` columns flush left, the others flush right."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, header in enumerate(headers):
        table.add_column(escape(header), justify="left" if i < left else "right", overflow="fold", no_wrap=i >= left)
    for row in rows:
        table.add_row(*(escape(_clean(cell)) for cell in row))
    stdout().print(table)


def _clean(text: str) -> str:
    """Names come from files: keep escape sequences off the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


class ProgressLine:
    """A bar with time left on a terminal; on a pipe, a line when the description's first part changes."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = stderr()
        self._shown = ""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=1.0)

    def update(self, head: str, what: str, fraction: float) -> None:
        """`head` names the piece (a variant), `what` the step, `fraction` how much of everything is done."""
        description = _clean(f"{head}: {what}" if head else what)
        self._bar.update(self._task, completed=fraction, description=description)
        if not self._console.is_terminal and head and head != self._shown:
            self._shown = head
            self._console.print(f"{fraction:4.0%}  {_clean(head)}", markup=False)

    def remark(self, text: str) -> None:
        """A line that stays."""
        self._bar.console.print(text, markup=False)


@contextmanager
def progress() -> Iterator[ProgressLine]:
    """Shows a ProgressLine for the length of a block."""
    line = ProgressLine()
    with line._bar:
        yield line


def parse_rules(rules: Sequence[str]) -> list[tuple[str, str]]:
    """`--rule PATTERN=FORMAT` options as pairs. Raises UsageError for one without an equals sign."""
    from nybble.errors import UsageError

    pairs = []
    for rule in rules:
        pattern, equals, spec = rule.partition("=")
        if not (pattern and equals and spec):
            raise UsageError(f"--rule {rule!r} is not PATTERN=FORMAT, for example --rule 'lm_head=int8'")
        pairs.append((pattern, spec))
    return pairs
