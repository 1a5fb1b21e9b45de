"""Mean square of the inputs of every linear layer, streamed over calibration windows.

E[x_k^2] for each input column k is the diagonal of the layer's Hessian up to a constant (GPTQ, arXiv 2210.17323, section
3; llama.cpp calls it the importance matrix): what an error in column k of a weight costs at the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nybble.calibrate.watching import watch_inputs
from nybble.calibrate.workers import Workers
from nybble.errors import InputError
from nybble.models.describe import sites
from nybble.models.loading import context_length


def input_importance(
    model: nn.Module, windows: NDArray[np.integer[Any]], progress: Callable[[int, int], None] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Weight name -> float32 [K], over token windows, integers [windows, tokens]. Embeddings have none.

    Products are float32, sums float64, window by window: the result does not depend on a batch size.
    Raises InputError when windows have another shape, type or ids than the model takes.
    """
    check_windows(model, windows)
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, inputs: torch.Tensor) -> None:
        x = inputs.reshape(-1, inputs.shape[-1]).float()  # [tokens, K]
        square = x.square().sum(0, dtype=torch.float64)
        sums[name] = sums[name] + square if name in sums else square
        counts[name] = counts.get(name, 0) + x.shape[0]

    linear = [(n, m) for n, site in sites(model).items() for m in site.modules if not isinstance(m, nn.Embedding)]
    watch_inputs(model, linear, windows, see, progress)
    return {name: (total / counts[name]).float().numpy() for name, total in sums.items()}


def mean_squares(inputs: Callable[[int], torch.Tensor], windows: int, workers: Workers) -> NDArray[np.float32]:
    """float32 [K] of the inputs float32 [T, K] that a function gives for each window: the same sums as `input_importance`."""

    def squares(window: int) -> tuple[torch.Tensor, int]:
        with torch.no_grad():
            found = inputs(window)
            return found.square().sum(0, dtype=torch.float64), len(found)

    total, tokens = torch.zeros(1, dtype=torch.float64), 0
    for more, count in workers.map(squares, range(windows)):
        total, tokens = total + more, tokens + count
    return (total / max(1, tokens)).float().numpy()


def check_windows(model: nn.Module, windows: NDArray[Any]) -> None:
    """Raise InputError when calibration windows are not int [windows, tokens] within the model's vocabulary."""
    if windows.ndim != 2 or windows.size == 0 or not np.issubdtype(windows.dtype, np.integer):
        raise InputError(f"calibration is {windows.dtype} {windows.shape}; it must be integers [windows, tokens]")
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if windows.min() < 0 or windows.max() >= vocabulary:
        raise InputError(f"calibration ids reach {windows.max()}; the model has {vocabulary} tokens")
    try:
        context = context_length(model)
    except InputError:  # some say none
        return
    if windows.shape[1] > context:
        raise InputError(f"calibration windows of {windows.shape[1]} tokens are longer than the model's context of {context}")
