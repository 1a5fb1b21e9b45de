"""How much each quantized weight costs alone: the KL of the float model with one of its weights replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.calibrate.windows import Windows
from nybble.errors import UsageError
from nybble.evaluate.quality import kl_divergence, log_probabilities, mean_and_error
from nybble.formats import QTensor
from nybble.models.describe import sites
from nybble.models.float_weights import float_weight, put_weight


@dataclass(frozen=True)
class Alone:
    """One weight quantized, all others float."""

    name: str
    format: str
    kl: float
    """Nats per scored token, mean."""
    kl_se: float | None
    """Its standard error, windows as the units; None for one window."""


def kl_alone(
    model: Any,
    tensors: Mapping[str, QTensor],
    windows: Windows,
    progress: Callable[[int, int], None] | None = None,
) -> list[Alone]:
    """The KL that each of the tensors causes alone in a float model, which is left as it was.

    Raises UsageError for a tensor that is no weight of the model, or has another shape.
    """
    layers = {name: site.modules[0] for name, site in sites(model).items()}
    for name, tensor in tensors.items():
        if name not in layers or float_weight(layers[name]).shape != tensor.shape:
            raise UsageError(
                f"{name} {tensor.shape} is not a weight of this {type(model).__name__}; is the reference its float model?"
            )
    sums: dict[str, NDArray[np.float64]] = {name: np.zeros(len(windows)) for name in tensors}
    done, total = 0, len(windows) * len(tensors)
    for w in range(len(windows)):
        one = Windows(windows.ids[w : w + 1], windows.scored[w : w + 1], windows.protocol, windows.stride, windows.bos)
        p = [chunk.log_probs for chunk in log_probabilities(model, one, 1, one.length, None)]
        for name, tensor in tensors.items():
            original = float_weight(layers[name]).copy()
            put_weight(layers[name], tensor.decode())
            try:
                chunks = log_probabilities(model, one, 1, one.length, None)
                sums[name][w] = sum(float(kl_divergence(mine, q.log_probs).sum()) for mine, q in zip(p, chunks, strict=True))
            finally:
                put_weight(layers[name], original)
            done += 1
            if progress:
                progress(done, total)
    tokens = windows.scored.sum(axis=1)
    found = {name: mean_and_error(values, tokens) for name, values in sums.items()}
    return [Alone(name, str(tensors[name].format), *found[name]) for name in tensors]
