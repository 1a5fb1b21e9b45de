"""`nybble bench`: the engine raced against other runtimes on the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli import console

if TYPE_CHECKING:
    from nybble.bench.standing import Race

NAME = "bench"
HELP = """Race the engine in several formats, and against other runtimes, on the same weights.

\b
nybble bench                                      the model that ships
nybble bench MODEL --formats f32,int8,int4:g32    a folder or hub model
nybble bench --shape gpt2 --against torch,llama.cpp,openvino,bitsandbytes
nybble bench --shape gpt2 --formats int4:g32 --against llama.cpp:Q4_0 --threads 2 -o race
nybble bench --against llama.cpp --peer-python llama.cpp=other-environment/bin/python
"""


def run(
    model: Annotated[str | None, typer.Argument(help="Model folder or hub name; without it the model that ships.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights of this shape (gpt2, gpt2-medium, llama-160m, llama-1b, ...).")
    ] = None,
    formats: Annotated[str, typer.Option(help="Formats of nybble's engine: FORMAT,...")] = "f32,f16,int8,int4:g32,nf4:g64",
    against: Annotated[
        str, typer.Option(help="Peers: torch, llama.cpp, openvino, bitsandbytes; NAME:FORMAT for one format.")
    ] = "",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default all cores.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds over all racers, each a new process; the median counts.")] = 3,
    repeats: Annotated[int, typer.Option(help="Runs of each figure in a process, at most 30 s of them; the best counts.")] = 5,
    what: Annotated[str, typer.Option(help="Any of decode, prefill, batch.")] = "decode,prefill,batch",
    exact: Annotated[bool, typer.Option("--exact", help="Float activations in nybble's engine.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON line a racer on standard output, no table.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for figures, table and plot.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace results that are there already.")] = False,
    work: Annotated[Path | None, typer.Option(help="Folder where the racers' files are kept for the next race.")] = None,
    peer_python: Annotated[list[str] | None, typer.Option(help="NAME=PATH: the Python that has this peer. Repeatable.")] = None,
) -> None:
    """Race, show the table, write the folder."""
    from nybble.bench.race import failures_of_ours, race
    from nybble.errors import MeasureError
    from nybble.files.folder import check_output
    from nybble.files.job import new_folder

    pythons = parse_pythons(peer_python or ())
    if output is not None:
        check_output(output, force, marker="results.jsonl")
    with console.progress() as bar:
        done = race(
            model,
            shape=shape,
            formats=formats,
            against=against,
            threads=threads,
            rounds=rounds,
            repeats=repeats,
            what=what,
            exact=exact,
            work=work,
            peer_pythons=pythons,
            download=True,
            progress=bar.update,
            remark=bar.remark if sys.stderr.isatty() else tell,
        )
    lines = "".join(json.dumps(done.line(standing)) + "\n" for standing in done.finished)
    if output is not None:
        with new_folder(output, force, marker="results.jsonl") as folder:
            write(done, lines, folder)
    if as_json:
        typer.echo(lines, nl=False)
    else:
        show(done)
        if output is not None:
            typer.echo(f"figures  {output / 'results.jsonl'}   table  {output / 'bench.md'}")
    failures = failures_of_ours(done)
    if failures:
        raise MeasureError("; ".join(failures))


def tell(line: str) -> None:
    """One line on standard error, however long: a pipe has no width."""
    typer.echo("".join(c if c.isprintable() else " " for c in line), err=True)


def write(done: Race, lines: str, folder: Path) -> None:
    """Figures, table and plot into a folder."""
    from nybble.bench.report import draw_decode, render_markdown

    (folder / "results.jsonl").write_text(lines, encoding="utf-8")
    plot = draw_decode(done)
    if plot is not None:
        (folder / "decode.png").write_bytes(plot)
    (folder / "bench.md").write_text(render_markdown(done, plot is not None), encoding="utf-8")


def show(done: Race) -> None:
    """The columns that fit the terminal, then what was measured."""
    from nybble.bench.report import LEAST_FIRST, describe, table_of, unit_of

    columns, names, rows = table_of(done)
    heads = [f"{column.header}\n{unit_of(column, done)}" for column in columns]
    cells = [[row[i] for row in rows] for i in range(len(columns))]
    kept = list(range(len(columns)))
    for key in LEAST_FIRST:
        if console.table_width([names, *(cells[i] for i in kept)], [heads[i] for i in kept]) <= console.width():
            break
        kept = [i for i in kept if columns[i].key != key]
    lines = zip(names, *(cells[i] for i in kept), strict=True)
    console.print_table(["racer", *(heads[i] for i in kept)], list(lines))
    typer.echo("")
    for line in describe(done):
        typer.echo(line)


def parse_pythons(options: list[str] | tuple[str, ...]) -> list[tuple[str, str]]:
    """`--peer-python NAME=PATH` options as pairs. Raises UsageError for one without an equals sign."""
    from nybble.errors import UsageError

    pairs = []
    for option in options:
        name, equals, path = option.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--peer-python {option!r} is not NAME=PATH, for example --peer-python torch=env/bin/python")
        pairs.append((name, path))
    return pairs
