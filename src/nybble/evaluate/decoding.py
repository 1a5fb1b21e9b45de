"""Speed and memory of the engine on one folder, as `nybble generate` meets them. No torch; one process a folder.

    start         from the start of the process to the first new token: Python, imports, loading, prompt
    first token   prompt in, one token out, the decoder loaded and warm
    generation    prompt in, `new_tokens` out; an end-of-text token does not end it
    prefill       logits of the last position of up to 512 random tokens
    batch         eight equal prompts decoded together

All but the first are medians of several runs. Bytes per token are weights and cache that one new token reads, which the
parent holds against the measured memory bandwidth. Left out: sampling, and the tokenizer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nybble import kernels
from nybble.containers import open_contents
from nybble.engine import Decoder
from nybble.evaluate import memory
from nybble.evaluate.clock import seconds_since_start
from nybble.formats import parse_format

BATCH = 8


def has_codes(folder: str | Path) -> bool:
    """Whether any weight of a model is stored as codes, so that the engine rounds activations."""
    return any(not parse_format(spec).is_cast for spec, _ in open_contents(folder).packed.values())


def measure_decoding(
    folder: str | Path,
    prompt: Sequence[int],
    new_tokens: int,
    repeats: int,
    prefill_tokens: int,
    threads: int,
    seed: int,
    spawned: float,
) -> dict[str, Any]:
    """The fields of `record.EngineRecord` but `bandwidth_share`.

    Call it first thing in a new process; `spawned` is when that was started. Raises InputError for a model that the engine
    cannot decode, NumericError when its logits are not finite.
    """
    memory.release()
    before = memory.resident_bytes()
    start = time.perf_counter()
    decoder = Decoder.load(folder, threads)
    load_seconds = time.perf_counter() - start
    decoder.generate(prompt, 1, stop_tokens=())
    start_seconds = seconds_since_start(spawned)
    memory.release()
    after_load = memory.resident_bytes()

    decoder.generate(prompt, min(new_tokens, 4), stop_tokens=())
    first = [_timed(lambda: decoder.generate(prompt, 1, stop_tokens=())) for _ in range(repeats)]
    seconds = [_timed(lambda: decoder.generate(prompt, new_tokens, stop_tokens=())) for _ in range(repeats)]

    length = min(prefill_tokens, decoder.context)
    texts = np.random.default_rng(seed).integers(0, decoder.vocabulary, size=(repeats + 1, length))
    decoder.prefill(texts[0])
    prefill = [_timed(lambda text=text: decoder.prefill(text)) for text in texts[1:]]  # type: ignore[misc]

    texts_together = [list(prompt)] * BATCH
    decoder.generate_batch(texts_together, min(new_tokens, 2), stop_tokens=())
    batch = [_timed(lambda: decoder.generate_batch(texts_together, new_tokens, stop_tokens=())) for _ in range(repeats)]

    median = statistics.median(seconds)
    # The i-th new token (from 0) reads the cache of len(prompt) + i positions.
    cached = decoder.position_bytes * (len(prompt) + (new_tokens - 1) / 2)
    return {
        "activations": "int8" if has_codes(folder) else "float",
        "cache": decoder.cache,
        "instruction_set": kernels.instruction_set(),
        "threads": decoder.threads,
        "load_seconds": load_seconds,
        "start_seconds": start_seconds,
        "first_token_seconds": statistics.median(first),
        "seconds_50_tokens": median,
        "seconds_50_tokens_runs": seconds,
        "tokens_per_second": new_tokens / median,
        "prefill_tokens_per_second": length / statistics.median(prefill),
        "batch8_tokens_per_second": BATCH * new_tokens / statistics.median(batch),
        "weight_bytes": decoder.weight_bytes,
        "bytes_per_token": decoder.token_bytes + round(cached),
        "memory_before_bytes": before,
        "memory_after_load_bytes": after_load,
    }


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
