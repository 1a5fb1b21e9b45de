"""`nybble generate`: text from a model folder, float or quantized."""

from __future__ import annotations

from typing import Annotated

import typer

NAME = "generate"
HELP = """Continue a prompt with a model folder, float or quantized.

\b
nybble generate model-int4 --prompt "def main("
nybble generate model-int4 --prompt "Once upon a time" --top-k 40 --seed 1
"""


def run(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 50,
    top_k: Annotated[int | None, typer.Option(help="Sample among this many; without it the most likely token.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Load and print prompt and continuation."""
    from nybble.errors import InputError, UsageError
    from nybble.models.checkpoint import check_tokenizer, is_causal, open_checkpoint
    from nybble.models.hub import resolve

    if new_tokens < 1 or (top_k is not None and top_k < 1):
        raise UsageError(f"--new-tokens {new_tokens} and --top-k {top_k}: both must be at least 1")
    folder = resolve(model, download=True)
    if not is_causal(open_checkpoint(folder).config):
        raise InputError(f"{folder} does not predict the next token, so it cannot continue a text")
    check_tokenizer(folder)
    from nybble.evaluate.speed import greedy_text, top_k_text
    from nybble.models.loading import load_tokenizer
    from nybble.run import load

    tokenizer, quantized = load_tokenizer(folder), load(folder)
    if top_k is None:
        continuation = greedy_text(quantized.model(), tokenizer, prompt, new_tokens)
    else:
        continuation = top_k_text(quantized.model(), tokenizer, prompt, new_tokens, seed, top_k)
    typer.echo(prompt + continuation)
