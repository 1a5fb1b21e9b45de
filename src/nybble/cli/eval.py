"""`nybble eval`: perplexity of one model folder, under a stated protocol, and what the engine's int8 activations cost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli import console

if TYPE_CHECKING:
    from nybble.evaluate.activations import Activations, Distance
    from nybble.evaluate.alone import Alone

NAME = "eval"
HELP = """Measure the perplexity of a model folder, float or quantized, on a text.

\b
nybble eval model-int4 --text wiki.txt
nybble eval model-int4 --text wiki.txt --protocol llama.cpp --window 512
nybble eval model-int4 --reference gpt2      also KL to the float model that it was made from
nybble eval model-int4 --reference gpt2 --layers --windows 8      ... and what each weight costs alone

A quantized folder is decoded by the engine too, with activations in float and rounded to int8, as `generate` does by
default: what the rounding costs stands below. It is left out where it would take long; --activations both asks for it.
"""
SMALL_WORK = 1e12
"""Bytes of weights times tokens up to which the engine's modes are measured unasked: minutes on two cores."""
CHOICES = {"float": ("float",), "int8": ("int8",), "both": ("float", "int8"), "none": ()}


def run(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    text: Annotated[Path | None, typer.Option(help="Evaluation text; default this Python's held-out library modules.")] = None,
    protocol: Annotated[str, typer.Option(help="paper, llama.cpp or stride.")] = "paper",
    window: Annotated[int | None, typer.Option(help="Tokens a window; default the context, at most 1024.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows to score at most; default all.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens a sliding window moves (protocol stride).")] = None,
    reference: Annotated[str | None, typer.Option(help="Float model folder or hub name: KL to it is measured too.")] = None,
    activations: Annotated[
        str | None, typer.Option(help="Modes of the engine: float, int8, both, none; default both for a small quantized model.")
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="KL of each weight alone, all others float (with --reference).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON on standard output.")] = False,
) -> None:
    """Load, cut the text into windows, score."""
    from nybble.calibrate.windows import encode, read_text, token_windows
    from nybble.containers import open_contents
    from nybble.containers.contents import check_texts
    from nybble.demo.text import evaluation_text
    from nybble.errors import InputError, UsageError, unknown_name
    from nybble.evaluate.compare import check_scoring
    from nybble.models.checkpoint import check_float, is_causal, open_checkpoint
    from nybble.models.hub import resolve

    check_scoring(protocol, window, windows, stride)
    if activations is not None and activations not in CHOICES:
        raise unknown_name("activations", activations, CHOICES)
    if layers and reference is None:
        raise UsageError("--layers compares with the float model; name it with --reference")
    content = read_text(text) if text else evaluation_text()
    folder = resolve(model, download=True)
    contents = open_contents(folder)
    if not is_causal(contents.config):
        raise InputError(f"{folder} does not predict the next token, so it has no perplexity; give a causal language model")
    check_texts(contents)
    float_folder = resolve(reference, download=True) if reference is not None else None
    if float_folder is not None:
        check_float(open_checkpoint(float_folder))
    notes: list[str] = []
    with console.progress() as bar:
        bar.update("", "loading the model", 0.0)
        from nybble.evaluate.activations import evaluate_activations
        from nybble.models.inputs import count_outliers, outlier_note
        from nybble.models.loading import window_length
        from nybble.quantized import load, load_tokenizer

        quantized = load(folder)
        length = window_length(quantized.model(), window)
        ids, bos = encode(load_tokenizer(folder), content)
        cut = token_windows(ids, length, windows, bos, protocol, stride)
        float_model = load(float_folder).model() if float_folder is not None else None
        if float_folder is not None and not _made_from(quantized.provenance, float_folder):
            notes.append(f"{reference} is not the model that {model} was made from")
        modes = CHOICES[
            activations or _default_modes(folder, bool(contents.packed), quantized.weight_bytes * cut.scored_tokens, notes)
        ]
        outliers = count_outliers(quantized.model())
        found = evaluate_activations(
            folder,
            quantized.model(),
            cut,
            modes,
            float_model,
            progress=lambda done, total: bar.update("", "perplexity", done / max(1, total)),
        )
        alone: list[Alone] = []
        if layers and float_model is not None:
            from nybble.evaluate.alone import kl_alone

            tensors = quantized.tensors
            alone = kl_alone(float_model, tensors, cut, lambda done, n: bar.update("", "weights alone", done / max(1, n)))
    if (note := outlier_note(outliers())) is not None:
        notes.append(note)
    facts = {"protocol": protocol, "window": length, "windows": len(cut), "bos": bos is not None}
    if as_json:
        line = {**facts, **dataclasses.asdict(found.torch), "engine": _engine_facts(found), "notes": notes}
        typer.echo(json.dumps(line | ({"layers": [dataclasses.asdict(each) for each in alone]} if alone else {})))
        return
    quality = found.torch
    spread = f" ± {quality.perplexity_se:.4f}" if quality.perplexity_se is not None else ""
    typer.echo(f"perplexity {quality.perplexity:.4f}{spread}")
    typer.echo(f"protocol {protocol}, {len(cut)} windows of {length}, {quality.scored_tokens:,} tokens scored")
    if found.modes or float_model is not None:
        _show_modes(found, float_model is not None)
    if alone:
        _show_alone(alone, quality.kl_mean)
    for note in notes:
        typer.echo(f"note: {note}")


def _show_alone(alone: list[Alone], together: float | None) -> None:
    """What each weight costs, the dearest first, and how their sum compares with all of them together."""
    from nybble.report.figures import MISSING, format_significant

    typer.echo("")
    ordered = sorted(alone, key=lambda each: -each.kl)
    rows = [[a.name, a.format, format_significant(a.kl), format_significant(a.kl_se, 2) if a.kl_se else MISSING] for a in ordered]
    console.print_table(["weight", "format", "KL alone\nnats", "\n±"], rows, left=2)
    total = sum(a.kl for a in alone)
    typer.echo(f"\nsum {format_significant(total)} nats; all together {format_significant(together)}")


def _made_from(provenance: dict[str, object], float_folder: Path) -> bool:
    from nybble.models.checkpoint import open_checkpoint

    made_from = provenance.get("source_blake3")
    return made_from is None or made_from == open_checkpoint(float_folder).digest()


def _default_modes(folder: Path, packed: bool, work: float, notes: list[str]) -> str:
    """What to measure unasked; why not both goes to `notes`."""
    from nybble.engine import Decoder
    from nybble.errors import NybbleError

    if not packed:
        return "none"
    if work > SMALL_WORK:
        notes.append("the engine was not measured, which takes long on a model and text of this size; --activations both does it")
        return "none"
    try:
        Decoder.load(folder)
    except NybbleError as error:
        notes.append(f"the engine cannot decode this model: {error}")
        return "none"
    return "both"


def _engine_facts(found: Activations) -> dict[str, object] | None:
    if not found.modes:
        return None
    facts = dataclasses.asdict(found)
    return {
        "threads": found.threads,
        "instruction_set": found.instruction_set,
        **facts["modes"],
        "int8_activations": {"kl": facts["kl"], "difference": facts["difference"]},
    }


def _show_modes(found: Activations, with_reference: bool) -> None:
    """A row for torch and each mode, then what int8 activations add, in words."""
    from nybble.report.figures import MISSING, format_percent, format_significant

    names = {"float": "engine, float activations", "int8": "engine, int8 activations"}
    headers = ["computed by", "perplexity"]
    headers += ["KL to float model\nnats, mean", "\np99", "same top 1\n%"] if with_reference else []
    headers += ["KL to torch\nnats, mean", "\np99"] if found.modes else []
    rows = []
    measured = [("torch", found.torch, None), *((names[k], m.quality, m.from_torch) for k, m in found.modes.items())]
    for name, quality, distance in measured:
        row = [name, f"{quality.perplexity:.4f}"]
        if with_reference:
            row += [format_significant(quality.kl_mean), format_significant(quality.kl_p99)]
            row.append(format_percent(quality.top1_agreement))
        if found.modes:
            row += [format_significant(distance.mean), format_significant(distance.p99)] if distance else [MISSING] * 2
        rows.append(row)
    typer.echo("")
    console.print_table(headers, rows)
    typer.echo("")
    if found.kl is not None:
        typer.echo(f"int8 activations move the predictions of these weights by a KL of {_words(found.kl)}")
    if found.difference is not None:
        typer.echo(f"and change the KL to the float model by {_words(found.difference)}")


def _words(distance: Distance) -> str:
    from nybble.report.figures import format_significant

    spread = f" ± {format_significant(distance.se, 2)}" if distance.se is not None else ""
    return f"{format_significant(distance.mean)}{spread} nats per token (99th percentile {format_significant(distance.p99)})"
