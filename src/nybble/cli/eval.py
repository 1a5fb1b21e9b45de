"""`nybble eval`: perplexity of one model folder, under a stated protocol."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from nybble.cli import console

NAME = "eval"
HELP = """Measure the perplexity of a model folder, float or quantized, on a text.

\b
nybble eval model-int4 --text wiki.txt
nybble eval model-int4 --text wiki.txt --protocol llama.cpp --window 512
"""


def run(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    text: Annotated[Path | None, typer.Option(help="Evaluation text; default this Python's held-out library modules.")] = None,
    protocol: Annotated[str, typer.Option(help="paper, llama.cpp or stride.")] = "paper",
    window: Annotated[int | None, typer.Option(help="Tokens a window; default the context, at most 1024.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows to score at most; default all.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens a sliding window moves (protocol stride).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON on standard output.")] = False,
) -> None:
    """Load, cut the text into windows, score."""
    from nybble.calibrate.windows import encode, read_text, token_windows
    from nybble.demo.text import evaluation_text
    from nybble.errors import InputError
    from nybble.evaluate.compare import check_scoring
    from nybble.models.checkpoint import check_tokenizer, is_causal, open_checkpoint
    from nybble.models.hub import resolve

    check_scoring(protocol, window, windows, stride)
    content = read_text(text) if text else evaluation_text()
    folder = resolve(model, download=True)
    if not is_causal(open_checkpoint(folder).config):
        raise InputError(f"{folder} does not predict the next token, so it has no perplexity; give a causal language model")
    check_tokenizer(folder)
    with console.progress() as bar:
        bar.update("", "loading the model", 0.0)
        from nybble.evaluate.quality import evaluate
        from nybble.models.loading import load_tokenizer, window_length
        from nybble.run import load

        quantized = load(folder)
        length = window_length(quantized.model(), window)
        ids, bos = encode(load_tokenizer(folder), content)
        cut = token_windows(ids, length, windows, bos, protocol, stride)
        quality = evaluate(
            quantized.model(), cut, progress=lambda done, total: bar.update("", "perplexity", done / max(1, total))
        )
    facts = {"protocol": protocol, "window": length, "windows": len(cut), "bos": bos is not None}
    if as_json:
        typer.echo(json.dumps({**facts, **dataclasses.asdict(quality)}))
        return
    spread = f" ± {quality.perplexity_se:.4f}" if quality.perplexity_se is not None else ""
    typer.echo(f"perplexity {quality.perplexity:.4f}{spread}")
    typer.echo(f"protocol {protocol}, {len(cut)} windows of {length}, {quality.scored_tokens:,} tokens scored")
