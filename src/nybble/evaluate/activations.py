"""What the engine's two modes cost in quality: the same folder decoded with float and with int8 activations.

All models read the same windows in step, so every figure is paired token by token:

    torch    the folder's weights, decoded, computed by torch: what both modes are held against
    float    the engine in exact mode; differs from torch by the rounding of float32 alone
    int8     the engine as it decodes by default: activations rounded to int8 in blocks, attention in whole numbers of
             16 bits

What int8 activations add is stated in two ways. `kl` is KL(float mode || int8 mode): how far the rounding moves the
predictions of the same weights. `difference` is KL(float model || int8 mode) - KL(float model || float mode): how much
farther the quantized model is from the model that it was made from; it can be negative and needs that model.

Left out: logits while decoding token by token. The engine gives the same to the bit however a text is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nybble import kernels
from nybble.calibrate.windows import Windows
from nybble.engine import Decoder
from nybble.errors import InputError, UsageError, unknown_name
from nybble.evaluate.quality import Chunk, Quality, Tally, log_probabilities, mean_and_error

MODES = ("float", "int8")
"""Whether activations stay float32 (exact) or are rounded to int8 in blocks (the engine's default)."""

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


@dataclass(frozen=True)
class Distance:
    """A figure per token: its mean with standard error, and its 99th percentile. Nats."""

    mean: float
    se: float | None
    p99: float


@dataclass(frozen=True)
class ModeQuality:
    """One mode of the engine on the windows."""

    quality: Quality
    """Perplexity; KL and agreement against the float model where one was given."""
    from_torch: Distance | None
    """KL(torch || this mode), same weights. None where predictions are not finite."""
    cache: str
    """What keys and values were held in."""


@dataclass(frozen=True)
class Activations:
    """Quality of a folder as torch and as the engine computes it."""

    torch: Quality
    modes: dict[str, ModeQuality]
    """By name, of MODES."""
    kl: Distance | None
    """KL(float mode || int8 mode); None unless both were measured and finite."""
    difference: Distance | None
    """KL(float model || int8 mode) - KL(float model || float mode); None without a float model too."""
    threads: int | None
    """Of the engine; None when no mode was measured."""
    instruction_set: str


class EngineModel:
    """The engine in the place of a torch model: `model(input_ids=[B, T]).logits`, float32 [B, T, vocabulary]."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def __call__(self, input_ids: torch.Tensor) -> SimpleNamespace:
        rows = [torch.from_numpy(self.decoder.logits(ids)) for ids in input_ids.tolist()]
        return SimpleNamespace(logits=torch.stack(rows))

    def parameters(self) -> tuple[()]:
        return ()

    def buffers(self) -> tuple[()]:
        return ()


def evaluate_activations(
    folder: str | Path,
    model: Any,
    windows: Windows,
    modes: tuple[str, ...] = MODES,
    reference: Any = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Activations:
    """Measure a folder with torch (`model`, loaded from it) and with the engine in each of `modes`, window by window.

    Without modes this is `evaluate`, with the float model in the place of a cache.

    `reference` is the float model, called as `model` is, for KL against it. One window's logits of each model are in memory
    at a time: 4 bytes times window length times vocabulary. Raises InputError for a folder that the engine cannot decode,
    UsageError for an unknown mode or a float model of another vocabulary.
    """
    for mode in modes:
        if mode not in MODES:
            raise unknown_name("activations", mode, MODES)
    decoders = {mode: Decoder.load(folder, threads, exact=mode == "float") for mode in modes}
    for decoder in decoders.values():
        if windows.length > decoder.context:
            raise InputError(f"window of {windows.length} tokens is longer than the engine's context of {decoder.context}")
    models = {"torch": model, **{mode: EngineModel(decoder) for mode, decoder in decoders.items()}}
    kl_windows = len(windows) if reference is not None else 0
    against_float = {name: Tally(windows, kl_windows) for name in models}
    against_torch = {mode: Tally(windows, len(windows)) for mode in modes}
    between = Tally(windows, len(windows))  # int8 mode against float mode
    for chunks in _in_step(models, reference, windows, progress):
        float_model = chunks.get("reference")
        for name, tally in against_float.items():
            if float_model is not None and float_model.log_probs.shape != chunks[name].log_probs.shape:
                width = chunks[name].log_probs.shape[1]
                raise UsageError(f"the model predicts {width} tokens, the float model {float_model.log_probs.shape[1]}")
            tally.add(chunks[name], None if float_model is None else float_model.log_probs)
        for mode, tally in against_torch.items():
            tally.add(chunks[mode], chunks["torch"].log_probs)
        if set(modes) == set(MODES):
            between.add(chunks["int8"], chunks["float"].log_probs)
    tokens = windows.scored.sum(axis=1)
    both = set(modes) == set(MODES) and all(against_float[mode].broken is None for mode in modes)
    return Activations(
        torch=against_float["torch"].quality(),
        modes={
            mode: ModeQuality(against_float[mode].quality(), _kl_of(against_torch[mode], tokens), decoder.cache)
            for mode, decoder in decoders.items()
        },
        kl=_kl_of(between, tokens) if both else None,
        difference=_difference(against_float["int8"], against_float["float"], tokens) if both and kl_windows else None,
        threads=next((decoder.threads for decoder in decoders.values()), None),
        instruction_set=kernels.instruction_set(),
    )


def _in_step(models: dict[str, Any], reference: Any, windows: Windows, progress: Progress | None) -> Iterator[dict[str, Chunk]]:
    """Dictionaries of the models' predictions of the same targets, chunk by chunk; `reference` is among them if given."""
    named = {**models, **({"reference": reference} if reference is not None else {})}
    last = list(named)[-1]
    streams = [
        log_probabilities(each, windows, len(windows), windows.length, progress if name == last else None)
        for name, each in named.items()
    ]
    for chunks in zip(*streams, strict=True):
        yield dict(zip(named, chunks, strict=True))


def _kl_of(tally: Tally, tokens: NDArray[np.int64]) -> Distance | None:
    if tally.broken is not None or not np.isfinite(tally.kl).all():
        return None
    return _distance(tally.kl_sum, tally.kl, tokens)


def _difference(int8: Tally, exact: Tally, tokens: NDArray[np.int64]) -> Distance:
    return _distance(int8.kl_sum - exact.kl_sum, int8.kl - exact.kl, tokens)


def _distance(sums: NDArray[np.float64], values: NDArray[np.float64], tokens: NDArray[np.int64]) -> Distance:
    mean, se = mean_and_error(sums, tokens)
    return Distance(mean, se, float(np.quantile(values, 0.99)))
