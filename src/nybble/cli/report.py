"""`nybble report`: the page again, from measured results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NAME = "report"
HELP = """Make the page, its plots and report.md from the results of a comparison.

\b
nybble report nybble-compare/results.jsonl -o report.html
"""


def run(
    results: Annotated[Path, typer.Argument(help="results.jsonl of a comparison.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The page; default report.html beside the results.")
    ] = None,
) -> None:
    """Read records, write the page; nothing is measured."""
    from nybble.evaluate.record import read_results
    from nybble.report import write_report

    page = output or results.parent / "report.html"
    written = write_report(read_results(results), page)
    typer.echo(f"page  {page.resolve().as_uri()}   ({len(written)} files)")
