"""`nybble quantize`: a model folder in, a smaller model folder out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.calibrate.windows import CALIBRATION_WINDOWS
from nybble.cli import console
from nybble.cli.convert import show as show_conversion
from nybble.errors import UsageError

if TYPE_CHECKING:
    from nybble.convert import Conversion
    from nybble.methods.steps.choose import Account
    from nybble.plan import Recipe

NAME = "quantize"
HELP = """Quantize a model and save it as a folder that nybble.load and, after `import nybble`, transformers open, or for others.

\b
nybble quantize MODEL --to int4:g64 -o model-int4
nybble quantize MODEL --to int4:g64 --method gptq --calibrate text.txt -o model-int4
nybble quantize MODEL --to int3:g64 --method best:tune=0 --calibrate text.txt -o model-int3
nybble quantize MODEL --to q4_k_m --method gptq --calibrate text.txt -o model.gguf         for llama.cpp
nybble quantize MODEL --to int4:g128 --method gptq --calibrate text.txt --file gptq -o model-gptq
nybble methods                                    what there is, and the options of each
"""

Model = Annotated[str, typer.Argument(help="Model folder or hub name.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder to make, or file (model.gguf).")]
Rules = Annotated[list[str] | None, typer.Option(help="PATTERN=FORMAT for some weights. Repeatable.")]
Calibrate = Annotated[
    str | None,
    typer.Option(help="Calibration text: FILE (.txt, .json, .jsonl), hub:DATASET[:CONFIG[:SPLIT]], or self: the model's own."),
]
Windows = Annotated[int, typer.Option(help="Calibration windows at most.")]
Window = Annotated[int | None, typer.Option(help="Tokens of one; default the model's context, at most 2048.")]
ByDocument = Annotated[bool, typer.Option("--by-document", help="Cut each window from one document, not from all joined.")]
Options = Annotated[list[str] | None, typer.Option(help="NAME=VALUE of the container. Repeatable.")]
Layers = Annotated[bool, typer.Option("--layers", help="Show what the method did to each weight.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a model that is there already.")]
Restart = Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run left, and begin anew.")]
Memory = Annotated[str | None, typer.Option(help="Hold no more than this, for example 2GB.")]
Threads = Annotated[int | None, typer.Option(help="Threads that work; default the cores, and at most 4 where no text is read.")]
"""Options that `prune` has too."""


def run(
    model: Model,
    output: Output,
    to: Annotated[str, typer.Option(help="Format NAME[:tensor|channel|gN][,asym][,dq], or mix (q4_k_m).")] = "int4:g64",
    method: Annotated[str, typer.Option(help="Method: rtn, gptq, best, ...; see nybble methods.")] = "rtn",
    keep: Annotated[
        list[str] | None, typer.Option(help="Weights that stay in float: name, last part or glob. Repeatable.")
    ] = None,
    rule: Rules = None,
    calibrate: Calibrate = None,
    windows: Windows = CALIBRATION_WINDOWS,
    window: Window = None,
    by_document: ByDocument = False,
    seed: Annotated[int, typer.Option(help="Which windows are drawn, and whatever else a method draws.")] = 0,
    file: Annotated[
        str | None, typer.Option(help="Container: nybble, gguf, gptq, awq, compressed-tensors, bitsandbytes; default by name.")
    ] = None,
    option: Options = None,
    layers: Layers = False,
    force: Force = False,
    restart: Restart = False,
    memory: Memory = None,
    threads: Threads = None,
) -> None:
    """Check that the output can be written, quantize, save."""
    job = Job(model, output, to, method, tuple(keep or ()), tuple(rule or ()), calibrate, windows, window, by_document, seed)
    carry_out(job, file, option or [], layers, force, Pace(restart, memory, threads))


@dataclass(frozen=True)
class Job:
    """What is to be made of what: options of this verb and of `prune`."""

    model: str
    output: Path
    to: str | None
    """Format; None: the float type that the model is stored in."""
    method: str
    keep: tuple[str, ...]
    rule: tuple[str, ...]
    calibrate: str | None
    windows: int
    window: int | None
    by_document: bool
    seed: int


@dataclass(frozen=True)
class Pace:
    """How it is to be made: nothing of this changes what is made."""

    restart: bool
    memory: str | None
    threads: int | None

    @property
    def bytes(self) -> int | None:
        """The limit of memory. Raises UsageError for what is no size."""
        from nybble.forecast import parse_size

        return None if self.memory is None else parse_size(self.memory)

    def check(self) -> None:
        """Raise UsageError for what makes no sense."""
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise UsageError(f"{self.threads} threads: give 1 to 1024")
        _ = self.bytes


def carry_out(job: Job, file: str | None, option: list[str], layers: bool, force: bool, pace: Pace) -> None:
    """Quantize and save; say what it takes on disk."""
    from nybble.calibrate.source import read_calibration
    from nybble.containers.saving import check_target, container_of
    from nybble.convert import stay_float
    from nybble.methods import parse_method
    from nybble.models.checkpoint import check_float, open_checkpoint
    from nybble.models.hub import resolve
    from nybble.plan import Recipe, canonical

    pace.check()
    if job.to is not None:
        canonical(job.to)
    output, container = job.output, container_of(job.output, file)
    options = console.parse_options(option)
    wanted = parse_method(job.method)
    if wanted.settings.calibrated and job.calibrate is None:
        raise wanted.lacks_calibration()
    check_target(container, output, force, options)
    calibration = None if job.calibrate is None else read_calibration(job.calibrate)
    rules = console.parse_rules(job.rule)
    folder = resolve(job.model, download=True)
    checkpoint = open_checkpoint(folder)
    check_float(checkpoint)
    to = job.to or {"F16": "fp16", "BF16": "bf16"}.get(checkpoint.float_tag, "fp32")
    keep = [*job.keep, *stay_float(folder, container, Recipe(to, job.method, job.keep, tuple(rules)))]
    if calibration is None or not wanted.uses_calibration:
        recipe = Recipe(to, job.method, tuple(keep), tuple(rules))
        done = _piece_by_piece(folder, output, container, recipe, options, force, pace)
        _say(container, done, checkpoint.bytes)
        return
    from nybble.blockwise import Calibration, quantize_folder  # imports torch: only where it is needed

    drawn = Calibration(calibration, job.windows, job.window, not job.by_document, job.seed)
    with console.progress() as bar:
        made = quantize_folder(
            folder,
            output,
            container,
            Recipe(to, job.method, tuple(keep), tuple(rules)),
            drawn,
            options,
            pace.restart,
            pace.bytes,
            pace.threads,
            bar.remark,
            lambda what, done, total: bar.update("", what, done / max(1, total)),
        )
    if made is None:
        typer.echo(f"{output}: finished already")
        return
    if layers and made.accounts:
        show_accounts(made.accounts)
    _say(container, made.conversion, checkpoint.bytes)


def _piece_by_piece(
    folder: Path, output: Path, container: str, recipe: Recipe, options: dict[str, str], force: bool, pace: Pace
) -> Conversion:
    """Without calibration text: tensor by tensor, the model never held."""
    from nybble.convert import convert, made_by

    with console.progress() as bar:
        return convert(
            folder,
            output,
            container,
            recipe.format,
            recipe.method,
            recipe.keep,
            recipe.rules,
            options,
            force,
            progress=lambda what, done, total: bar.update("", "quantizing", done / max(1, total)),
            restart=pace.restart,
            threads=pace.threads,
            memory=pace.bytes,
            announce=bar.remark,
            measures=container != "nybble",
            provenance=made_by(folder, recipe),
        )


def _say(container: str, done: Conversion, before: int) -> None:
    from nybble.containers import open_contents

    if container != "nybble":
        show_conversion(done, before)
        return
    _say_size(done.path, before, open_contents(done.path).provenance["bits_per_weight"])


def _say_size(output: Path, before: int, bits: float) -> None:
    size = (output / "model.safetensors").stat().st_size
    typer.echo(
        f"{output}: {size / 1e6:.2f} MB ({size / before:.1%} of the source's {before / 1e6:.2f} MB), {bits:.4f} bits per weight"
    )


def show_accounts(accounts: Mapping[str, Account]) -> None:
    """A table of what a calibrated method did to each weight."""
    rows = [
        [
            name,
            f"{account.loss_of_rounding:.3g}",
            f"{account.loss:.3g}",
            f"{account.damping:g}",
            str(account.dead_columns),
            str(account.rows_fallen_back),
        ]
        for name, account in accounts.items()
    ]
    header = ["weight", "error by rounding", "error by the method", "damping", "dead columns", "rows rounded"]
    console.print_table(header, rows)
    typer.echo("error: squared error of the layer's outputs on calibration text, as a share of the outputs' own squares\n")
