"""`nybble prune`: weights that matter least become zero, with or without rounding the others, and the file gets smaller."""

from __future__ import annotations

from typing import Annotated

import typer

from nybble.calibrate.windows import CALIBRATION_WINDOWS
from nybble.cli.quantize import (
    ByDocument,
    Calibrate,
    Force,
    Job,
    Layers,
    Memory,
    Model,
    Options,
    Output,
    Pace,
    Restart,
    Rules,
    Threads,
    Window,
    Windows,
    carry_out,
)

NAME = "prune"
HELP = """Set the weights that matter least to zero: any share of them, or two of every four.

\b
nybble prune MODEL --calibrate text.txt -o model-half                            half of them, sparse storage
nybble prune MODEL --sparsity 2:4 --to int4:g64 --calibrate text.txt -o model-24  pruned and rounded in one
nybble prune MODEL --method magnitude --sparsity 0.3 -o model-pruned             no data
nybble prune MODEL --method wanda+gptq --sparsity 2:4 --calibrate text.txt --file float -o model-24   for any other tool
Linear layers inside the blocks are pruned, embeddings and the head are not. nybble opens the result like any other model.
"""
METHODS = ("magnitude", "wanda", "sparsegpt")
CONTAINER = "nybble-sparse"


def run(
    model: Model,
    output: Output,
    sparsity: Annotated[
        str, typer.Option(help="Share of weights that become zero (0.5, 30%), or kept weights 1:2, 2:4, 4:8.")
    ] = "0.5",
    method: Annotated[
        str, typer.Option(help="magnitude, wanda, sparsegpt, wanda+gptq, sparsegpt:refine=3, ...")
    ] = "sparsegpt:refine=3",
    to: Annotated[
        str | None, typer.Option(help="Round the others too: a format, as in quantize; default the model's floats.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Weights that stay as they are: name, last part or glob. Repeatable.")
    ] = None,
    rule: Rules = None,
    calibrate: Calibrate = None,
    windows: Windows = CALIBRATION_WINDOWS,
    window: Window = None,
    by_document: ByDocument = False,
    seed: Annotated[int, typer.Option(help="Which windows are drawn.")] = 0,
    file: Annotated[
        str | None, typer.Option(help="Container: nybble-sparse (zeros take a bit), nybble, float, gguf, ...; default by name.")
    ] = None,
    option: Options = None,
    layers: Layers = False,
    force: Force = False,
    restart: Restart = False,
    memory: Memory = None,
    threads: Threads = None,
) -> None:
    """Turn the sparsity into options of the method; the rest is quantization."""
    from nybble.errors import UsageError
    from nybble.methods import parse_method

    spec = f"{method}:{sparsity_option(sparsity)}"
    if not parse_method(spec).settings.prunes:
        raise UsageError(f"method {method} makes no weight zero; use {', '.join(METHODS)}, or two together: wanda+gptq")
    container = file or (None if output.suffix == ".gguf" else CONTAINER)
    job = Job(model, output, to, spec, tuple(keep or ()), tuple(rule or ()), calibrate, windows, window, by_document, seed)
    carry_out(job, container, option or [], layers, force, Pace(restart, memory, threads))


def sparsity_option(text: str) -> str:
    """The method's option for `2:4`, `0.5` or `50%`. Raises UsageError for anything else."""
    from nybble.errors import UsageError

    if text in ("1:2", "2:4", "4:8"):
        return f"pattern={text.replace(':', 'of')}"
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UsageError(f"sparsity {text!r}: give a share of weights between 0 and 1 (0.5, 30%), or 1:2, 2:4, 4:8")
    return f"sparsity={share:g}"
