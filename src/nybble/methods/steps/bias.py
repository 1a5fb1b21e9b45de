"""Bias correction: what rounding takes from the mean of a layer's outputs goes into its bias.

The bias b' for which |X W^T + b - Y Q^T - b'|^2 is least, X being the float model's inputs and Y those that the layer really
has, makes both means equal: b' = b + W mean(x) - Q mean(y). What is left of the loss does not see means any more, so codes are
chosen with the inputs' second moments around their mean (calibrate/statistics.py). The idea of a correction after the fact:
Nagel et al., arXiv 1906.04721, section 4.2.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.calibrate.statistics import Statistics


def moved_bias(bias: Tensor, weight: NDArray[np.float32], decoded: NDArray[np.float32], stats: Statistics) -> Tensor:
    """float32 [N]: the bias [N] of a layer whose float weight [N, K] became `decoded` [N, K]. `stats` knows the means."""
    assert stats.means is not None
    moved = bias.double().clone()
    for rows, index in stats.parts(len(weight)):
        mean = stats.means[index]
        float_mean = mean if stats.float_means is None else stats.float_means[index]
        moved[rows] += torch.from_numpy(weight[rows]).double() @ float_mean - torch.from_numpy(decoded[rows]).double() @ mean
    return moved.float()
