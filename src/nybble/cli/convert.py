"""`nybble convert`: a model in another container, with what that cost. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import console
from nybble.errors import UsageError

if TYPE_CHECKING:
    from nybble.convert import Conversion

NAME = "convert"
HELP = """Write a model for the next tool: GGUF, GPTQ, AWQ, compressed-tensors, bitsandbytes, nybble, or plain floats.

\b
nybble convert model-int4 model.gguf                          codes are kept where the container holds the same values
nybble convert MODEL model.gguf --to q4_k_m                   a float model, rounded by llama.cpp's mix of formats
nybble convert model-int4 model-gptq --file gptq
nybble convert model.gguf model-folder --file nybble          what others wrote can be read too
nybble convert model-gptq model.gguf --to q4_k_m              rounded again where it must be; the loss is measured
nybble convert old-model new-model --file float --allow-pickle    from *.bin files, read without running them
"""
MOST_ROWS = 12


def run(
    source: Annotated[str, typer.Argument(help="Model folder, .gguf file or hub name.")],
    target: Annotated[Path, typer.Argument(help="Folder or file to make.")],
    file: Annotated[
        str | None, typer.Option(help="gguf, gptq, awq, compressed-tensors, bitsandbytes, nybble or float; default by name.")
    ] = None,
    to: Annotated[str | None, typer.Option(help="Format or mix (int4:g64, q4_k_m); default as it is, where it can be.")] = None,
    method: Annotated[str, typer.Option(help="How float weights are rounded: rtn, rtn:mse, hqq.")] = "rtn",
    keep: Annotated[
        list[str] | None, typer.Option(help="Weights that stay in float: name, last part or glob. Repeatable.")
    ] = None,
    rule: Annotated[list[str] | None, typer.Option(help="PATTERN=FORMAT for some weights. Repeatable.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of the container. Repeatable.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read *.bin files, by nybble's own reader, which runs nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there already.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run left, and begin anew.")] = False,
    memory: Annotated[str | None, typer.Option(help="Hold no more than this, for example 2GB.")] = None,
    threads: Annotated[int | None, typer.Option(help="Tensors made at once; default all cores, at most 4.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="What was done, as JSON on standard output.")] = False,
) -> None:
    """Open, convert, say what it cost."""
    from nybble.convert import convert, opened
    from nybble.forecast import parse_size
    from nybble.models.hub import resolve

    if threads is not None and not 1 <= threads <= 1024:
        raise UsageError(f"{threads} threads: give 1 to 1024")

    rules = console.parse_rules(rule or ())
    options = console.parse_options(option or ())
    with console.progress() as bar, opened(resolve(source, download=True), allow_pickle) as contents:
        done = convert(
            contents,
            target,
            file,
            to,
            method,
            keep or (),
            rules,
            options,
            force,
            progress=lambda what, done, total: bar.update("", what, done / max(1, total)),
            restart=restart,
            threads=threads,
            memory=None if memory is None else parse_size(memory),
            announce=bar.remark,
        )
        before = contents.bytes
    if as_json:
        typer.echo(json.dumps(_facts(done), indent=1))
        return
    show(done, before)


def show(done: Conversion, before: int) -> None:
    """What was written and what it cost."""
    if done.changed:
        rows = [
            [step.name, step.before, step.after, f"{step.error**0.5:.3%}"]
            for step in sorted(done.changed, key=lambda step: -step.error)[:MOST_ROWS]
        ]
        console.print_table(["tensor", "was", "is", "error"], rows, left=3)
        if len(done.changed) > MOST_ROWS:
            typer.echo(f"... and {len(done.changed) - MOST_ROWS} more that lost less (--json names all)")
        typer.echo("error: root of the squared error over the squares of what was there\n")
    same = len(done.steps) - len(done.changed)
    size = f"{done.bytes / 1e6:.2f} MB ({done.bytes / max(1, before):.1%} of the source's {before / 1e6:.2f} MB)"
    typer.echo(f"{done.path}: {done.container}, {size}")
    loss = f"; {len(done.changed)} changed, by {done.error**0.5:.3%} of their size" if done.changed else ""
    typer.echo(f"{same} of {len(done.steps)} tensors hold the same values as before{loss}; all were read again and compared")


def _facts(done: Conversion) -> dict[str, Any]:
    return {
        "path": str(done.path),
        "container": done.container,
        "bytes": done.bytes,
        "error": done.error,
        "tensors": [
            {"name": s.name, "shape": list(s.shape), "was": s.before, "is": s.after, "exact": s.exact, "error": s.error}
            for s in done.steps
        ],
    }
