"""`nybble formats`: the number formats explained, ours beside the floats they stand in for. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import console

if TYPE_CHECKING:
    from nybble.formats.explain import Explanation

NAME = "formats"
HELP = """Explain the number formats: levels, range, steps, bits per weight with everything stored, and which files hold them.

\b
nybble formats
nybble formats int4:g64 nf4 q4_k fp16     each: levels, what is stored, rounding, error bound
nybble formats -o formats.svg             all levels on one number line; .svg or .png
"""

HEADERS = (
    "format",
    "where",
    "bits",
    "levels",
    "range",
    "smallest\nstep",
    "largest\nstep",
    "smallest\nnormal",
    "bits per\nweight",
)
NOTE = """Range and steps are those at a scale of 1. Of floats they are absolute: the smallest step is the smallest subnormal
number, the largest step the one at 1 (machine epsilon). Bits per weight count everything stored for a [768, 768] matrix."""
WHERE = "Where: the containers that keep a format as it is, beside nybble's own, which keeps all but fp64, fp8 and fp4_e2m1."
MOST_LISTED = 16
"""Levels that are printed whole; of more, the ends."""
INDENT = 10


def run(
    specs: Annotated[
        list[str] | None, typer.Argument(help="Formats, e.g. int4:g64 nf4 q4_k fp16; without them the table.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON on standard output.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table as Markdown, as docs/formats.md has it.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Draw the levels: a file .svg or .png.")] = None,
) -> None:
    """Print the table, or a paragraph a format; draw them where -o says so."""
    from nybble.formats.explain import explain, explain_all

    chosen = [explain(spec) for spec in specs] if specs else explain_all()
    if as_json:
        typer.echo(json.dumps([_facts(each) for each in chosen], indent=1))
    elif markdown:
        typer.echo("\n".join(markdown_table(chosen)))
    elif specs:
        typer.echo("\n\n".join("\n".join(_paragraph(each)) for each in chosen))
    elif output is None:
        _print_table(chosen)
    if output is not None:
        from nybble.report.levels import write_levels  # takes matplotlib, which is a second

        write_levels(chosen, output)
        if not (as_json or markdown):
            typer.echo(f"picture  {output.resolve()}")


def table_rows(chosen: list[Explanation]) -> list[list[str]]:
    """The cells under HEADERS, a row a format."""
    from nybble.formats.number_line import format_figure

    rows = []
    for each in chosen:
        normal = format_figure(each.floating.smallest_normal) if each.floating else "–"
        steps = [format_figure(each.smallest_step), format_figure(each.largest_step)]
        figures = [str(each.bits), format_figure(each.count), _range(each), *steps, normal, f"{each.bits_per_weight:.4f}"]
        rows.append([each.spec, _where(each), *figures])
    return rows


def markdown_table(chosen: list[Explanation]) -> list[str]:
    """Lines of the table in docs/formats.md."""
    heads = [header.replace("\n", " ") for header in HEADERS]
    lines = [f"| {' | '.join(heads)} |", f"| --- | --- |{' --: |' * (len(heads) - 2)}"]
    return lines + [f"| `{spec}` | {' | '.join(cells)} |" for spec, *cells in table_rows(chosen)]


def _print_table(chosen: list[Explanation]) -> None:
    rows, heads, left = table_rows(chosen), list(HEADERS), 2
    columns = [list(column) for column in zip(*rows, strict=True)]
    where = WHERE
    if console.table_width(columns, heads) > console.width():
        where = "A wider terminal shows the files that hold each, as does nybble formats NAME."
        rows, heads, left = [[row[0], *row[2:]] for row in rows], [heads[0], *heads[2:]], 1
    console.print_table(heads, rows, left=left)
    typer.echo(f"\n{NOTE}\n{where}\n\nnybble formats NAME ... explains single formats, nybble formats -o FILE.svg draws them")


def _paragraph(each: Explanation) -> list[str]:
    from nybble.formats.explain import SHAPE
    from nybble.formats.number_line import format_figure, number_line

    shape = f"[{SHAPE[0]}, {SHAPE[1]}]"
    stored = ", ".join(f"{part.name} {part.bits:.4g}{_type_of(part.dtype)}" for part in each.stored)
    columns = {1: "a weight", math.prod(SHAPE): "the whole matrix"}.get(each.run, f"{each.run} columns")
    lines = [f"{each.spec}: {each.bits} bits, {format_figure(each.count)} levels"]
    if each.value:
        lines += _item("value", each.value)
    lines += _item("levels", _levels(each))
    if each.floating:
        parts = f"sign, {each.floating.exponent_bits} bits of exponent, {each.floating.mantissa_bits} of mantissa"
        normal, least = format_figure(each.floating.smallest_normal), format_figure(each.floating.smallest)
        lines += _item(
            "layout", f"{parts}; smallest normal {normal}, smallest subnormal {least}, step at 1 {each.largest_step:.4g}"
        )
    if stored:
        lines += _item("stored", f"for {columns}, bits: {stored}")
    total = round(each.bits_per_weight * SHAPE[0] * SHAPE[1] / 8)
    lines += _item("size", f"{each.bits_per_weight:.4f} bits per weight of a {shape} matrix, {total:,} bytes")
    lines += _item("rounding", each.rounding)
    lines += _item("error", _bound(each))
    lines += _item("where", _where(each))
    return ["", *lines, "", *(f"  {line}".rstrip() for line in number_line(each))][1:]


def _type_of(dtype: str) -> str:
    """That of numbers stored as they are; whole numbers lie packed in their bytes."""
    return "" if dtype.startswith("uint") else f" ({dtype})"


def _item(key: str, text: str) -> list[str]:
    """A line `key text`, wrapped under itself."""
    width = max(40, min(console.width(), 110) - INDENT - 2)
    first, *rest = textwrap.wrap(text, width)
    return [f"  {key:<{INDENT}}{first}", *(f"  {'':{INDENT}}{line}" for line in rest)]


def _levels(each: Explanation) -> str:
    from nybble.formats.number_line import format_figure

    if each.levels and len(each.levels) <= MOST_LISTED:
        return " ".join(format_figure(level) for level in each.levels)
    steps = f", steps of {format_figure(each.largest_step)}" if each.smallest_step == each.largest_step else ""
    return f"{_range(each)}{steps if each.floating is None else ''}"


def _range(each: Explanation) -> str:
    from nybble.formats.number_line import format_figure

    if each.lowest == -each.highest:
        return f"±{format_figure(each.highest)}"
    return f"{format_figure(each.lowest)} .. {format_figure(each.highest)}"


def _bound(each: Explanation) -> str:
    """The bound as a sum: `|w - value| <= 0.5 |scale|`."""
    from nybble.formats.number_line import format_figure

    terms = " + ".join(f"{'' if factor == 1 else f'{factor:.6g} '}|{name}|" for name, factor in each.bound.items())
    if each.floating:
        return f"|w - value| <= {terms}, or {format_figure(each.smallest_step / 2)} below the smallest normal number"
    found = "; found by trial on weights of many kinds, not proven" if "d" in each.bound else ""
    return f"|w - value| <= {terms} with plain rounding{found}"


def _where(each: Explanation) -> str:
    """Names of the containers that keep the format as it is, or where else it is met."""
    if each.use:
        return each.use
    from nybble.containers import container_names, find_container
    from nybble.formats import parse_format
    from nybble.formats.explain import SHAPE

    names = container_names()
    fmt = parse_format(each.spec)
    keeping = [name for name in names if each.spec in find_container(name).candidates(fmt, SHAPE, "linear")]
    if keeping == names:
        return "all containers"
    return ", ".join(name for name in keeping if not name.startswith("nybble")) or "nybble only"


def _facts(each: Explanation) -> dict[str, Any]:
    facts = dataclasses.asdict(each)
    if each.floating:
        beside = {name: getattr(each.floating, name) for name in ("largest", "smallest_normal", "smallest", "epsilon")}
        facts["floating"].update(beside)
    return {**facts, "where": _where(each)}
