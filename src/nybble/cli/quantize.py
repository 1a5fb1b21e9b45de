"""`nybble quantize`: a model folder in, a smaller model folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli import console

NAME = "quantize"
HELP = """Quantize a model and save it as a folder that nybble.load and, after `import nybble`, transformers open.

\b
nybble quantize MODEL --to int4:g64 -o model-int4
nybble quantize MODEL --to int4:g64 --method rtn:mse --calibrate text.txt -o model-int4
"""


def run(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to make.")],
    to: Annotated[str, typer.Option(help="Format: NAME[:tensor|channel|gN][,asym][,dq].")] = "int4:g64",
    method: Annotated[str, typer.Option(help="Method: rtn, rtn:mse.")] = "rtn",
    keep: Annotated[
        list[str] | None, typer.Option(help="Weights that stay in float: name, last part or glob. Repeatable.")
    ] = None,
    rule: Annotated[list[str] | None, typer.Option(help="PATTERN=FORMAT for some weights. Repeatable.")] = None,
    calibrate: Annotated[Path | None, typer.Option(help="Calibration text, for methods that use one (rtn:mse).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is there already.")] = False,
) -> None:
    """Check that the output can be written, quantize, save."""
    from nybble.calibrate.windows import read_text
    from nybble.files.folder import check_output
    from nybble.formats import parse_format
    from nybble.methods import parse_method
    from nybble.models.checkpoint import check_float, open_checkpoint
    from nybble.models.hub import resolve

    parse_format(to), parse_method(method)
    check_output(output, force, marker="config.json")
    calibration = read_text(calibrate) if calibrate else None
    rules = console.parse_rules(rule or ())
    folder = resolve(model, download=True)
    check_float(open_checkpoint(folder))
    with console.progress() as bar:
        bar.update("", "loading the model", 0.0)
        from nybble.run import quantize

        quantized = quantize(
            folder,
            to,
            method,
            calibration,
            keep or (),
            rules,
            progress=lambda what, done, total: bar.update("", what, done / max(1, total)),
        )
        quantized.save(output, force)
    size = (output / "model.safetensors").stat().st_size
    before = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    bits = quantized.provenance["bits_per_weight"]
    typer.echo(
        f"{output}: {size / 1e6:.2f} MB ({size / before:.1%} of the source's {before / 1e6:.2f} MB), {bits:.4f} bits per weight"
    )
