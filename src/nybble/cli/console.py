"""What the verbs share: tables on standard output, progress on standard error."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def width() -> int:
    """Characters a line of a table may have: the terminal's, or ample where there is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 200


def stderr() -> Console:
    """Console for progress and remarks."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table on standard output: the first `left` columns flush left, the others flush right. A header may have lines.

    Plain text on purpose: it costs nothing to start, and lines longer than the terminal wrap instead of being cut.
    """
    depth = max(header.count("\n") for header in headers) + 1
    heads = [[""] * (depth - len(lines)) + lines for lines in (header.split("\n") for header in headers)]
    cells = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(len, [*heads[i], *(row[i] for row in cells)])) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))

    for k in range(depth):
        print(line([head[k] for head in heads]).rstrip())
    print("─" * (sum(widths) + 2 * (len(widths) - 1)))
    for row in cells:
        print(line(row).rstrip())


def table_width(columns: Sequence[Sequence[str]], headers: Sequence[str]) -> int:
    """Characters that `print_table` needs for these columns; `headers` are those of the last ones."""
    heads = [""] * (len(columns) - len(headers)) + list(headers)
    lines = [[*head.split("\n"), *cells] for head, cells in zip(heads, columns, strict=True)]
    return sum(max(map(len, column)) + 2 for column in lines)


def clean(text: str) -> str:
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
        description = clean(f"{head}: {what}" if head else what)
        self._bar.update(self._task, completed=fraction, description=description)
        if not self._console.is_terminal and head and head != self._shown:
            self._shown = head
            self._console.print(f"{fraction:4.0%}  {clean(head)}", markup=False)

    def remark(self, text: str) -> None:
        """A line that stays."""
        self._bar.console.print(clean(text), markup=False, soft_wrap=True)


@contextmanager
def progress() -> Iterator[ProgressLine]:
    """Shows a ProgressLine for the length of a block."""
    line = ProgressLine()
    with line._bar:
        yield line


def parse_options(options: Sequence[str]) -> dict[str, str]:
    """`--option NAME=VALUE` options by name. Raises UsageError for one without an equals sign, or given twice."""
    from nybble.errors import UsageError

    found: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not (name and equals and value) or name in found:
            raise UsageError(f"--option {option!r} is not NAME=VALUE, each name once, for example checkpoint_format=gptq_v2")
        found[name] = value
    return found


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
