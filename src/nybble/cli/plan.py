"""`nybble plan`: what would be done to every tensor, before any work."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from nybble.cli import console

NAME = "plan"
HELP = """Show what quantizing a model would do: every tensor a row, with its format, bits and reason. Reads no weights.

\b
nybble plan MODEL --to int4:g64
nybble plan MODEL --to int4:g64 --keep lm_head --rule 'mlp.c_proj=int8'
"""


def run(
    model: Annotated[str | None, typer.Argument(help="Model folder or hub name; without it the model that ships.")] = None,
    to: Annotated[str, typer.Option(help="Format: NAME[:tensor|channel|gN][,asym][,dq].")] = "int4:g64",
    method: Annotated[str, typer.Option(help="Method: rtn, gptq, best, ...; see nybble methods.")] = "rtn",
    keep: Annotated[
        list[str] | None, typer.Option(help="Weights that stay in float: name, last part or glob. Repeatable.")
    ] = None,
    rule: Annotated[list[str] | None, typer.Option(help="PATTERN=FORMAT for some weights. Repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON on standard output.")] = False,
) -> None:
    """Build the plan on an empty model and print it."""
    from nybble.demo import model_folder
    from nybble.methods import parse_method
    from nybble.models.checkpoint import check_float, open_checkpoint
    from nybble.models.hub import resolve
    from nybble.plan import Recipe, canonical, make_plan

    canonical(to)
    recipe = Recipe(to, str(parse_method(method)), tuple(keep or ()), tuple(console.parse_rules(rule or ())))
    folder = resolve(model, download=True) if model is not None else Path(model_folder())
    checkpoint = open_checkpoint(folder)
    check_float(checkpoint)
    from nybble.models.describe import describe  # these two import torch: only once all that can be checked without is
    from nybble.models.loading import empty_model

    plan = make_plan(describe(empty_model(folder), checkpoint.float_tag), recipe)
    if as_json:
        summary = {"hash": plan.hash, "bits_per_weight": plan.bpw, "bytes": plan.bytes, "notes": plan.notes}
        typer.echo(json.dumps({**summary, **dataclasses.asdict(plan)}, indent=1))
        return
    rows = []
    for row in plan.rows:
        shape = " x ".join(map(str, row.tensor.shape))
        kept = f"{row.tensor.dtype}, as it is" if row.format is None and not plan.is_cast else row.format or plan.recipe.format
        note = "; ".join(part for part in (row.tensor.role, row.reason) if part)
        rows.append(
            [row.tensor.name, kept, note, shape, f"{row.bits / max(1, row.tensor.weights):.3f}", f"{-(-row.bits // 8):,}"]
        )
    console.print_table(["tensor", "becomes", "what and why", "shape", "bits/weight", "bytes"], rows, left=3)
    weights = sum(row.tensor.weights for row in plan.packed)
    total = sum(row.tensor.weights for row in plan.rows)
    typer.echo(f"\n{len(plan.packed)} of {len(plan.rows)} tensors, {weights:,} of {total:,} numbers, get a format")
    typer.echo(
        f"{plan.bpw:.4f} bits per weight over them; {plan.bytes / 1e6:.2f} MB in all, {plan.bytes / (4 * total):.1%} of fp32"
    )
    for note in plan.notes:
        typer.echo(f"note: {note}")
