"""Calibration windows that the model writes itself, where there is no text to calibrate on.

Tokens are sampled from the model's own predictions, one after the other, as LLM-QAT (arXiv 2305.17888) makes its training
data: what the model says is spread as what it was trained on, as far as it learnt that. On one thread, so that the number of
threads changes nothing, and the one that the program began with: a cache that grows with every token leaves other threads'
memory in pieces, gigabytes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nybble.calibrate.windows import CALIBRATION_LENGTH, CALIBRATION_WINDOWS
from nybble.calibrate.workers import Workers
from nybble.errors import NumericError, UsageError
from nybble.models.loading import context_length, quiet

BATCH = 32
"""Windows written side by side."""

Progress = Callable[[int, int], None]


def written_windows(
    model: nn.Module,
    count: int = CALIBRATION_WINDOWS,
    length: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> NDArray[np.int64]:
    """int64 [count, length]: windows sampled from a causal model, each from its begin-of-text token on, or from a random
    token where it has none. `length` is the model's context, at most 2048, where it is not given.

    Raises UsageError for a model that writes no text, a length beyond its context, and fewer than one window; NumericError
    where its predictions are not finite.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    context = context_length(model)
    length = length or min(context, CALIBRATION_LENGTH)
    if length > context or length < 2:
        raise UsageError(f"calibration windows of {length} tokens: the model's context allows 2 to {context}")
    if count < 1:
        raise UsageError(f"{count} calibration windows asked for; at least 1 is needed")
    steps = -(-count // BATCH) * (length - 1)
    generator = torch.Generator().manual_seed(seed)
    found: list[NDArray[np.int64]] = []
    with quiet(), Workers(), torch.inference_mode():
        for first in range(0, count, BATCH):
            start = _first_tokens(config, min(BATCH, count - first), generator)
            found.append(_write(model, start, length, generator, partial(_tick, progress, len(found) * (length - 1), steps)))
    return np.concatenate(found)


def _tick(progress: Progress | None, before: int, steps: int, done: int) -> None:
    if progress and done % 16 == 0:
        progress(before + done, steps)


def _first_tokens(config: Any, rows: int, generator: torch.Generator) -> Tensor:
    begin = getattr(config, "bos_token_id", None)
    if isinstance(begin, int) and 0 <= begin < config.vocab_size:
        return torch.full((rows, 1), begin, dtype=torch.int64)
    return torch.randint(0, config.vocab_size, (rows, 1), generator=generator)


def _write(
    model: nn.Module, tokens: Tensor, length: int, generator: torch.Generator, tick: Callable[[int], None]
) -> NDArray[np.int64]:
    written, cache = [tokens], None
    for step in range(1, length):
        output = model(tokens, past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if cache is None or not hasattr(output, "logits"):
            raise UsageError(f"{type(model).__name__} writes no text of its own; give calibration text")
        chances = output.logits[:, -1].float().softmax(-1)
        if not bool(torch.isfinite(chances).all()):
            raise NumericError("the model's predictions are not finite; it cannot write its own calibration text")
        tokens = torch.multinomial(chances, 1, generator=generator)
        written.append(tokens)
        tick(step)
    return torch.cat(written, 1).numpy()
