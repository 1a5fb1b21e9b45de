"""Float weights of layers as [N, K] = [out, in], whichever way round the layer stores them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def turned(layer: nn.Module, values: Tensor) -> Tensor:
    """A view of a layer's weight, or of what has its shape, as [N, K]: GPT-2's Conv1D stores [K, N]. Its own inverse."""
    return values.T if isinstance(layer, Conv1D) else values


def weight_view(layer: nn.Module) -> Tensor:
    """A layer's weight [N, K] in its own type, a view of it."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return turned(layer, weight)


def float_weight(layer: nn.Module) -> NDArray[np.float32]:
    """float32 [N, K], contiguous: a layer's weight, copied only where it has to be."""
    return np.ascontiguousarray(weight_view(layer).detach().to(torch.float32).cpu().numpy())


def put_weight(layer: nn.Module, weight: NDArray[np.float32]) -> None:
    """Put a float weight [N, K] in the place of a layer's own, in its type."""
    with torch.no_grad():
        weight_view(layer).copy_(torch.from_numpy(weight))
