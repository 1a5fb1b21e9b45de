"""Calibration windows that the model writes itself, where there is no text to calibrate on.

Tokens are sampled from the model's own predictions, one after the other, as LLM-QAT (arXiv 2305.17888) makes its training
data: what the model says is spread as what it was trained on, as far as it learnt that. Batches have a fixed size and a
generator of their own each, so that the number of threads changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nybble.calibrate.windows import CALIBRATION_LENGTH, CALIBRATION_WINDOWS
from nybble.calibrate.workers import Workers
from nybble.errors import NumericError, UsageError
from nybble.models.loading import context_length, quiet

SELF = "self"
"""What stands in the place of a text to ask for these windows."""
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
    total = -(-count // BATCH) * (length - 1)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress and done % 16 == 0:
            progress(done, total)

    def batch(first: int) -> NDArray[np.int64]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
        rows = min(BATCH, count - first)
        return _write(model, _first_tokens(config, rows, generator), length, generator, tick)

    with quiet(), Workers() as workers, torch.inference_mode():
        return np.concatenate(list(workers.map(batch, range(0, count, BATCH))))


def _first_tokens(config: Any, rows: int, generator: torch.Generator) -> Tensor:
    begin = getattr(config, "bos_token_id", None)
    if isinstance(begin, int) and 0 <= begin < config.vocab_size:
        return torch.full((rows, 1), begin, dtype=torch.int64)
    return torch.randint(0, config.vocab_size, (rows, 1), generator=generator)


def _write(
    model: nn.Module, tokens: Tensor, length: int, generator: torch.Generator, tick: Callable[[], None]
) -> NDArray[np.int64]:
    written, cache = [tokens], None
    with torch.inference_mode():  # of this thread
        for _ in range(length - 1):
            output = model(tokens, past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", None)
            if cache is None or not hasattr(output, "logits"):
                raise UsageError(f"{type(model).__name__} writes no text of its own; give calibration text")
            chances = output.logits[:, -1].float().softmax(-1)
            if not bool(torch.isfinite(chances).all()):
                raise NumericError("the model's predictions are not finite; it cannot write its own calibration text")
            tokens = torch.multinomial(chances, 1, generator=generator)
            written.append(tokens)
            tick()
    return torch.cat(written, 1).numpy()
