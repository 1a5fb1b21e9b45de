"""`nybble methods`: every method there is, what it needs, and the settings it starts from."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from typing import Annotated

import typer

from nybble.cli import console

NAME = "methods"
HELP = """List the methods that choose codes, and the options that change them.

\b
nybble methods
nybble methods gptq                               one method: what it does, its settings
nybble quantize MODEL --method awq+gptq:damp=0.005 ...   methods add up; options follow a colon
"""


def run(
    name: Annotated[str | None, typer.Argument(help="One method, e.g. gptq or best:tune=0.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The settings as JSON on standard output.")] = False,
) -> None:
    """Print the list, or the settings of one method."""
    from nybble.methods import describe_method, method_names, parse_method
    from nybble.methods.steps.settings import PLAIN, explain

    chosen = [parse_method(name)] if name is not None else [parse_method(each) for each in method_names()]
    if as_json:
        typer.echo(json.dumps({str(method): dataclasses.asdict(method.settings) for method in chosen}, indent=1))
        return
    if name is None:
        rows = [[str(m), "calibration" if m.settings.calibrated else "no data", describe_method(m.name)] for m in chosen]
        console.print_table(["method", "needs", "what it is"], rows, left=3)
        typer.echo("\nnybble methods NAME shows the settings of one; each is an option: NAME:setting=value, NAME:no-setting")
        return
    settings = chosen[0].settings
    for part in chosen[0].name.split("+"):
        typer.echo(f"{part}: {describe_method(part)}")
    typer.echo("")
    head = max(len(f"{field}={getattr(settings, field)}") for field in explain()) + 2
    for field, text in explain().items():
        value = getattr(settings, field)
        mark = " " if value == getattr(PLAIN, field) else "*"
        first, *rest = textwrap.wrap(text, max(30, console.width() - head - 3))
        typer.echo(f"{mark} {f'{field}={value}':<{head}}{first}")
        for line in rest:
            typer.echo(" " * (head + 2) + line)
    typer.echo("\n* differs from plain rounding to nearest")
